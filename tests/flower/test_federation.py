"""The whole round on hosts in this process: traffic, determinism, failures, resume."""

import json
import logging
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from torch import Tensor, nn
from torch.nn import functional

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.extend import given
from fedmaestro.flower import federation
from fedmaestro.flower.arrays import to_arrays, to_state
from fedmaestro.flower.client_app import JOB, SUBMODEL
from fedmaestro.flower.run import Run
from fedmaestro.flower.tiered_strategy import TieredStrategy
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.rounds import device as host
from fedmaestro.rounds.environment import forget, open_environment
from fedmaestro.rounds.server import start
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.model import read_model
from fedmaestro.runs.records import RoundRecord
from fedmaestro.strategies.base import SUMS
from fedmaestro.submodel import shapes_of
from fedmaestro.tasks.task import evaluate

Federate = Callable[..., Any]


def of_type(messages: list[Message], kind: str) -> list[Message]:
    return [message for message in messages if message.metadata.message_type == kind]


def payload_bytes(arrays: ArrayRecord) -> int:
    """The bytes of the tensors, without NumPy's headers."""
    return sum(array.numpy().nbytes for array in arrays.values())


def test_a_device_receives_and_sends_exactly_its_prefix(federate: Federate) -> None:
    """Cohorts of one: tensor bytes on the wire are the closed form's, and the whole message is barely more."""
    _, folder, grid = federate({"train.cohort-size": 1, "train.devices-per-round": 20})
    env = open_environment(load_config(None))
    tiers_seen = set()
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        if message.metadata.message_type != "train":
            continue
        down = message.content.array_records[SUBMODEL]
        up = reply.content.array_records[SUMS]
        job = message.content.config_records[JOB]
        (device,) = job["devices"]
        tier = env.tier(device)
        tiers_seen.add(tier.tier.name)
        assert tier.trains is not None
        assert payload_bytes(down) == tier.trains.cost.download_bytes
        assert payload_bytes(up) == tier.trains.cost.upload_bytes
        assert shapes_of(to_state(down)) == shapes_of(to_state(up)) == tier.trains.shapes
        header_bytes = 128 * len(down)
        assert sum(len(array.data) for array in down.values()) == tier.trains.cost.download_bytes + header_bytes
    assert tiers_seen == {"flagship", "high", "mid", "low", "minimal"}
    trained = folder.read_rounds()[1:]
    sent = of_type(grid.sent, "train")
    assert sum(record.download_bytes for record in trained) == sum(
        payload_bytes(message.content.array_records[SUBMODEL]) for message in sent
    )
    assert sum(record.upload_bytes for record in trained) == sum(
        payload_bytes(reply.content.array_records[SUMS]) for reply in of_type(grid.replies, "train")
    )


def test_number_of_hosts_and_order_of_replies_change_nothing(federate: Federate) -> None:
    first, _, _ = federate(nodes=1)
    second, _, _ = federate(nodes=7)
    assert first["model_sha256"] == second["model_sha256"]


@pytest.mark.parametrize("strategy", ["fedmaestro", "partitioned-product", "product-svd", "heterofl", "exclusive-tier"])
def test_cohort_size_changes_messages_and_not_a_bit_of_the_result(federate: Federate, strategy: str) -> None:
    """A rule of each kind: entries, stacks with and without segments, changed rows, separate models."""
    overrides = {"train.strategy": strategy, "train.devices-per-round": 20, "train.record-bias": True}
    runs = [federate({**overrides, "train.cohort-size": size}) for size in (1, 2, 3, "auto")]
    messages = [len(of_type(grid.sent, "train")) for _, _, grid in runs]
    assert messages[0] == 40
    assert len(set(messages)) > 2
    assert len({summary["model_sha256"] for summary, _, _ in runs}) == 1
    assert len({str(without_time(folder.read_rounds())) for _, folder, _ in runs}) == 1


