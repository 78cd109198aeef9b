"""`fedmaestro train` and `fedmaestro extract`: what they print, exit codes, and mistakes that cost one line."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Command, Result, check_refused, entry_point, tree
from torch.utils import benchmark

from fedmaestro.report import format_count
from fedmaestro.runs.model import load_model
from fedmaestro.terminal.training import TrainingDisplay
from fedmaestro.training import run

QUICK = [
    "data.limit=320",
    "train.epochs=2",
    "train.batch-size=64",
    "curve.calibration=32",
    'curve.fractions="1 0.3"',
    "curve.latency-batch=4",
]


@pytest.fixture
def fedmaestro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the entry point in an empty working directory; latencies are measured in a moment."""
    measure = benchmark.Timer.blocked_autorange
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda timer, **_: measure(timer, min_run_time=0.002))
    return entry_point(tmp_path, monkeypatch, capsys)


@pytest.fixture
def quick(fedmaestro: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`quick(folder, "train.lr=1", …)` trains in ten steps and draws nothing."""
    monkeypatch.setattr(run, "save_figure", lambda *_: None)

    def call(folder: str, *settings: str, options: tuple[str, ...] = ()) -> Result:
        pairs = [part for setting in (*QUICK, *settings) for part in ("--set", setting)]
        return fedmaestro("train", *pairs, "--out", folder, *options)

    return call


def check_table(lines: list[str], folder: Path) -> None:
    """Check that each model of the curve has a line of its own."""
    curve = json.loads((folder / "curve.json").read_text())
    named = [(name.split(", ")[1].split()[0], point) for name, points in curve["series"].items() for point in points]
    named += [("dense", curve["dense"])] if curve["dense"] else []
    for name, point in named:
        figures = [format_count(point["macs"]), format_count(point["params"]), f"{100 * point['value']:.2f}"]
        matching = [line for line in lines if name in line and all(figure in line for figure in figures)]
        assert matching, (name, figures)


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int, times: int = 1) -> None:
    original = TrainingDisplay.on_step

    def on_step(self: TrainingDisplay, now: int, done: int, loss: float) -> None:
        original(self, now, done, loss)
        if (now, done) == (epoch, step):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingDisplay, "on_step", on_step)


# train


def test_train_says_what_it_does_and_what_came_out(fedmaestro: Command) -> None:
    pairs = [part for setting in QUICK for part in ("--set", setting)]
    result = fedmaestro("train", *pairs, "--out", "run")
    assert (result.code, result.err) == (0, "")
    summary = json.loads(Path("run/summary.json").read_text())
    lines = result.out.splitlines()
    assert lines[0].startswith("digits, 320 examples · mlp · ")
    assert "2 epochs of 5 steps · seed 0" in lines[0]
    epochs = [line for line in lines if re.match(r"epoch +\d", line)]
    assert len(epochs) == 3
    assert f"accuracy {100 * summary['final_value']:.2f}" in epochs[-1]
    assert "train loss" not in epochs[0]
    assert "ranks 64/128/10" in epochs[-1]
    assert "models by budget (test set)" in result.out
    check_table(lines, Path("run"))
    assert f"model_sha256 {summary['model_sha256']}" in lines
    assert lines[-1].startswith(f"results: {Path('run').absolute()} ")
    assert Path("run/plots/accuracy_cost.png").stat().st_size > 1000
    # None of it is a progress bar: this is no terminal.
    assert "\x1b" not in result.out


def test_ctrl_c_then_resume(quick: Command, fedmaestro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quick("whole")
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 2, 3)
        result = quick("run")
    assert result.code == 130
    assert f"interrupted: continue with `fedmaestro train --resume --out {Path('run').absolute()}`" in result.out
    assert "model_sha256" not in result.out
    resumed = fedmaestro("train", "--resume", "--out", "run")
    assert (resumed.code, resumed.err) == (0, "")
    sha256 = next(line for line in whole.out.splitlines() if line.startswith("model_sha256"))
    assert sha256 in resumed.out.splitlines()


def test_a_diverging_training(quick: Command) -> None:
    result = quick("run", "train.lr=1e30")
    assert result.code == 1
    assert result.err.startswith("fedmaestro: the loss is ")
    assert "lower train.lr" in result.err
    assert result.err.count("\n") == 1


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown setting": (["train.epoch=3"], ["train.epoch", "did you mean 'train.epochs'?"]),
    "no value": (["train.epochs"], ["'train.epochs'", "KEY=VALUE"]),
    "wrong type": (["train.epochs=many"], ["train.epochs", "'many'"]),
    "unknown model": (["model.name=mpl"], ["model.name", "'mpl'", "did you mean 'mlp'?"]),
    "unknown dataset": (["data.name=mnits"], ["'mnits'", "did you mean 'mnist'?"]),
    "unknown form": (["model.form=lowrank"], ["model.form", "'lowrank'"]),
    "unknown optimiser": (["train.optimizer=adam"], ["train.optimizer", "'adam'", "adamw"]),
    "unknown device": (["train.device=gpu"], ["train.device", "'gpu'"]),
    "bad fractions": (["curve.fractions=2"], ["curve.fractions", "2"]),
    "too many validation examples": (["data.validation=5000"], ["data.validation", "5000", "1437"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_the_settings_of_a_training(case: str, quick: Command) -> None:
    changes, said = MISTAKES[case]
    before = tree(Path.cwd().parent)
    check_refused(quick("run", *changes), said, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("train", "no.toml"), ["no.toml"]),
        (("train", "--resume"), ["--resume", "--out"]),
        (("train", "--resume", "--out", "gone"), ["gone", "no run to resume"]),
        (("train", "--compare", "gone"), ["--compare gone", "curve.json"]),
        (("train", "--data-dir", "gone", "--set", "data.name=mnist"), ["gone"]),
        (("extract", "gone", "--max-macs", "1000"), ["gone/model.json", "No such file"]),
    ],
    ids=" ".join,
)
def test_mistakes_in_the_folders(options: tuple[str, ...], said: list[str], fedmaestro: Command) -> None:
    before = tree(Path.cwd().parent)
    check_refused(fedmaestro(*options), said, before)


# extract


def test_extract_writes_a_model_and_says_what_it_is(quick: Command, fedmaestro: Command) -> None:
    assert quick("run", "train.epochs=1").code == 0
    result = fedmaestro("extract", "run", "--max-macs", "6000", "--calibration", "32", "--latency-batch", "2")
    assert (result.code, result.err) == (0, "")
    folder = Path("run/extracted/macs-6000")
    card = json.loads((folder / "model.json").read_text())
    assert card["macs_per_example"] <= 6000
    shown = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in result.out.splitlines() if "   " in line)
    assert shown["test accuracy %"] == f"{100 * card['test_accuracy']:.2f}"
    assert shown["latency, batch 2"] == f"{card['latency_ms']:.3g} ms"
    assert shown["layers"] == ", ".join(f"{name} {form}" for name, form in card["layers"].items())
    assert result.out.splitlines()[-1] == f"written: {folder} (model.safetensors, model.json)"
    assert sum(p.numel() for p in load_model(folder).parameters()) == card["params"]

    before = tree(Path.cwd().parent)
    again = fedmaestro("extract", "run", "--max-macs", "6000")
    check_refused(again, [str(folder), "already holds a model", "--out"], before)
    result = fedmaestro("extract", "run", "--max-params", "6000", "--calibration", "32", "--out", "small")
    assert result.code == 0
    assert json.loads(Path("small/model.json").read_text())["params"] <= 6000

    refusals: list[tuple[list[str], list[str]]] = [
        ([], ["exactly one of --tier, --max-macs, --max-params, --max-latency-ms, got none"]),
        (["--max-macs", "1000", "--max-params", "9"], ["exactly one", "got --max-macs, --max-params"]),
        (["--max-macs", "-1"], ["--max-macs -1", "positive"]),
        (["--max-params", "10"], ["no model fits 10 parameters"]),
        (["--tier", "low"], ["none of a federation", "no tiers"]),
        (["--max-macs", "7000", "--out", "small"], ["small already holds a model"]),
    ]
    before = tree(Path.cwd().parent)
    for options, said in refusals:
        check_refused(fedmaestro("extract", "run", *options), said, before)


def test_the_entry_point_shows_programming_errors(fedmaestro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only mistakes of the user are one line."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedmaestro.deploy.extract.extract", broken)
    with pytest.raises(ZeroDivisionError):
        fedmaestro("extract", "run", "--max-macs", "5")
