"""Group lasso, shrinking and learned ranks in whole federations on hosts in this process."""

import json
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.flower.arrays import to_state
from fedmaestro.flower.client_app import JOB, SUBMODEL
from fedmaestro.flower.run import Run
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.server import ServerState, from_checkpoint
from fedmaestro.runs.checkpoint import load_checkpoint
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.model import read_model
from fedmaestro.runs.records import RoundRecord
from fedmaestro.strategies.base import SUMS
from fedmaestro.strategies.product_space import with_products
from fedmaestro.submodel import shapes_of
from fedmaestro.tasks.task import evaluate

Federate = Callable[..., Any]

CHANGING = {
    "train.rounds": 6,
    "train.evaluate-every": 2,
    "ranks.shrink-every": 2,
    "ranks.shrink-min-updates": 1,
    "ranks.shrink-threshold": 0.5,
    "train.group-lasso": 0.01,
    "ranks.rule": "learned",
}
"""Strong enough for cuts within six rounds of the demo."""


MOMENTUM = {"server.optimizer": "momentum", "server.momentum": 0.5, "server.reorder-every": "never"}
"""A server optimiser with a memory that no re-ordering clears."""


def jobs(messages: list[Message], kind: str) -> list[dict[str, Any]]:
    return [dict(m.content.config_records[JOB]) for m in messages if m.metadata.message_type == kind]


def state_of(folder: RunFolder, overrides: dict[str, Any]) -> ServerState:
    """What the checkpoint of a run with these settings holds."""
    checkpoint = load_checkpoint(folder.checkpoint)
    assert checkpoint is not None
    return from_checkpoint(open_environment(load_config(None, overrides)), checkpoint)


def without_time(records: list[RoundRecord]) -> list[dict[str, Any]]:
    return [{key: value for key, value in vars(record).items() if key != "wall_seconds"} for record in records]


def test_ranks_become_learned_and_everything_follows_them(federate: Federate) -> None:
    summary, folder, _ = federate(CHANGING)
    records = folder.read_rounds()
    assert [record.round for record in records if record.ranks] == [0, 2, 4], "none after the last round"
    assert [record.round for record in records if record.full_ranks] == [0, 2, 4]
    first, last = records[0], records[4]
    assert set(last.full_ranks.values()) != set(first.full_ranks.values())
    assert all(small <= large for small, large in zip(last.full_ranks.values(), first.full_ranks.values(), strict=True))
    assert list(first.ranks) == list(summary["tiers"])
    assert first.ranks["minimal"] == {"fc1": 4, "fc2": 8}
    fractions = [rank / first.full_ranks[layer] for layer, rank in last.ranks["minimal"].items()]
    assert len(set(fractions)) == 2, "not uniform any more"
    for large, small in pairwise([last.full_ranks, *last.ranks.values()]):
        assert all(1 <= small[layer] <= large[layer] for layer in large)

    state, card = read_model(folder.path)
    assert {layer: state[f"{layer}.v"].shape[0] for layer in last.full_ranks} == last.full_ranks
    assert card.size.ranks == last.full_ranks
    assert {name: size.ranks for name, size in card.tiers.items()} == last.ranks
    assert {name: tier["ranks"] for name, tier in summary["tiers"].items()} == last.ranks
    env = open_environment(load_config(None, CHANGING))
    for name, tier in summary["tiers"].items():
        model = Run(folder.path).model(name)
        assert sum(p.numel() for p in model.parameters()) == tier["params"] == tier["download_bytes"] / 4
        assert tier["macs_per_example"] <= env.plan.by_name(name).serves.cost.macs_per_example
        result = evaluate(model, env.task, env.task.split("test"))
        assert result.accuracy == pytest.approx(tier["final_accuracy"])
    assert shapes_of(Run(folder.path).model()) == shapes_of(state)


def test_bytes_are_those_of_the_shapes_in_every_round(federate: Federate) -> None:
    _, folder, grid = federate({**CHANGING, "train.cohort-size": 1})
    ranks = {record.round: record.ranks for record in folder.read_rounds() if record.ranks}
    down, up = dict.fromkeys(range(7), 0), dict.fromkeys(range(7), 0)
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        if message.metadata.message_type != "train":
            continue
        job = message.content.config_records[JOB]
        sent = to_state(message.content.array_records[SUBMODEL])
        received = to_state(reply.content.array_records[SUMS])
        current = ranks[max(n for n in ranks if n < job["round"])]  # type: ignore[operator]
        assert {x: sent[f"{x}.u"].shape[1] for x in ("fc1", "fc2")} == current[str(job["tier"])]
        down[job["round"]] += 4 * sum(tensor.numel() for tensor in sent.values())  # type: ignore[index]
        up[job["round"]] += 4 * sum(tensor.numel() for tensor in received.values())  # type: ignore[index]
    for record in folder.read_rounds():
        assert (record.download_bytes, record.upload_bytes) == (down[record.round], up[record.round])


