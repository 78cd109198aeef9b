"""A whole training on the embedded digits: its files, its repetition, interruption and resumption, and mistakes."""

import hashlib
import json
import os
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import tree

from fedmaestro import lod
from fedmaestro.config.base import read
from fedmaestro.errors import DivergedError, UserError
from fedmaestro.runs.model import load_model
from fedmaestro.runs.records import EpochRecord
from fedmaestro.tasks.opening import open_task
from fedmaestro.tasks.task import Task, evaluate
from fedmaestro.training import TrainingConfig, TrainingRun, run, train

QUICK: dict[str, Any] = {
    "data.limit": 320,
    "train.batch-size": 64,
    "train.epochs": 3,
    "curve.calibration": 64,
    "curve.fractions": "1 0.5 0.2",
    "curve.latency": False,
}
"""Five steps per epoch."""

SHRINKING: dict[str, Any] = {**QUICK, "train.shrink-threshold": 2.0, "train.group-lasso": 1e-3, "train.lr": 0.02}
"""Every epoch cuts something."""

Train = Callable[..., TrainingRun]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train in few steps and draw nothing; other settings come as ``quick({"train.epochs": 1}, out=…)``."""
    monkeypatch.setattr(run, "cost_figure", lambda *_, **__: None)
    monkeypatch.setattr(run, "rank_figure", lambda *_, **__: None)
    monkeypatch.setattr(run, "save_figure", lambda *_, **__: None)

    def call(overrides: dict[str, Any] | None = None, **options: Any) -> TrainingRun:
        return train(overrides={**QUICK, **(overrides or {})}, **options)

    return call


class Interrupter:
    """Observer that presses Ctrl-C ``times`` times in the given step, and notes what it is told."""

    def __init__(self, epoch: int = 0, step: int = 0, times: int = 1) -> None:
        self.at, self.times = (epoch, step), times
        self.steps: list[tuple[int, int]] = []
        self.records: list[EpochRecord] = []
        self.notes: list[str] = []
        self.started: list[tuple[Path, int]] = []

    def on_start(self, config: TrainingConfig, task: Task, folder: Path, steps: int) -> None:
        self.started.append((folder, steps))

    def on_step(self, epoch: int, step: int, loss: float) -> None:
        self.steps.append((epoch, step))
        if (epoch, step) == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)

    def on_epoch(self, record: EpochRecord) -> None:
        self.records.append(record)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def without_seconds(records: list[EpochRecord]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.to_dict().items() if key != "seconds"} for record in records]


# One run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """The demo with three epochs, shortened only where it takes time."""
    overrides = {"train.epochs": 3, "curve.latency": False, "curve.calibration": 256, "curve.fractions": "1 0.5 0.25"}
    return train(overrides=overrides, out=tmp_path_factory.mktemp("runs") / "demo")


def test_what_a_run_leaves(finished: TrainingRun) -> None:
    files = {name for name, content in tree(finished.path).items() if content is not None}
    plots = {f"plots/{name}.{kind}" for name in ("accuracy_cost", "ranks") for kind in ("png", "svg")}
    written = {"config.toml", "epochs.jsonl", "summary.json", "curve.json", "model.safetensors", "model.json"}
    assert files >= {*written, *plots, "checkpoint/progress.json"}
    config = read(TrainingConfig, finished.path / "config.toml")
    assert tomllib.loads(config.to_toml()) == tomllib.loads((finished.path / "config.toml").read_text())

    lines = [json.loads(line) for line in (finished.path / "epochs.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines == [record.to_dict() for record in finished.epochs]
    assert lines[0]["train_loss"] is None
    losses = [line["train_loss"] for line in lines[1:]]
    assert losses == sorted(losses, reverse=True)
    for line in lines:
        assert line["ranks"] == {"fc1": 64, "fc2": 128, "fc3": 10}
        # All three layers are dense at full rank.
        assert line["params"] == 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
        assert line["macs_per_example"] == 64 * 128 + 128 * 128 + 128 * 10

    summary, last = finished.summary, finished.epochs[-1]
    content = (finished.path / "model.safetensors").read_bytes()
    assert summary["model_sha256"] == hashlib.sha256(content).hexdigest()
    assert (summary["final_value"], summary["final_loss"], summary["ranks"]) == (last.value, last.loss, last.ranks)
    assert summary["best_value"] == max(record.value for record in finished.epochs)
    known = {
        "task": "digits",
        "model": "mlp",
        "form": "lod",
        "metric": "accuracy",
        "split": "test",
        "epochs": 3,
        "seed": 0,
    }
    assert {key: summary[key] for key in known} == known
    assert summary["params"] == summary["dense_params"] == last.params
    assert summary["interrupted"] is False
    assert summary["final_value"] > 0.85


def test_the_model_scores_what_the_summary_says(finished: TrainingRun) -> None:
    task = open_task(TrainingConfig())
    model = finished.model()
    assert not model.training
    result = evaluate(model, task, task.split("test"))
    assert result.accuracy == finished.summary["final_value"]
    assert result.loss == pytest.approx(finished.summary["final_loss"], rel=1e-6)
    # By hand, from the card alone: pixels to [0, 1], then its mean and standard deviation.
    card = json.loads((finished.path / "model.json").read_text())
    from fedmaestro.data import load_dataset

    digits = load_dataset("digits")
    pixels = torch.from_numpy(digits.test_images.astype(np.float32)) / 255
    with torch.inference_mode():
        guesses = model((pixels - card["mean"][0]) / card["std"][0]).argmax(1).numpy()
    assert (guesses == digits.test_labels).mean() == pytest.approx(summary_value(finished))


def summary_value(finished: TrainingRun) -> float:
    return float(finished.summary["final_value"])


def test_curve_file_is_well_formed(finished: TrainingRun) -> None:
    curve = finished.curve
    assert (curve["metric"], curve["seed"], curve["dense"]) == ("accuracy", 0, None)
    assert (curve["dense_params"], curve["dense_macs"]) == (26122, 25856)
    assert list(curve["series"]) == ["Maestro, searched ranks", "Maestro, uniform ranks"]
    for points in curve["series"].values():
        assert [point["budget"] for point in points] == [1.0, 0.5, 0.25, points[-1]["macs"] / 25856]


def test_the_observer_is_told_everything(tmp_path: Path, quick: Train) -> None:
    observer = Interrupter()
    result = quick({"train.epochs": 2}, out=tmp_path / "run", observers=[observer])
    assert observer.started == [(tmp_path / "run", 5)]
    assert observer.steps == [(epoch, step) for epoch in (1, 2) for step in range(1, 6)]
    assert observer.records == result.epochs
    assert any("searched ranks" in note for note in observer.notes)


def test_shrinking_shows_in_the_files(tmp_path: Path, quick: Train) -> None:
    result = quick(SHRINKING, out=tmp_path / "run")
    totals = [sum(record.ranks.values()) for record in result.epochs]
    assert totals == sorted(set(totals), reverse=True)
    assert lod.max_ranks(result.model()) == result.summary["ranks"] == result.epochs[-1].ranks
    assert result.summary["params"] < result.summary["dense_params"]
    assert result.summary["macs_per_example"] < result.summary["dense_macs_per_example"]
    assert result.summary["dense_params"] == 26122
    deployed = lod.recompose(result.model())
    assert sum(p.numel() for p in deployed.parameters()) == result.summary["params"]
    first = result.curve["series"]["Maestro, searched ranks"][0]
    assert first["ranks"] == result.summary["ranks"]


def test_dense_form(tmp_path: Path) -> None:
    overrides = {**QUICK, "model.form": "dense", "train.shrink-threshold": 10.0, "train.epochs": 2}
    result = train(overrides=overrides, out=tmp_path / "run")
    assert lod.layers(result.model()) == {}
    assert {tuple(record.ranks) for record in result.epochs} == {()}
    assert {(record.params, record.macs_per_example) for record in result.epochs} == {(26122, 25856)}
    curve = result.curve
    assert list(curve["series"]) == ["dense + SVD, searched ranks", "dense + SVD, uniform ranks"]
    assert curve["dense"]["value"] == result.summary["final_value"]
    assert (curve["dense"]["params"], curve["dense"]["macs"]) == (26122, 25856)
    assert (tmp_path / "run/plots/accuracy_cost.png").exists()
    assert not (tmp_path / "run/plots/ranks.png").exists()


def test_epochs_are_scored_on_the_validation_split(tmp_path: Path, quick: Train) -> None:
    result = quick({"data.validation": 100, "train.epochs": 1}, out=tmp_path)
    task = open_task(read(TrainingConfig, None, {"data.limit": 320, "data.validation": 100}))
    assert result.summary["split"] == "validation"
    scored = evaluate(result.model(), task, task.split("validation"))
    assert result.summary["final_value"] == scored.accuracy == result.epochs[-1].value
    tested = evaluate(result.model(), task, task.split("test"))
    first = result.curve["series"]["Maestro, searched ranks"][0]
    assert (first["value"], first["validation_value"]) == (tested.accuracy, scored.accuracy)


# Repetition


def test_the_same_seed_gives_the_same_model_and_another_one_another(tmp_path: Path, quick: Train) -> None:
    changes = [{}, {}, {"seed": 1}]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = [quick({**c, "train.epochs": 1}, out=tmp_path / str(i)) for i, c in enumerate(changes)]
    assert torch.get_rng_state().equal(before)
    digests = [result.summary["model_sha256"] for result in runs]
    assert digests[0] == digests[1] != digests[2]
    assert without_seconds(runs[0].epochs) == without_seconds(runs[1].epochs)
    assert runs[0].curve == runs[1].curve


# Interruption


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """A run of three epochs that shrinks, not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cost_figure", lambda *_, **__: None)
        patch.setattr(run, "rank_figure", lambda *_, **__: None)
        patch.setattr(run, "save_figure", lambda *_, **__: None)
        return train(overrides=SHRINKING, out=tmp_path_factory.mktemp("whole") / "run")


