"""The laws of tensors that belong to tiers: every aggregation rule, in whole server steps."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmaestro.config.experiment import load_config
from fedmaestro.rounds import storage
from fedmaestro.rounds.device import sizes_of
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.rounds.server import ServerState, start, step
from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.strategies.base import AnyPartial
from fedmaestro.submodel import State

ALL = "bias head norm"
MEANS = {"coverage-mean", "masked-mean", "zero-pad", "product-svd", "partitioned-product", "block-product", "reordered"}
"""Rules that average over the devices of one size what is no factor pair, by examples."""


@cache
def environment(rule: str, per_tier: str = ALL, **more: Any) -> Environment:
    settings = {"train.strategy": "partitioned", "train.aggregation": rule, "train.per-tier": per_tier}
    settings |= {"model.name": "cnn"} if "norm" in per_tier else {}
    return open_environment(load_config(None, settings | {k.replace("_", "."): x for k, x in more.items()}))


Devices = Mapping[str, list[tuple[State, int]]]
"""By tier: what each device of it sends, and its examples."""


def stepped(env: Environment, server: ServerState, devices: Devices) -> ServerState:
    """The server's step after these devices' round."""
    rule, plan = env.method.aggregation, server.plan
    sizes = sizes_of(env, plan, 1)[None]
    partials: dict[str | None, AnyPartial] = {owner: rule.init(model, sizes) for owner, model in server.models.items()}
    for tier, sent in devices.items():
        begin = storage.download(plan, server.models, plan.by_name(tier).serves)
        for state, examples in sent:
            for owner in {None, tier} & partials.keys():
                partials[owner] = rule.add(partials[owner], state, examples, start=begin)
    return step(env, server, partials, 1)


def trained(server: ServerState, tier: str, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    begin = storage.download(server.plan, server.models, server.plan.by_name(tier).serves)
    return {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in begin.items()}


def function(server: ServerState, tier: str) -> Tensor:
    plan = server.plan
    model = plan.architecture.materialize(plan.by_name(tier).serves.size)
    model.load_state_dict(storage.download(plan, server.models, plan.by_name(tier).serves))
    images = torch.randn(4, *plan.architecture.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)  # type: ignore[no-any-return]


@st.composite
def rounds(draw: st.DrawFn, server: ServerState) -> Devices:
    tiers = draw(st.lists(st.sampled_from([x.tier.name for x in server.plan.tiers]), min_size=1, max_size=3))
    seeds = iter(range(draw(st.integers(0, 10**6)), 10**9))
    return {
        tier: [(trained(server, tier, next(seeds)), draw(st.integers(1, 500))) for _ in range(draw(st.integers(1, 3)))]
        for tier in tiers
    }


@pytest.mark.parametrize("rule", AGGREGATIONS)
@settings(max_examples=3)
@given(data=st.data())
def test_copies_are_their_tiers_and_the_rest_is_as_without_them(rule: str, data: st.DataObject) -> None:
    env, plain = environment(rule), environment(rule, "none", model_name="cnn")
    server, without = start(env), start(plain)
    devices = data.draw(rounds(server))
    after = stepped(env, server, devices)
    for name, tensor in stepped(plain, without, devices).models[None].items():
        assert torch.equal(after.models[None][name], tensor), name
    for plan in server.plan.tiers:
        tier, own = plan.tier.name, after.models[plan.tier.name]
        assert own.keys() == set(storage.own_shapes(server.plan, plan.serves))
        for name, tensor in own.items():
            if tier not in devices:
                assert torch.equal(tensor, server.models[tier][name]), "nobody trained it"
            elif rule in MEANS:
                values = np.stack([state[name].double().numpy() for state, _ in devices[tier]])
                mean = np.average(values, axis=0, weights=[examples for _, examples in devices[tier]])
                np.testing.assert_allclose(tensor, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["coverage-mean", "masked-mean", "block-product"])
def test_idle_rounds_keep_every_tiers_function(rule: str) -> None:
    env = environment(rule)
    server = start(env)
    names = [x.tier.name for x in server.plan.tiers]
    server = stepped(env, server, {x: [(trained(server, x, seed), 5)] for seed, x in enumerate(names)})
    idle = {x: [(storage.download(server.plan, server.models, server.plan.by_name(x).serves), 3)] for x in names[1:]}
    after = stepped(env, server, idle)
    for tier in names:
        torch.testing.assert_close(function(after, tier), function(server, tier), rtol=1e-3, atol=1e-3)


def test_copies_start_equal_and_serve_their_tier() -> None:
    env = environment("coverage-mean", "bias head")
    server = start(env)
    plain = start(environment("coverage-mean", "none"))
    for plan in server.plan.tiers:
        assert torch.equal(function(server, plan.tier.name), function(plain, plan.tier.name))
    assert set(storage.own_shapes(env.plan, env.plan.full)) == {"fc1.bias", "fc2.bias", "fc3.weight", "fc3.bias"}
    after = stepped(env, server, {"low": [(trained(server, "low", 1), 7)]})
    sent = storage.download(after.plan, after.models, after.plan.by_name("low").serves)
    assert list(sent) == list(after.plan.by_name("low").serves.shapes)
    assert torch.equal(sent["fc3.weight"], after.models["low"]["fc3.weight"])
    other = storage.download(after.plan, after.models, after.plan.by_name("mid").serves)
    assert torch.equal(other["fc3.weight"], server.models["mid"]["fc3.weight"])


def test_a_servers_momentum_is_a_copys_own() -> None:
    """Two rounds of the same difference ``d``: a copy whose tier took part moves by ``d`` and then by ``1.5 d``."""
    env = environment("coverage-mean", "bias", server_optimizer="momentum", server_momentum=0.5)
    server = start(env)
    for seed in (1, 1):
        server = stepped(env, server, {"low": [(trained(server, "low", seed), 7)]})
    begin = start(env)
    difference = trained(begin, "low", 1)["fc1.bias"] - begin.models["low"]["fc1.bias"]
    torch.testing.assert_close(server.models["low"]["fc1.bias"], begin.models["low"]["fc1.bias"] + 2.5 * difference)
    assert torch.equal(server.models["mid"]["fc1.bias"], begin.models["mid"]["fc1.bias"])
    assert set(server.memory["low"]["optimizer"]["momentum"]) == {"fc1.bias", "fc2.bias", "fc3.bias"}