def test_messages_carry_ranks_once_they_have_changed(federate: Federate) -> None:
    _, _, grid = federate(CHANGING)
    for job in (*jobs(grid.sent, "train"), *jobs(grid.sent, "evaluate")):
        told = "ranks" in job
        assert told == (job["round"] > 2 or (job["round"] == 2 and "first" in job))
        if told:
            assert len(json.loads(job["ranks"])) == 6
    assert all(len(job["tails"]) == 4 for job in jobs(grid.sent, "train"))


def test_interrupted_and_resumed_gives_the_same_model(federate: Federate) -> None:
    """Before a cut, after one, and between a cut and its evaluation: what was not complete is done again."""
    overrides = {**CHANGING, **MOMENTUM, "train.evaluate-every": 1}
    whole, whole_folder, _ = federate(overrides)
    for lost_round, kind in ((2, "train"), (2, "evaluate"), (4, "train")):
        stop = threading.Event()

        def interrupt(
            message: Message, lost_round: int = lost_round, kind: str = kind, stop: threading.Event = stop
        ) -> str | None:
            job = message.content.config_records[JOB]
            if message.metadata.message_type == kind and job["round"] == lost_round:
                stop.set()
                return "lost"
            return None

        summary, folder, _ = federate(overrides, stop=stop, spoil=interrupt)
        assert summary["rounds"] == lost_round - 1
        for name, tier in summary["tiers"].items():
            assert sum(p.numel() for p in Run(folder.path).model(name).parameters()) == tier["params"]
        again, _, _ = federate(overrides, folder=folder.path)
        assert again["model_sha256"] == whole["model_sha256"], (lost_round, kind)
        assert without_time(folder.read_rounds()) == without_time(whole_folder.read_rounds())
        assert again["tiers"] == whole["tiers"]


def test_the_checkpoint_holds_memory_and_counts_of_the_models_size(federate: Federate) -> None:
    _, folder, _ = federate(CHANGING | MOMENTUM)
    server = state_of(folder, CHANGING | MOMENTUM)
    full = folder.read_rounds()[4].full_ranks
    assert shapes_of(server.memory[None]["optimizer"]["momentum"]) == shapes_of(with_products(server.models[None]))
    assert {layer: len(counts) for layer, counts in server.updates.items()} == full
    for counts in server.updates.values():
        assert int(counts[0]) == 60, "every device holds the first column"
        assert all(int(a) >= int(b) for a, b in pairwise(counts))


def test_columns_that_few_devices_have_trained_stay(federate: Federate) -> None:
    """The same run with a guard that the largest tier's columns cannot pass."""
    _, folder, _ = federate({**CHANGING, "ranks.shrink-min-updates": 1000})
    _, shrunk, _ = federate(CHANGING)
    assert folder.read_rounds()[4].full_ranks == {"fc1": 64, "fc2": 128}
    assert shrunk.read_rounds()[4].full_ranks != {"fc1": 64, "fc2": 128}


# Settings that cannot work


@pytest.mark.parametrize(
    "setting", [{"train.group-lasso": 0.1}, {"ranks.shrink-threshold": 0.1}, {"ranks.rule": "learned"}], ids=str
)
@pytest.mark.parametrize("strategy", ["exclusive", "alternating"])
def test_tiers_that_share_no_trained_factors_are_refused(
    federate: Federate, strategy: str, setting: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"needs tiers that are prefixes of one model .* '{strategy}' are not"):
        federate({**setting, "train.strategy": strategy, "train.rounds": 20}, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.submodel": "separate"}, r"those of train\.submodel='separate' are not"),
        ({"train.strategy": "alternating", "train.submodel": "smallest"}, r"those of strategy 'alternating' are not"),
    ],
    ids=str,
)
def test_the_switch_that_is_in_the_way_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"^server\.tail-start=4\.0 needs .*{named}"):
        open_environment(load_config(None, {**changes, "server.tail-start": 4.0}))
