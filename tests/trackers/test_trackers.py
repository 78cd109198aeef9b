"""Trackers: read back from the stores themselves; none of them ends a run."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmaestro.errors import UserError
from fedmaestro.flower.run import Run
from fedmaestro.runs.records import DeviceRecord, RoundRecord
from fedmaestro.trackers import TRACKERS, JsonLines, MLflow, TensorBoard, Tracker, WandB, scalars, trackers_of

Federate = Callable[..., Any]
OVERRIDES = {"train.rounds": 3, "train.evaluate-every": 1, "data.device-test": 0.2}


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_of_figures() -> None:
    record = RoundRecord(
        round=3,
        tiers={"low": {"rmse": 2.0, "loss": None}},
        train_loss=0.5,
        device_test={"low": {"devices": 4, "mean": 1.5, "std": None, "worst_decile": 3.0}},
    )
    devices = DeviceRecord(round=3, loss={"17": 0.25}, test={"4": {"rmse": 1.0}})
    found = scalars(record, devices)
    assert {name: x for name, x in found.items() if not name.startswith("round/")} == {
        "tier/low/rmse": 2.0,
        "tier/low/device_test/mean": 1.5,
        "tier/low/device_test/worst_decile": 3.0,
        "device/17/train_loss": 0.25,
        "device/4/test/rmse": 1.0,
    }
    assert found["round/train_loss"] == 0.5
    assert "round/tail_energy" not in found


def test_json_lines_of_a_run_and_of_its_continuation(federate: Federate, tmp_path: Path) -> None:
    _, folder, _ = federate(OVERRIDES, observers=[JsonLines(), JsonLines(tmp_path / "there", devices=True)])
    lines = lines_of(folder.path / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    last = folder.read_rounds()[-1]
    assert lines[-1]["tier/low/accuracy"] == last.tiers["low"]["accuracy"]
    assert not any(name.startswith("device/") for name in lines[-1])
    with_devices = lines_of(tmp_path / "there" / "metrics.jsonl")
    assert sum(name.endswith("/train_loss") and name.startswith("device/") for name in with_devices[-1]) == 10
    federate(OVERRIDES, folder=folder.path, observers=[JsonLines()])
    assert [line["round"] for line in lines_of(folder.path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_tensorboard(federate: Federate) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder, _ = federate(OVERRIDES, observers=[TensorBoard()])
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("tier/minimal/accuracy")]
    expected = [(r.round, r.tiers["minimal"]["accuracy"]) for r in folder.read_rounds()]
    assert found == [(number, pytest.approx(value)) for number, value in expected]


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_mlflow(federate: Federate) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    overrides = {**OVERRIDES, "seed": 4}
    _, folder, _ = federate(overrides, observers=[MLflow()])
    for _ in range(2):  # a continuation adds no second value of a round
        client = MlflowClient(tracking_uri=f"sqlite:///{folder.path / 'mlflow.db'}")
        number = (folder.path / "mlflow-run-id").read_text()
        run = client.get_run(number)
        assert run.data.params["seed"] == "4"
        assert run.data.tags["strategy"] == "fedmaestro"
        history = client.get_metric_history(number, "tier/flagship/accuracy")
        assert [metric.step for metric in history] == [0, 1, 2, 3]
        assert run.info.status == "FINISHED"
        federate(overrides, folder=folder.path, observers=[MLflow()])


@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_wandb_offline(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, folder, _ = federate(OVERRIDES, observers=[WandB()])
    assert [*(folder.path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert (folder.path / "wandb-run-id").read_text()


class Failing(Tracker):
    name = "failing"

    def write(self, number: int, figures: dict[str, float]) -> None:
        if number == 1:
            raise OSError("server is gone")
        assert number == 0, "it is left out after that"


def test_a_tracker_that_fails_does_not_end_the_run(federate: Federate, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedmaestro"):
        summary, _, _ = federate(OVERRIDES, observers=[Failing()])
    assert summary["rounds"] == 3
    said = [record.message for record in caplog.records if "tracker" in record.message]
    assert said == ["tracker failing is left out from here on: OSError: server is gone"]


def test_what_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmaestro.trackers import base

    monkeypatch.setattr(base, "find_spec", lambda name: None)
    for name in TRACKERS:
        if name == "jsonl":
            assert trackers_of([name])[0].name == name
        else:
            with pytest.raises(UserError, match=rf"pip install 'fedmaestro\[{name}\]'"):
                trackers_of([name])
    with pytest.raises(UserError, match="--track 'tensorbord'"):
        trackers_of(["tensorbord"])
    with pytest.raises(UserError, match="given twice"):
        trackers_of(["jsonl", "jsonl"])


def test_tables_of_a_run(federate: Federate) -> None:
    summary, folder, _ = federate(OVERRIDES)
    run = Run(folder.path)
    frame = run.to_pandas()
    assert len(frame) == 4 * 5
    assert {"strategy", "seed", "dataset", "model", "round", "tier", "accuracy", "loss", "bytes"} <= {*frame.columns}
    last = frame[frame["round"] == 3].set_index("tier")
    assert last["accuracy"].to_dict() == {name: tier["final_accuracy"] for name, tier in summary["tiers"].items()}
    assert last["bytes"].unique().tolist() == [summary["download_bytes"] + summary["upload_bytes"]]
    devices = run.devices_to_pandas()
    assert devices.groupby("round")["train_loss"].count().to_dict() == {0: 0, 1: 10, 2: 10, 3: 10}
    mean = devices[devices["round"] == 3]["test_accuracy"].mean()
    tested = folder.read_devices()[-1].test
    assert mean == pytest.approx(sum(x["accuracy"] for x in tested.values()) / len(tested))
