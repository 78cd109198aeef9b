"""The server's step: pure, and the same from a checkpoint."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmaestro.config.experiment import load_config
from fedmaestro.rounds import storage
from fedmaestro.rounds.cohorts import cut
from fedmaestro.rounds.device import train_cohort
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.rounds.server import (
    Gathering,
    ServerState,
    from_checkpoint,
    opened,
    schedule,
    start,
    step,
    to_checkpoint,
)
from fedmaestro.runs.checkpoint import load_checkpoint, save_checkpoint
from fedmaestro.submodel import State


def environment(**settings: Any) -> Environment:
    small = {"train.rounds": 20, "train.devices-per-round": 5, "train.local-epochs": 1}
    return open_environment(load_config(None, small | settings))


def gathered(env: Environment, server: ServerState, number: int) -> Gathering:
    """What the round's devices bring back, without Flower."""
    server = opened(server, number)
    plan = schedule(env, server, number)
    gathering = Gathering(env, server, plan, number)
    for cohort in cut(plan.groups, lambda cohort: cohort.work * 1e-9, workers=2):
        sent = storage.download(server.plan, server.models, cohort.submodel)
        gathering.receive(cohort, train_cohort(env, server.plan, cohort.tier.tier.name, cohort.devices, sent, number))
    return gathering


def rounds(env: Environment, server: ServerState, numbers: range) -> ServerState:
    for number in numbers:
        server = step(env, opened(server, number), gathered(env, server, number).partials, number)
    return server


def tensors(server: ServerState) -> dict[Any, Tensor]:
    models = {(owner, name): tensor for owner, state in server.models.items() for name, tensor in state.items()}
    return models | {("updates", layer): counts for layer, counts in server.updates.items()}


def equal(left: dict[Any, Tensor], right: dict[Any, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(tensor, right[key]) for key, tensor in left.items())


ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "separate": {"train.strategy": "exclusive", "server.optimizer": "adam"},
    "rolling": {"train.strategy": "fedrolex", "server.optimizer": "momentum"},
    "products": {"train.strategy": "partitioned-product"},
    "own tensors at changing ranks": {
        "train.strategy": "nested",
        "train.per-tier": "bias head",
        "server.optimizer": "momentum",
        "ranks.rule": "learned",
        "ranks.shrink-threshold": 0.5,
        "ranks.shrink-every": 2,
        "ranks.shrink-min-updates": 1,
    },
    "changing ranks": {
        "train.strategy": "nested",
        "server.optimizer": "momentum",
        "ranks.rule": "learned",
        "ranks.shrink-threshold": 0.5,
        "ranks.shrink-every": 2,
        "ranks.shrink-min-updates": 1,
        "train.group-lasso": 0.02,
    },
}


@pytest.mark.parametrize("row", ROWS)
def test_a_state_goes_through_a_checkpoint_unchanged_and_is_not_written_to(row: str, tmp_path: Any) -> None:
    env = environment(**ROWS[row])
    server = rounds(env, start(env), range(1, 3))
    before = deepcopy(tensors(server))
    third = rounds(env, server, range(3, 4))
    assert equal(tensors(server), before)
    assert server.round == 2
    save_checkpoint(tmp_path, to_checkpoint(env, server))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    again = from_checkpoint(env, checkpoint)
    assert equal(tensors(again), before)
    assert equal(tensors(rounds(env, again, range(3, 4))), tensors(third))


def test_a_round_without_devices_changes_nothing() -> None:
    env = environment()
    server = start(env)
    nobody = replace(schedule(env, server, 1), groups=())
    after = step(env, server, Gathering(env, server, nobody, 1).partials, 1)
    assert after.round == 1
    assert equal(tensors(after), tensors(server))


def test_moments_stay_with_the_channels_that_roll() -> None:
    """Momentum of one round is the difference that it made; the next round finds both moved on by one channel."""
    env = environment(**{"train.strategy": "fedrolex", "server.optimizer": "momentum"})
    server = start(env)
    after = rounds(env, server, range(1, 2))
    moved: State = after.memory[None]["optimizer"]["momentum"]
    for name, tensor in after.models[None].items():
        torch.testing.assert_close(server.models[None][name] + moved[name], tensor)
    second = opened(after, 2)
    for state, rolled in (
        (after.models[None], second.models[None]),
        (moved, second.memory[None]["optimizer"]["momentum"]),
    ):
        for name, tensor in storage.advanced(env.plan, dict(state)).items():
            assert torch.equal(rolled[name], tensor)


def test_a_tier_is_served_the_window_that_its_devices_have_just_trained() -> None:
    env = environment(**{"train.strategy": "fedrolex"})
    server = rounds(env, start(env), range(1, 3))
    third = opened(server, 3)
    smallest = env.plan.tiers[-1].serves
    before = storage.download(env.plan, third.models, smallest)
    after = step(env, third, gathered(env, server, 3).partials, 3)
    served = storage.download(env.plan, after.models, smallest)
    # All of its biases have moved but those of units that no example activates.
    moved = ~torch.isclose(served["fc1.bias"], before["fc1.bias"], atol=0, rtol=1e-6)
    assert moved.float().mean() > 0.8