def test_the_server_weighs_what_a_rule_weighs_by_its_tensors(federate: Federate) -> None:
    """Devices of such a rule are sent one by one: a host's word for a weight is not taken."""
    _, _, grid = federate({"train.strategy": "hetlora", "train.rounds": 1, "train.cohort-size": 5})
    sent = of_type(grid.sent, "train")
    assert len(sent) == 10
    assert all(len(message.content.config_records[JOB]["devices"]) == 1 for message in sent)  # type: ignore[arg-type]
    assert not any("weight" in reply.content.metric_records.get("metrics", {}) for reply in grid.replies)


class Dropping(nn.Module):
    """Draws in every forward pass."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 32), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(functional.dropout(self.body(x.flatten(1)).relu(), 0.5, self.training))
        return out


def test_dropout_is_the_devices_own_whoever_hosts_it(federate: Federate) -> None:
    """It was drawn from the host's generator once, so hosts and cohorts changed the result."""
    overrides = given({"model": Dropping}, None, {"train.devices-per-round": 20})
    sha256s = set()
    for nodes, size in ((1, 1), (3, 2), (2, "auto")):
        torch.manual_seed(nodes)
        summary, _, _ = federate({**overrides, "train.cohort-size": size}, nodes=nodes)
        sha256s.add(summary["model_sha256"])
    assert len(sha256s) == 1


