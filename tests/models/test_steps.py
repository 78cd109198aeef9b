"""Residual networks with fewer blocks, step sizes, and the row that trains them (NeFL)."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import cost
from fedmaestro.fleet.traces import trace_of
from fedmaestro.flower.run import Run
from fedmaestro.models.architecture import Architecture, Size
from fedmaestro.rounds.environment import open_environment
from fedmaestro.runs.model import read_card
from fedmaestro.submodel import cut, load, state_of

Federate = Callable[..., Any]

RESNET = Architecture(name="resnet18", input_shape=(3, 8, 8), num_classes=4, form="dense", scales="blocks")
NARROW = Fraction(1, 16)


def filled(size: Size) -> nn.Module:
    model = RESNET.materialize(size)
    load(model, cut(RESNET.initial_state(0), RESNET.shapes(size)))
    return model.eval()


def test_blocks_that_are_left_out_leave_no_tensor() -> None:
    sizes = [RESNET.shapes(Size(width=NARROW, depth=depth)) for depth in range(5)] + [RESNET.shapes(RESNET.full_size)]
    for small, large in pairwise(sizes):
        assert small.keys() <= large.keys()
        assert [x for x in large if x in small] == list(small)
        assert all(n <= m for x, shape in small.items() for n, m in zip(shape, large[x], strict=True))
    assert {name.split(".")[0] for name in sizes[4]} - {name.split(".")[0] for name in sizes[1]} == {
        "block2b",
        "block3b",
        "block4b",
    }
    assert RESNET.size_at(Fraction(1, 2)) == Size(width=Fraction(1, 2), depth=2)
    assert RESNET.size_at(Fraction(1, 2) + Fraction(1, 100)).depth == 3
    assert RESNET.full_size == Size(width=Fraction(1), depth=4)


def test_it_starts_as_the_plain_network_and_a_step_of_zero_is_a_block_left_out() -> None:
    size, x = Size(width=NARROW, depth=4), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = Architecture(name="resnet18", input_shape=(3, 8, 8), num_classes=4, form="dense")
    reference = plain.materialize(Size(width=NARROW)).eval()
    load(reference, cut(plain.initial_state(0), plain.shapes(Size(width=NARROW))))
    model = filled(size)
    assert torch.equal(model(x), reference(x))
    with torch.no_grad():
        model.get_parameter("block4b.step").zero_()
        # Behind it is a ReLU, which passes on what one has put out already.
        assert torch.equal(model(x), filled(Size(width=NARROW, depth=3))(x))


def test_costs_grow() -> None:
    sizes = [RESNET.size_at(Fraction(1, 16)), RESNET.size_at(Fraction(1, 8)), Size(width=Fraction(1, 8), depth=2)]
    costs = [cost(trace_of(RESNET, size.width, size.depth), {}, batch_size=4) for size in sizes]
    for small, large in pairwise(costs):
        assert small.macs_per_example < large.macs_per_example
        assert small.params < large.params
        assert small.train_memory_bytes < large.train_memory_bytes


def test_own_tensors_are_those_that_the_model_has() -> None:
    nefl = {"train.strategy": "nefl"}
    for model, kinds in (("mlp", "none"), ("cnn", "norm"), ("resnet18", "norm step")):
        env = open_environment(load_config(None, nefl | {"model.name": model}))
        assert env.method.settings["train.per-tier"] == kinds
        own = {name.split(".")[-1] for name in env.plan.setting.own}
        assert own == {"mlp": set(), "cnn": {"weight", "bias"}, "resnet18": {"weight", "bias", "step"}}[model]
    assert "fc.bias" not in env.plan.setting.own
    assert len([name for name in env.plan.setting.own if name.endswith("step")]) == 8
    with pytest.raises(UserError, match="model 'cnn' has no step"):
        open_environment(load_config(None, nefl | {"model.name": "cnn", "train.per-tier": "norm step"}))


def test_tiers_have_steps_of_their_own(federate: Federate) -> None:
    settings = {
        "train.strategy": "nefl",
        "model.name": "resnet18",
        "train.rounds": 1,
        "train.devices-per-round": 3,
        "train.local-epochs": 1,
        "data.devices": 60,
        "train.evaluate-every": 1,
    }
    summary, folder, _ = federate(settings)
    card = read_card(folder.path)
    states = {tier: state_of(Run(folder.path).model(tier)) for tier in ("flagship", "minimal")}
    assert summary["tiers"]["minimal"]["ranks"].keys() == {"width", "depth"}
    assert (card.tiers["flagship"].depth, card.tiers["minimal"].depth) == (4, 2)
    assert "block4b.step" not in states["minimal"]
    steps = [torch.cat([x for name, x in state.items() if name.endswith("step")]) for state in states.values()]
    assert any(not bool((x == 1).all()) for x in steps)
    assert not torch.equal(states["flagship"]["block1a.step"], states["minimal"]["block1a.step"])
