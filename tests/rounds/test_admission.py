"""Whatever a host replies: it counts as it must, or it does not count, is counted, and the round goes on."""

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message

from fedmaestro.config.experiment import load_config
from fedmaestro.flower.client_app import app, read_device_values, read_score, seconds_of
from fedmaestro.flower.direct_grid import HostCall, LocalGrid
from fedmaestro.flower.identity import identify
from fedmaestro.flower.tiered_strategy import TieredStrategy
from fedmaestro.rounds.admission import Admission
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.failure import KINDS, RejectedError
from fedmaestro.rounds.server import ServerState
from fedmaestro.strategies.tables import AGGREGATIONS
from tests.support.hostile import DEVICE_TESTS, EVALUATION, TRAINING, tampered

SETTINGS: dict[str, Any] = {
    "data.devices": 12,
    "train.devices-per-round": 12,
    "train.local-epochs": 1,
    "train.strategy": "nested",
    "model.name": "mlp",
}
SINGLE, SEVERAL = 1, 3


class Round:
    """The first round of a federation, whose hosts have replied honestly."""

    def __init__(self, aggregation: str, cohort_size: int) -> None:
        config = load_config(None, SETTINGS | {"train.aggregation": aggregation, "train.cohort-size": cohort_size})
        self.env = open_environment(config)
        self.grid = LocalGrid(app)
        strategy, messages = self._messages()
        self.server = replace(strategy.server, round=0)
        host = HostCall(app, 0, 1)
        self.replies = [host(message) for message in messages]
        sizes = [len(message.content.config_records["job"]["devices"]) for message in messages]  # type: ignore[arg-type]
        # The cohort that is attacked: as large as cohorts are under this rule.
        self.attacked = sizes.index(max(sizes))
        self.devices = max(sizes)

    def _messages(self) -> tuple[TieredStrategy, list[Message]]:
        strategy = TieredStrategy(self.env, getattr(self, "server", None))
        messages = strategy.train_messages(1, self.grid)
        for message in messages:
            identify(message)
        return strategy, messages

    def end(self, change: Callable[[Message], Message] = lambda reply: reply) -> tuple[ServerState, dict[str, Any]]:
        """Return the state after the round, and its facts, if one reply is changed."""
        strategy, messages = self._messages()
        for number, (message, reply) in enumerate(zip(messages, self.replies, strict=True)):
            strategy.take(message, change(reply) if number == self.attacked else reply)
        facts = strategy.trained(1)
        return strategy.server, facts


def lost(reply: Message) -> Message:
    return Message(Error(1, "lost"), reply_to=reply)


@pytest.fixture(scope="module")
def rounds() -> Callable[[str, int], tuple[Round, ServerState, ServerState]]:
    """Rounds by aggregation and size of cohorts, with what comes of them with and without the attacked cohort."""
    known: dict[tuple[str, int], tuple[Round, ServerState, ServerState]] = {}

    def get(aggregation: str, size: int) -> tuple[Round, ServerState, ServerState]:
        if (aggregation, size) not in known:
            made = Round(aggregation, size)
            known[aggregation, size] = made, made.end()[0], made.end(lost)[0]
        return known[aggregation, size]

    return get


def same(left: ServerState, right: ServerState) -> bool:
    pairs = [(left.models[owner], right.models[owner]) for owner in left.models]
    return all(torch.equal(mine[name], other[name]) for mine, other in pairs for name in mine)


@pytest.mark.parametrize("size", [SINGLE, SEVERAL])
@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_bad_replies_cost_their_devices_and_nothing_else(
    rounds: Callable[[str, int], Any], aggregation: str, size: int
) -> None:
    made, clean, without = rounds(aggregation, size)
    assert not same(clean, without), "the attacked cohort counts, so the test can tell"
    wrong = []
    for hostile in TRAINING:
        server, facts = made.end(lambda reply, hostile=hostile: tampered(reply, hostile.change))
        expected = {hostile.kind: made.devices} if hostile.kind else {}
        if facts["failed_by"] != expected or not same(server, without if hostile.kind else clean):
            wrong.append((hostile.name, facts["failed_by"], same(server, without)))
    assert not wrong
    assert {hostile.kind for hostile in TRAINING} - {""} <= set(KINDS)
    assert len(TRAINING) >= 70


def test_a_bad_evaluation_is_no_evaluation(federate: Callable[..., Any]) -> None:
    overrides = {"train.rounds": 1, "train.evaluate-every": 1, "data.device-test": 0.2}
    _, _, grid = federate(overrides)
    admission = Admission(open_environment(load_config(None, overrides)))

    def of_task(reply: Message, job: Any) -> None:
        seconds_of(reply)
        admission.score(read_score(reply), job["first"], job["last"])

    def of_devices(reply: Message, job: Any) -> None:
        admission.device_values(read_device_values(reply), job["devices"])

    kinds = 0
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        if message.metadata.message_type != "evaluate":
            continue
        job = message.content.config_records["job"]
        take, changes = (of_devices, DEVICE_TESTS) if "devices" in job else (of_task, EVALUATION)
        take(reply, job)
        for name, change in changes:
            kinds += 1
            try:
                take(tampered(reply, change), job)
            except RejectedError:
                continue
            pytest.fail(f"{name} was let in")
    assert kinds > len(DEVICE_TESTS) + len(EVALUATION), "both kinds came"


