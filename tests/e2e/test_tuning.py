"""A tuning through Flower and Ray: interrupted and resumed it comes to what one process comes to; the commands."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import entry_point

from fedmaestro.errors import UserError
from fedmaestro.flower.compare import compare
from fedmaestro.flower.tune import Tuning, tune
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.records import RoundRecord, Trial

SMALL = {"train.rounds": 3, "train.evaluate-every": 1, "train.local-epochs": 1}
ROWS = ["nested", "wide:heterofl"]
SEARCH = {"train.lr": [0.05, 0.2]}


class Watcher(ComparisonObserver):
    """Records cells and trials; interrupts in round 1 of a cell."""

    def __init__(self, interrupt: str = "") -> None:
        self.cells: list[str] = []
        self.trials: list[tuple[str, int]] = []
        self.done: list[int] = []
        self._interrupt = interrupt

    def on_cells(self, path: Path, done: int, total: int) -> None:
        assert total == 4
        self.done.append(done)

    def on_cell(self, label: str, seed: int) -> None:
        self.cells.append(f"{label} {seed}")

    def on_trial(self, row: str, trial: Trial) -> None:
        self.trials.append((row, trial.number))

    def on_round(self, record: RoundRecord) -> None:
        if self.cells[-1] == self._interrupt and record.round == 1:
            os.kill(os.getpid(), signal.SIGINT)


def timeless(content: Any) -> Any:
    """Leave out what depends on the machine."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key != "wall_seconds"}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def test_an_interrupted_tuning_goes_on_to_what_one_process_finds(tmp_path: Path) -> None:
    out, stopped, resumed = tmp_path / "t", Watcher("nested-trial2 1000"), Watcher()
    partial = tune(None, ROWS, SEARCH, overrides=SMALL, out=out, actors=1, observers=[stopped])
    assert stopped.cells == ["nested-trial1 1000", "wide-trial1 1000", "nested-trial2 1000"]
    assert stopped.trials == [("nested", 1), ("wide", 1)]
    assert not partial.results["complete"]
    assert "**Incomplete**" in (out / "tuning.md").read_text()
    with pytest.raises(UserError, match="the tuning is not finished"):
        compare(None, ROWS, [0], overrides=SMALL, tuned=out, out=tmp_path / "c", actors=0)

    whole = tune(None, ROWS, SEARCH, overrides=SMALL, out=out, actors=1, observers=[resumed], resume=True)
    assert resumed.cells == ["nested-trial2 1000", "wide-trial2 1000"]
    assert resumed.trials == [("nested", 1), ("wide", 1), ("nested", 2), ("wide", 2)]
    assert resumed.done == [2, 3, 4]
    assert whole.results["settings"]["fleet.match-macs"], "ranks and widths are searched"

    alone = tune(None, ROWS, SEARCH, overrides=SMALL, out=tmp_path / "alone", actors=0)
    assert timeless(whole.results) == timeless(alone.results)
    for row in ("nested", "wide"):
        for number in (1, 2):
            cell = Path("cells") / f"{row}-trial{number}-seed1000" / "model.safetensors"
            assert (out / cell).read_bytes() == (tmp_path / "alone" / cell).read_bytes()

    comparison = compare(None, ROWS, [0], overrides=SMALL, tuned=whole, out=tmp_path / "c", actors=1)
    assert comparison.results["tuned"] == whole.results
    assert f"(with train.lr={whole.chosen('wide')['train.lr']})" in comparison.results["strategies"][1]["summary"]


def test_ctrl_c_before_a_trial_is_finished_keeps_its_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(None, ROWS, SEARCH, overrides=SMALL, out=tmp_path, actors=0, observers=[Watcher("nested-trial1 1000")])
    assert (tmp_path / "cells" / "nested-trial1-seed1000" / "rounds.jsonl").exists()
    whole = tune(None, ROWS, SEARCH, overrides=SMALL, out=tmp_path, actors=0, observers=[], resume=True)
    assert whole.results["complete"]


def test_the_commands_choose_and_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = entry_point(tmp_path, monkeypatch, capsys)
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    small = [*settings, "--actors", "0", "--strategies", "nested,own:fedmaestro"]
    search = ["--search", "train.lr=0.05,0.2", "--search", "own: server.tail-start=0,4", "--trials", "2"]
    done = call("tune", *small, *search, "--seeds", "7,", "--validation", "100", "--out", "t")
    assert (done.code, done.err) == (0, "")
    assert "own, trial 2: train.lr=0.2" in done.out
    assert "nested: train.lr = 0.2 is the largest value that was declared" in done.out
    results = Tuning(Path("t")).results
    assert (results["seeds"], results["validation"], results["trials"]) == ([7], 100, 2)
    compared = call("compare", *small, "--seeds", "1", "--tuned", "t", "--out", "c")
    assert (compared.code, compared.err) == (0, "")
    assert "## Tuning" in Path("c/table.md").read_text()
    refused = call("compare", *small, "--seeds", "1", "--set", "seed=7", "--tuned", "t", "--out", "d")
    assert refused.code == 2
    assert "seed 7 is one that the rows were tuned on" in refused.err
    assert not Path("d").exists()
    for words, said in (
        (["--seeds", "x"], "--seeds 'x': say how many"),
        (["--validation", "1.5"], "--validation 1.5: a share below 1"),
        (["--search", "own:"], "--search 'own:': write KEY=VALUE"),
    ):
        refused = call("tune", *small, *search, *words, "--out", "e")
        assert refused.code == 2
        assert said in refused.err
        assert refused.err.count("\n") == 1
    lines = call("tune", *small, *search, "--out", "j", "--log-format", "json").out
    assert '"event": "trial", "row": "own"' in lines
