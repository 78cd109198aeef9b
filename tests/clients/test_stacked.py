"""Devices as one stacked model: what the loop gives, within rounding."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.optimizers import OPTIMIZERS
from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.rounds import stacked
from fedmaestro.rounds.device import resident_prefixes
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.rounds.stacked import best_size, nodes, train_stack, why_not
from fedmaestro.rounds.training import Draws, LocalTraining, train_device
from fedmaestro.rounds.tree import Span
from fedmaestro.submodel import State

Federate = Callable[..., Any]
SETTINGS = LocalTraining(epochs=2, batch_size=16, lr=0.03, momentum=0.0, weight_decay=0.0)
VARIANTS = {
    "plain": SETTINGS,
    "momentum": replace(SETTINGS, momentum=0.8),
    "decay": replace(SETTINGS, weight_decay=0.01),
    "clipped": replace(SETTINGS, clip_norm=0.5),
    "adjusted": replace(SETTINGS, logit_adjustment=1.0),
    "proximal": replace(SETTINGS, proximal=0.5),
    "frozen": replace(SETTINGS, frozen=frozenset({"fc2.v", "fc3.bias"})),
}


@pytest.fixture(scope="module")
def environments() -> dict[str, Environment]:
    uneven = {"data.devices": 12, "data.partition": "quantity", "data.alpha": 2.0}
    return {model: open_environment(load_config(None, {**uneven, "model.name": model})) for model in ("mlp", "cnn")}


def both_ways(
    env: Environment, objective: str, settings: LocalTraining, devices: list[int]
) -> tuple[list[State], list[float], State, list[float]]:
    tier = env.plan.tiers[1]
    assert tier.trains is not None
    prefixes = resident_prefixes(env, env.plan, tier.trains)
    start = env.plan.architecture.initial_state(0)
    start = {name: start[name][tuple(slice(n) for n in shape)].clone() for name, shape in tier.trains.shapes.items()}
    batches = [env.task.plain(env.parts[device]) for device in devices]
    states, losses = [], []
    for device, batch in zip(devices, batches, strict=True):
        losses.append(train_device(prefixes, start, OBJECTIVES[objective], batch, settings, Draws(0, (device,))))
        states.append({name: x.clone() for name, x in prefixes.state.items()})
    draws = [Draws(0, (device,)) for device in devices]
    stack, of_stack = train_stack(prefixes, start, OBJECTIVES[objective], batches, settings, draws)
    for parameter in prefixes.parameters.values():
        parameter.requires_grad_(True)
    return states, losses, stack, of_stack


def check(env: Environment, objective: str, settings: LocalTraining) -> None:
    devices = [0, 3, 4, 7, 11]
    assert len({len(env.parts[device]) for device in devices}) > 2, "of different sizes"
    states, losses, stack, of_stack = both_ways(env, objective, settings, devices)
    assert of_stack == pytest.approx(losses, rel=1e-3)
    for i, state in enumerate(states):
        for name, tensor in state.items():
            torch.testing.assert_close(stack[name][i], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stack_gives_what_the_loop_gives(environments: dict[str, Environment], variant: str) -> None:
    check(environments["mlp"], "own-prefix", VARIANTS[variant])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_under_every_objective(environments: dict[str, Environment], objective: str) -> None:
    """Those that draw a level draw each device's own."""
    check(environments["mlp"], objective, replace(SETTINGS, clip_norm=5.0, logit_adjustment=1.0))


def test_convolutions_become_grouped_ones(environments: dict[str, Environment]) -> None:
    check(environments["cnn"], "mutual-distillation", replace(SETTINGS, epochs=1))


def test_a_run_with_stacks_does_not_depend_on_hosts_and_cohorts(federate: Federate) -> None:
    settings = {"train.stack": 4, "train.devices-per-round": 20, "data.devices": 40}
    runs = [
        federate({**settings, "train.cohort-size": size}, nodes=nodes) for size, nodes in (("auto", 1), (4, 3), (9, 2))
    ]
    assert len({summary["model_sha256"] for summary, _, _ in runs}) == 1
    alone, _, _ = federate({**settings, "train.stack": 1})
    assert alone["mean_tier_accuracy"] == pytest.approx(runs[0][0]["mean_tier_accuracy"], abs=0.02)
    assert runs[0][0]["failed"] == 0


