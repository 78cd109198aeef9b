"""The laws of rows whose submodels are more than leading blocks of all tensors, in whole server steps."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.config.experiment import load_config
from fedmaestro.models.masks import maskable
from fedmaestro.rounds import storage
from fedmaestro.rounds.device import sizes_of
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.rounds.server import ServerState, start, step
from fedmaestro.strategies.base import AnyPartial
from fedmaestro.submodel import State

ROWS = ("depthfl", "scalefl", "nefl", "fiarse")
TIERS = ("flagship", "high", "mid", "low", "minimal")


@cache
def environment(strategy: str) -> Environment:
    return open_environment(load_config(None, {"train.strategy": strategy, "model.name": "cnn"}))


def sent(server: ServerState, tier: str) -> State:
    return storage.download(server.plan, server.models, server.plan.by_name(tier).serves)


def trained(server: ServerState, tier: str, seed: int) -> State:
    """What a device of a tier sends back: everything that it trains has moved."""
    generator, begin = torch.Generator().manual_seed(seed), sent(server, tier)
    masks = server.plan.setting.rule.scales == "entries"
    moved = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in begin.items()}
    return {
        name: torch.where(begin[name] == 0, begin[name], x) if masks and maskable(x.shape) else x
        for name, x in moved.items()
    }


def stepped(env: Environment, server: ServerState, devices: list[tuple[str, State, int]]) -> ServerState:
    rule, sizes = env.method.aggregation, sizes_of(env, server.plan, 1)[None]
    partials: dict[str | None, AnyPartial] = {owner: rule.init(model, sizes) for owner, model in server.models.items()}
    for tier, state, examples in devices:
        for owner in {None, tier} & partials.keys():
            partials[owner] = rule.add(partials[owner], state, examples, start=sent(server, tier))
    return step(env, server, partials, 1)


@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=3)
@given(tiers=st.lists(st.sampled_from(TIERS), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_zero_local_steps_keep_every_tiers_tensors(row: str, tiers: list[str], seed: int) -> None:
    env = environment(row)
    server = stepped(env, start(env), [(x, trained(start(env), x, seed + i), 3) for i, x in enumerate(TIERS)])
    after = stepped(env, server, [(tier, sent(server, tier), 5 + i) for i, tier in enumerate(tiers)])
    for tier in TIERS:
        for name, tensor in sent(after, tier).items():
            assert torch.equal(tensor, sent(server, tier)[name]), (tier, name)


@pytest.mark.parametrize("row", ROWS)
def test_what_nobody_trained_is_bit_identical(row: str) -> None:
    env = environment(row)
    server = start(env)
    own = trained(server, "minimal", 1)
    after = stepped(env, server, [("minimal", own, 7)])
    for name, tensor in server.models[None].items():
        touched = torch.zeros(tensor.shape, dtype=torch.bool)
        if name in own:
            block = tuple(slice(n) for n in own[name].shape)
            touched[block] = own[name] != sent(server, "minimal")[name]
        assert torch.equal(after.models[None][name][~touched], tensor[~touched]), name
        assert not bool(touched.any()) or not torch.equal(after.models[None][name], tensor)


@pytest.mark.parametrize("row", ROWS)
def test_devices_of_one_tier_are_fedavg(row: str) -> None:
    env = environment(row)
    server = start(env)
    states, weights = [trained(server, "mid", seed) for seed in range(3)], (1, 5, 2)
    after = sent_like(stepped(env, server, [("mid", *x) for x in zip(states, weights, strict=True)]), server)
    for name, begin in sent(server, "mid").items():
        mean = sum(w * x[name].double() for w, x in zip(weights, states, strict=True)) / sum(weights)
        held = begin != 0 if maskable(begin.shape) and row == "fiarse" else torch.ones(begin.shape, dtype=torch.bool)
        torch.testing.assert_close(after[name][held].double(), mean[held], rtol=1e-6, atol=1e-6)


def sent_like(after: ServerState, before: ServerState) -> State:
    """The entries of tier ``mid``, those outside of its mask too."""
    shapes = before.plan.by_name("mid").serves.shapes
    shared = {name: after.models[None][name][tuple(slice(n) for n in shape)] for name, shape in shapes.items()}
    return shared | after.models.get("mid", {})


@pytest.mark.parametrize("row", ROWS)
def test_costs_and_tensors_are_monotone_in_the_tier(row: str) -> None:
    plan = environment(row).plan
    tiers = [plan.by_name(name) for name in TIERS]
    for large, small in pairwise(tiers):
        assert small.serves.cost.params <= large.serves.cost.params
        assert small.serves.cost.macs_per_example <= large.serves.cost.macs_per_example
        assert small.serves.cost.train_memory_bytes <= large.serves.cost.train_memory_bytes
        assert small.step_macs <= large.step_macs
        assert small.serves.shapes.keys() <= large.serves.shapes.keys()