def assert_same_run(result: TrainingRun, whole: TrainingRun) -> None:
    assert result.summary["model_sha256"] == whole.summary["model_sha256"]
    assert without_seconds(result.epochs) == without_seconds(whole.epochs)
    timeless = [{k: v for k, v in x.summary.items() if k != "wall_seconds"} for x in (result, whole)]
    assert timeless[0] == timeless[1]
    assert result.curve == whole.curve


@pytest.mark.parametrize("at", [(1, 2), (1, 5), (3, 4)], ids=str)
def test_interrupted_and_resumed_is_the_same_run(
    at: tuple[int, int], tmp_path: Path, quick: Train, whole: TrainingRun
) -> None:
    epoch, step = at
    complete = epoch if step == 5 else epoch - 1
    before = signal.getsignal(signal.SIGINT)
    first = Interrupter(*at)
    result = quick(SHRINKING, out=tmp_path, observers=[first])
    assert signal.getsignal(signal.SIGINT) == before
    assert first.steps[-1] == at
    assert result.summary["interrupted"]
    assert result.summary["epochs"] == complete
    assert [record.epoch for record in result.epochs] == list(range(complete + 1))
    assert not (tmp_path / "curve.json").exists()
    assert lod.max_ranks(load_model(tmp_path)) == result.summary["ranks"]

    second = Interrupter()
    resumed = train(out=tmp_path, resume=True, observers=[second])
    assert second.steps[0] == ((epoch + 1, 1) if step == 5 else (epoch, step + 1))
    assert second.records == resumed.epochs
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("at", [(1, 3), (3, 2)], ids=str)
def test_ended_at_once_and_resumed_is_the_same_run(
    at: tuple[int, int], tmp_path: Path, quick: Train, whole: TrainingRun
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick(SHRINKING, out=tmp_path, observers=[Interrupter(*at, times=2)])
    assert not (tmp_path / "summary.json").exists()
    resumed = train(out=tmp_path, resume=True)
    assert_same_run(resumed, whole)


def test_a_crash_while_a_checkpoint_is_saved_is_repaired(
    tmp_path: Path, quick: Train, whole: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.save_checkpoint

    def crash(folder: Path, checkpoint: Any) -> None:
        if checkpoint.number == 10:
            raise OSError("disk full")
        original(folder, checkpoint)

    monkeypatch.setattr(run, "save_checkpoint", crash)
    with pytest.raises(OSError, match="disk full"):
        quick(SHRINKING, out=tmp_path)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "epochs.jsonl").read_text().splitlines()] == [0, 1, 2]
    with (tmp_path / "epochs.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tra')
    monkeypatch.setattr(run, "save_checkpoint", original)
    assert_same_run(train(out=tmp_path, resume=True), whole)


def test_checkpoints_between_epochs(
    tmp_path: Path, quick: Train, whole: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        quick(SHRINKING, out=tmp_path, observers=[Interrupter(2, 3, times=2)])
    observer = Interrupter()
    resumed = train(out=tmp_path, resume=True, observers=[observer])
    assert observer.steps[0] == (2, 3)
    assert_same_run(resumed, whole)


def test_a_finished_run_can_be_resumed_to_draw_its_curve(tmp_path: Path, quick: Train) -> None:
    first = quick({"train.epochs": 1}, out=tmp_path)
    before, curve = (tmp_path / "epochs.jsonl").read_text(), first.curve
    (tmp_path / "curve.json").unlink()
    again = train(out=tmp_path, resume=True)
    assert again.curve == curve
    assert (tmp_path / "epochs.jsonl").read_text() == before
    # What is measured after the training may change.
    other = train(overrides={"curve.fractions": "0.3"}, out=tmp_path, resume=True)
    assert [point["budget"] for point in other.curve["series"]["Maestro, searched ranks"]][:-1] == [0.3]
    assert other.summary["model_sha256"] == first.summary["model_sha256"]
    assert read(TrainingConfig, tmp_path / "config.toml").curve.fractions == "0.3"


# Divergence


def test_divergence_in_the_middle_of_an_epoch_is_told(tmp_path: Path, quick: Train) -> None:
    with pytest.raises(DivergedError, match=r"in step \d \(epoch 1\): lower train\.lr"):
        quick({"train.lr": 1e30}, out=tmp_path)
    assert not (tmp_path / "summary.json").exists()


# Mistakes


def refused(said: list[str], tmp_path: Path, **arguments: Any) -> str:
    """Check that ``train`` names what is wrong in one line and leaves the disk alone."""
    before = tree(tmp_path)
    with pytest.raises(UserError) as error:
        train(**arguments)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in said if part not in message] == [], message
    assert tree(tmp_path) == before
    return message


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown setting": ({"train.epoch": 3}, ["train.epoch", "did you mean 'train.epochs'?"]),
    "unknown model": ({"model.name": "mlpp"}, ["model.name", "'mlpp'", "did you mean 'mlp'?"]),
    "unknown layer": ({"model.keep-dense": "fc9"}, ["model.keep-dense", "'fc9'", "fc3"]),
    "unknown device": ({"train.device": "gpu"}, ["train.device", "'gpu'", "cpu"]),
    "no such device": ({"train.device": "cuda:97"}, ["train.device", "'cuda:97'"]),
    "a word as fraction": ({"curve.fractions": "1 half"}, ["curve.fractions", "'1 half'"]),
    "limit too large beside validation": ({"data.limit": 1400, "data.validation": 38}, ["data.limit", "1400", "1399"]),
    "validation too large": ({"data.validation": 1437}, ["data.validation", "1437"]),
    "images too small": ({"model.name": "lenet"}, ["model.name", "'lenet'", "8×8"]),
    "no images": ({"model.name": "transformer-small"}, ["model.name", "'transformer-small'"]),
    "missing files": ({"data.name": "mnist", "data.dir": "/no/such/folder"}, ["/no/such/folder"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_the_settings(case: str, tmp_path: Path) -> None:
    overrides, said = MISTAKES[case]
    refused(said, tmp_path, overrides={**QUICK, **overrides}, out=tmp_path / "run")


def test_a_taken_folder(tmp_path: Path, finished: TrainingRun) -> None:
    refused([str(finished.path), "already holds a run", "--resume"], finished.path, overrides=QUICK, out=finished.path)
    (tmp_path / "file").touch()
    refused([str(tmp_path / "file")], tmp_path, overrides=QUICK, out=tmp_path / "file")
    refused([str(tmp_path / "file")], tmp_path, overrides=QUICK, out=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train.lr": 0.1}, ["train.lr", "0.05", "0.1"]),
        ({"seed": 1}, ["seed", "0", "1"]),
        ({"data.limit": 64}, ["data.limit", "320", "64"]),
        ({"model.form": "dense"}, ["model.form", "'lod'", "'dense'"]),
    ],
    ids=str,
)
def test_resumption_with_other_settings(change: dict[str, Any], said: list[str], tmp_path: Path, quick: Train) -> None:
    quick({"train.epochs": 2}, out=tmp_path, observers=[Interrupter(1, 1)])
    refused([str(tmp_path), *said], tmp_path, overrides=change, out=tmp_path, resume=True)


def test_resumption_from_a_damaged_folder(tmp_path: Path, quick: Train) -> None:
    quick({"train.epochs": 2}, out=tmp_path, observers=[Interrupter(1, 1)])
    (file,) = (tmp_path / "checkpoint").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    refused([str(tmp_path / "checkpoint"), "start a new run"], tmp_path, out=tmp_path, resume=True)
    (tmp_path / "config.toml").write_text("[train\n")
    refused(["config.toml", "not valid TOML"], tmp_path, out=tmp_path, resume=True)


def test_resumption_with_other_data(tmp_path: Path, quick: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    quick({"train.epochs": 2}, out=tmp_path, observers=[Interrupter(1, 1)])
    pointer = tmp_path / "checkpoint" / "progress.json"
    progress = json.loads(pointer.read_text())
    del progress["seal"]
    pointer.write_text(json.dumps({**progress, "fingerprint": "of other digits"}))
    refused([str(tmp_path), "other data"], tmp_path, out=tmp_path, resume=True)


# Comparison


@pytest.mark.parametrize("content", [None, "{", '{"series": {}}'], ids=str)
def test_comparison_with_a_folder_without_a_curve(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other/curve.json").write_text(content)
    said = ["--compare", str(tmp_path / "other"), "curve.json"]
    refused(said, tmp_path, overrides=QUICK, out=tmp_path / "run", compare=tmp_path / "other")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the plots show."""
    curves: list[dict[str, Any]] = []
    monkeypatch.setattr(run, "cost_figure", lambda curve, *_, **__: curves.append(curve.to_dict()))
    monkeypatch.setattr(run, "rank_figure", lambda *_, **__: None)
    monkeypatch.setattr(run, "save_figure", lambda *_, **__: None)
    return curves


def test_comparison_with_a_dense_model(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    small = {**QUICK, "train.epochs": 1}
    dense = train(overrides={**small, "model.form": "dense"}, out=tmp_path / "dense")
    ours = train(overrides=small, out=tmp_path / "ours", compare=tmp_path / "dense")
    assert drawn[1]["series"] == {**ours.curve["series"], **dense.curve["series"]}
    assert len(drawn[1]["series"]) == 4
    assert drawn[1]["dense"] == dense.curve["dense"]
    assert ours.curve["dense"] is None