def test_a_device_that_diverges_fails_alone(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmaestro.rounds import device as host

    original = host.train_stack

    def spoilt(*args: Any, **more: Any) -> Any:
        states, losses = original(*args, **more)
        next(iter(states.values()))[0].view(-1)[0] = float("nan")
        return states, losses

    monkeypatch.setattr(host, "train_stack", spoilt)
    summary, folder, _ = federate({"train.stack": 8, "train.devices-per-round": 20})
    trained = [record for record in folder.read_rounds() if record.round]
    assert 0 < summary["failed"] < sum(record.devices for record in trained)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"train.optimizer": "adam"}, "optimiser 'adam' keeps a state of its own"),
        ({"train.group-lasso": 0.01}, "the group lasso is a term of each model"),
        ({"train.correction": "scaffold", "train.strategy": "nested"}, "control variates correct each device's steps"),
    ],
)
def test_what_cannot_be_stacked_is_trained_one_by_one_and_said(
    federate: Federate, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], reason: str
) -> None:
    stacked._said.clear()
    with caplog.at_level(logging.WARNING, "fedmaestro"):
        together, _, _ = federate({**settings, "train.stack": 8})
    said = [record.getMessage() for record in caplog.records if "train.stack" in record.getMessage()]
    assert said == [f"train.stack: devices are trained one by one: {reason}"]
    alone, _, _ = federate(settings)
    assert together["model_sha256"] == alone["model_sha256"]


def test_an_objective_that_does_not_say_what_it_draws_is_not_stacked(environments: dict[str, Environment]) -> None:
    env = environments["mlp"]
    trains = env.plan.tiers[0].trains
    assert trains is not None
    prefixes = resident_prefixes(env, env.plan, trains)
    unknown = replace(OBJECTIVES["own-prefix"], choices=None)
    assert "Objective.choices" in (why_not(prefixes, unknown, SETTINGS, None) or "")
    assert why_not(prefixes, OBJECTIVES["own-prefix"], SETTINGS, None) is None
    assert "keeps a state" in (
        why_not(prefixes, OBJECTIVES["own-prefix"], replace(SETTINGS, optimizer=OPTIMIZERS["adam"]), None) or ""
    )
    dropping = replace(prefixes, model=nn.Sequential(nn.Dropout(0.5)))
    assert "draws" in (why_not(dropping, OBJECTIVES["own-prefix"], SETTINGS, None) or "")


def test_auto_measures_once_and_a_checkpoint_keeps_it(federate: Federate) -> None:
    from fedmaestro.runs.checkpoint import load_checkpoint

    summary, folder, _ = federate({"train.stack": "auto"})
    checkpoint = load_checkpoint(folder.checkpoint)
    assert checkpoint is not None
    assert checkpoint.facts["stack"] in (1, *stacked.SIZES)
    assert summary["failed"] == 0


def test_the_fastest_stack_is_taken() -> None:
    slow = {1: 1, 8: 20, 32: 8}

    def work(size: int) -> None:
        total = 0
        for i in range(20_000 * slow[size]):
            total += i

    assert best_size(lambda: work(1), work) == 32
    slow[32] = slow[8] = 100
    assert best_size(lambda: work(1), work) == 1

    def broken(_: int) -> None:
        raise RuntimeError("no batching rule")

    assert best_size(lambda: work(1), broken) == 1


def test_stacks_are_nodes_of_the_tree() -> None:
    assert [len(node) for node in nodes(Span(0, 20), 4)] == [3, 2, 3, 2, 3, 2, 3, 2]
    assert list(nodes(Span(0, 3), 4)) == [Span(0, 3)]


def test_cohorts_cannot_be_smaller_than_a_stack() -> None:
    with pytest.raises(UserError, match=r"train\.cohort-size=2 is below train\.stack=8"):
        load_config(None, {"train.cohort-size": 2, "train.stack": 8})


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(environments: dict[str, Environment]) -> None:
    env = environments["mlp"]
    devices = [0, 3, 4]
    mixed = replace(SETTINGS, mixed=True, epochs=1)
    states, losses, _, of_stack = both_ways(env, "own-prefix", mixed, devices)
    exact, exact_losses, _, _ = both_ways(env, "own-prefix", replace(SETTINGS, epochs=1), devices)
    assert losses == pytest.approx(exact_losses, rel=0.02)
    assert losses != exact_losses
    assert of_stack == pytest.approx(losses, rel=0.02)
    for state, other in zip(states, exact, strict=True):
        for name, tensor in state.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, other[name], rtol=0.1, atol=0.1)