def test_a_run_goes_on_without_a_bad_evaluation(federate: Callable[..., Any]) -> None:
    host = HostCall(app, 0, 1)
    change = dict(EVALUATION)["more right than there are"]

    def spoil(message: Message) -> Message | None:
        job: Any = message.content.config_records["job"]
        if message.metadata.message_type == "evaluate" and job["tier"] == "mid":
            return tampered(host(message), change)
        return None

    summary, folder, _ = federate({"train.rounds": 1, "train.evaluate-every": 1}, spoil=spoil)
    assert summary["tiers"]["mid"]["final_accuracy"] is None
    assert summary["tiers"]["high"]["final_accuracy"] is not None
    assert "rejected (malformed): the evaluation has accuracy" in folder.log.read_text()


@pytest.mark.parametrize(
    ("factor", "kind"), [(1.0, None), (1e4, "too-large"), (float("nan"), "not-finite")], ids=["honest", "long", "nan"]
)
def test_control_variates_are_as_long_as_updates_allow(
    federate: Callable[..., Any], factor: float, kind: str | None
) -> None:
    host = HostCall(app, 0, 1)

    def change(content: Any) -> None:
        record = content.array_records["controls"]
        for name in list(record):
            record[name] = Array((factor * record[name].numpy()).astype(np.float32))

    def spoil(message: Message) -> Message | None:
        job: Any = message.content.config_records["job"]
        if message.metadata.message_type == "train" and job["round"] == 3 and factor != 1.0:
            return tampered(host(message), change)
        return None

    settings = {"train.strategy": "scaffold", "train.rounds": 4, "train.evaluate-every": 4, "model.name": "mlp"}
    _, folder, _ = federate(settings, spoil=spoil)
    by_round = [record.failed_by for record in folder.read_rounds()]
    assert by_round == [{}, {}, {}, {kind: 10} if kind else {}, {}]


def test_a_device_that_fails_under_scaffold_costs_itself_only(federate: Callable[..., Any]) -> None:
    """Its control variate was made before it turned out that its update is too long."""
    settings = {
        "train.strategy": "scaffold",
        "train.rounds": 2,
        "model.name": "mlp",
        "train.devices-per-round": 20,
        "fleet.attack": "scale",
        "fleet.attackers": 0.25,
        "fleet.attack-strength": 1e6,
        "train.cohort-size": 4,
    }
    _, folder, _ = federate(settings, nodes=1)
    assert [record.failed_by for record in folder.read_rounds()[1:]] == [{"too-large": 5}] * 2


ODD: tuple[Any, ...] = (0, -1, 1, 2**62, 0.0, -1.0, 1e308, float("nan"), float("inf"), "x", b"x", True, [], [0], [-1.5])


def damage(content: Any, rng: random.Random) -> None:
    """Change something in a reply, whatever it is."""
    kind, record = rng.choice([(k, r) for k, r in content.items() if len(r) or k in ("failures", "probes")])
    if rng.random() < 0.05:
        del content[kind]
        return
    keys = list(record)
    key = rng.choice(keys) if keys else "new"
    what = rng.randrange(4)
    if isinstance(record, ArrayRecord):
        array = record[key] if keys else Array(np.zeros(2))
        if what == 0 and keys:
            del record[key]
        elif what == 1:
            record[f"{key}{rng.choice(('', 'x', '.u'))}"] = Array(np.full((rng.randrange(4),) * rng.randrange(3), 7.0))
        elif what == 2:
            data = bytearray(array.data)
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1))] = bytes([rng.randrange(256)])
            record[key] = Array(array.dtype, array.shape, array.stype, bytes(data))
        else:
            stype, dtype = rng.choice((array.stype, "pickle", "")), rng.choice((array.dtype, "object", "int8", ""))
            record[key] = Array(dtype, array.shape[: rng.randrange(4)], stype, array.data[: rng.randrange(300)])
    elif what == 0 and keys:
        del record[key]
    else:
        value = rng.choice(ODD)
        old = record.get(key)
        if what == 1 and isinstance(old, list) and old:
            value = [*old]
            value[rng.randrange(len(value))] = rng.choice(ODD[:9])
        with contextlib.suppress(TypeError, ValueError):  # Flower's records refuse some of it themselves
            record[key] = value


@pytest.mark.parametrize("aggregation", ["coverage-mean", "partitioned-product", "coordinate-median"])
def test_damaged_replies_end_no_run(rounds: Callable[[str, int], Any], aggregation: str) -> None:
    """At random, and several at once: what is let in is finite, what is not costs its devices (``FUZZ``: more)."""
    made, _, without = rounds(aggregation, SEVERAL)
    rng = random.Random(0)
    rejected = 0
    for number in range(40 * int(os.environ.get("FUZZ", "1"))):

        def change(content: Any) -> None:
            for _ in range(rng.randint(1, 3)):
                if content:
                    damage(content, rng)

        server, facts = made.end(lambda reply: tampered(reply, change))
        lost_now = sum(facts["failed_by"].values())
        assert facts["devices"] + lost_now == 12, number
        assert set(facts["failed_by"]) <= set(KINDS)
        if lost_now == made.devices:
            rejected += 1
            assert same(server, without), number
        for state in server.models.values():
            assert all(bool(torch.isfinite(x).all()) for x in state.values()), number
    assert rejected > 10