def test_files_of_a_run(federate: Federate) -> None:
    summary, folder, _ = federate()
    names = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert names >= {
        "config.toml",
        "rounds.jsonl",
        "summary.json",
        "model.safetensors",
        "model.json",
        "checkpoint/progress.json",
    }
    lines = [json.loads(line) for line in folder.rounds.read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert set(lines[0]["tiers"]) == set(summary["tiers"])
    assert lines[1]["tiers"] == {}
    assert lines[2]["devices"] == 10
    assert json.loads(folder.summary.read_text()) == summary


def test_model_of_a_tier_scores_what_the_summary_says(federate: Federate) -> None:
    summary, folder, _ = federate({"train.rounds": 4, "train.lr": 0.2})
    env = open_environment(load_config(None))
    for name, tier in summary["tiers"].items():
        result = evaluate(Run(folder.path).model(name), env.task, env.task.split("test"))
        assert result.accuracy == pytest.approx(tier["final_accuracy"])


def without_time(records: list[RoundRecord]) -> list[dict[str, Any]]:
    return [{key: value for key, value in vars(record).items() if key != "wall_seconds"} for record in records]


@pytest.mark.parametrize("lost_round", [1, 2, 4])
def test_interrupted_in_the_middle_of_any_round_and_resumed_gives_the_same_model(
    federate: Federate, lost_round: int
) -> None:
    overrides = {"train.rounds": 4, "train.momentum": 0.5, "train.evaluate-every": 1}
    whole, whole_folder, _ = federate(overrides)
    stop = threading.Event()

    def interrupt(message: Message) -> str | None:
        job = message.content.config_records[JOB]
        if message.metadata.message_type == "train" and job["round"] == lost_round:
            stop.set()
            return "lost"
        return None

    summary, folder, _ = federate(overrides, stop=stop, spoil=interrupt)
    assert summary["interrupted"]
    assert summary["rounds"] == lost_round - 1
    assert folder.summary.exists()

    again, _, grid = federate(overrides, folder=folder.path)
    assert min(m.content.config_records[JOB]["round"] for m in of_type(grid.sent, "train")) == lost_round
    assert again["model_sha256"] == whole["model_sha256"]
    assert without_time(folder.read_rounds()) == without_time(whole_folder.read_rounds())


def test_crash_between_history_and_checkpoint_is_repaired(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = federate({"train.rounds": 3})
    original = federation.save_checkpoint

    def crash(folder: Path, checkpoint: Any) -> None:
        if checkpoint.number == 2:
            raise OSError("disk full")
        original(folder, checkpoint)

    monkeypatch.setattr(federation, "save_checkpoint", crash)
    with pytest.raises(OSError, match="disk full"):
        federate({"train.rounds": 3}, folder=tmp_path / "r")
    monkeypatch.undo()
    again, folder, _ = federate({"train.rounds": 3}, folder=tmp_path / "r")
    assert [record.round for record in folder.read_rounds()] == [0, 1, 2, 3]
    assert again["model_sha256"] == whole["model_sha256"]


def test_devices_that_raise_are_left_out_and_named(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = host.train_device
    calls = iter(range(10_000))

    def every_third_raises(*args: Any, **more: Any) -> float:
        if next(calls) % 3 == 0:
            raise MemoryError("out of memory on the device")
        return original(*args, **more)

    monkeypatch.setattr(host, "train_device", every_third_raises)
    with caplog.at_level(logging.WARNING, "fedmaestro"):
        _, folder, _ = federate({"train.rounds": 1})
    record = folder.read_rounds()[1]
    assert (record.devices, record.failed) == (6, 4)
    assert record.train_loss is not None
    assert math.isfinite(record.train_loss)
    named = re.search(r"round 1: failed: device ([\d, ]+): MemoryError: out of memory", folder.log.read_text())
    assert named is not None
    assert len(named[1].split(", ")) == 4


def test_nan_is_a_failure_and_leaves_the_model_alone(federate: Federate) -> None:
    start, _, _ = federate({"train.rounds": 1, "train.lr": 1e-30})
    broken, folder, _ = federate({"train.rounds": 1, "train.lr": 1e30})
    record = folder.read_rounds()[1]
    assert (record.devices, record.failed, record.train_loss) == (0, 10, None)
    assert "DivergedError" in folder.log.read_text()
    state, _ = read_model(folder.path)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert start["tiers"]["flagship"]["final_accuracy"] == broken["tiers"]["flagship"]["final_accuracy"]


def test_what_a_host_fails_at_is_done_by_another(federate: Federate) -> None:
    failed: set[str] = set()

    def lose_first(message: Message) -> Message | None:
        kind = message.metadata.message_type
        if kind in ("train", "evaluate") and kind not in failed:
            failed.add(kind)
            return Message(Error(code=0, reason="the host died"), reply_to=message)
        return None

    broken, folder, _ = federate(spoil=lose_first)
    assert failed == {"train", "evaluate"}
    assert [record.failed for record in folder.read_rounds()] == [0, 0, 0]
    assert folder.log.read_text().count("(the host died): its message goes to host") == 2
    assert broken["model_sha256"] == federate()[0]["model_sha256"]


def test_a_cohort_that_every_host_fails_at_costs_its_devices_only(federate: Federate) -> None:
    lost: set[int] = set()

    def lose(message: Message) -> Message | None:
        job = message.content.config_records[JOB]
        if message.metadata.message_type == "train" and (not lost or lost & {*job["devices"]}):
            lost.update(job["devices"])
            return Message(Error(code=0, reason="the host died"), reply_to=message)
        return None

    _, folder, grid = federate({"train.rounds": 1}, spoil=lose)
    record = folder.read_rounds()[1]
    assert record.failed == len(lost) > 0
    assert record.devices == 10 - len(lost)
    devices = ", ".join(str(device) for device in sorted(lost))
    assert f"failed: device {devices}: host error: the host died" in folder.log.read_text()
    asked = [
        message for message in of_type(grid.sent, "train") if lost & {*message.content.config_records[JOB]["devices"]}
    ]
    assert len(asked) == 3


def test_hosts_with_other_data_are_refused(federate: Federate) -> None:
    def lie(message: Message) -> Message | None:
        if message.metadata.message_type.startswith("query"):
            record = ConfigRecord({"partition-id": 0, "num-partitions": 2, "fingerprint": "other", "data": "other"})
            return Message(RecordDict({JOB: record}), reply_to=message)
        return None

    with pytest.raises(UserError, match="other data"):
        federate(spoil=lie)


def test_late_replies_count_as_failed(federate: Federate) -> None:
    def lose_training(message: Message) -> str | None:
        return "lost" if message.metadata.message_type == "train" else None

    _, folder, _ = federate({"train.rounds": 1, "train.reply-timeout-seconds": 0.2}, spoil=lose_training)
    assert (folder.read_rounds()[1].devices, folder.read_rounds()[1].failed) == (0, 10)
    assert "no reply" in folder.log.read_text()


def test_a_failed_last_evaluation_does_not_pass_for_the_final_accuracy(federate: Federate) -> None:
    def fail_last(message: Message) -> Message | None:
        job = message.content.config_records[JOB]
        if message.metadata.message_type == "evaluate" and job["round"] == 2:
            return Message(Error(code=0, reason="out of memory"), reply_to=message)
        return None

    summary, _, _ = federate(spoil=fail_last)
    assert summary["rounds"] == 2
    assert {tier["final_round"] for tier in summary["tiers"].values()} == {0}


def test_no_host_left_is_one_clear_error() -> None:
    class Empty:
        def get_node_ids(self) -> list[int]:
            return []

    env = open_environment(load_config(None))
    arrays = to_arrays(env.plan.architecture.initial_state(0))
    with pytest.raises(UserError, match="no host is connected"):
        TieredStrategy(env).configure_train(1, arrays, ConfigRecord(), Empty())  # type: ignore[arg-type]


def test_a_folder_is_refused_while_or_after_another_run_uses_it(federate: Federate, tmp_path: Path) -> None:
    _, folder, _ = federate()
    with pytest.raises(UserError, match="already holds a run"), folder.claim(resume=False):
        pass
    with (
        folder.claim(resume=True),
        pytest.raises(UserError, match="in use by another run"),
        RunFolder(folder.path).claim(resume=True),
    ):
        pass


def test_unfit_hosts_leave_nothing_behind(federate: Federate, tmp_path: Path) -> None:
    def refuse(message: Message) -> Message:
        return Message(Error(code=0, reason="no data here"), reply_to=message)

    with pytest.raises(UserError, match="cannot take part: no data here"):
        federate(spoil=refuse, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_a_fleet_that_changed(federate: Federate, tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("[tiers.a]\nshare = 0.5\n[tiers.b]\nshare = 0.5\nrank-fraction = 0.5\n")
    overrides = {"fleet.file": str(fleet), "train.rounds": 3}
    stop = threading.Event()

    def interrupt(message: Message) -> str | None:
        if message.content.config_records[JOB].get("round") == 2:
            stop.set()
            return "lost"
        return None

    _, folder, _ = federate(overrides, stop=stop, spoil=interrupt)
    fleet.write_text("[tiers.a]\nshare = 0.5\n[tiers.b]\nshare = 0.5\nrank-fraction = 0.25\n")
    forget()  # hosts of another day are other processes
    with pytest.raises(UserError, match="other data or another fleet"):
        federate(overrides, folder=folder.path)


def test_interrupted_before_the_first_round_can_be_started_again(federate: Federate, tmp_path: Path) -> None:
    stop = threading.Event()

    def interrupt(message: Message) -> str | None:
        if message.metadata.message_type == "evaluate":
            stop.set()
            return "lost"
        return None

    with pytest.raises(InterruptedRunError):
        federate(stop=stop, spoil=interrupt, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    again, _, _ = federate(folder=tmp_path / "run")
    assert again["model_sha256"] == federate()[0]["model_sha256"]


def test_flowers_own_loop_runs_the_strategy(federate: Federate) -> None:
    """`TieredStrategy` is a Flower strategy: its pieces work without FedMaestro's loop, with the same result."""
    _, folder, grid = federate({"train.rounds": 1})
    env = open_environment(load_config(None, {"train.rounds": 1, "train.evaluate-every": 2}))
    strategy = TieredStrategy(env)
    arrays = to_arrays(start(env).models[None])
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    ids = grid.push_messages(messages)
    arrays, metrics = strategy.aggregate_train(1, grid.pull_messages(ids))
    assert metrics["devices"] == 10
    state, _ = read_model(folder.path)
    for name, tensor in to_state(arrays).items():
        assert tensor.equal(state[name])
