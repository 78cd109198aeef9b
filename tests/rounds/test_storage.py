"""How tiers' models lie in the global state: prefixes, separate models, rolling windows."""

import pytest
import torch
from torch import Tensor

from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.tiers import load_tiers
from fedmaestro.models import InputShape
from fedmaestro.models.architecture import Architecture
from fedmaestro.rounds import storage
from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.submodel import State, load, shapes_of

SHAPES: dict[str, InputShape] = {"mlp": (1, 8, 8), "lenet": (1, 28, 28), "cnn": (3, 32, 32)}


def plan_of(model: str, rule: SubmodelRule) -> Plan:
    architecture = Architecture(name=model, input_shape=SHAPES[model], num_classes=10)
    return make_plan(architecture, load_tiers("five-tiers"), rule, batch_size=16)


def test_separate_models_start_as_prefixes_and_share_nothing() -> None:
    plan = plan_of("mlp", SubmodelRule(separate=True))
    models = storage.stored(plan, plan.architecture.initial_state(0))
    (together,) = storage.stored(plan_of("mlp", SubmodelRule()), plan.architecture.initial_state(0)).values()
    assert list(models) == ["flagship", "high", "mid", "low", "minimal"]
    for tier in (plan.by_name("high"), plan.by_name("low")):
        own = storage.download(plan, models, tier.serves)
        assert shapes_of(own) == tier.serves.shapes
        for name, tensor in own.items():
            assert torch.equal(tensor, together[name][tuple(slice(n) for n in tensor.shape)])
    storage.download(plan, models, plan.by_name("high").serves)["fc1.u"].zero_()
    assert bool(models["flagship"]["fc1.u"].all())


def test_a_mixing_rule_covers_both_factors_when_one_is_sent() -> None:
    state = {"a.u": torch.zeros(3, 2), "a.v": torch.zeros(2, 4), "b.u": torch.zeros(3, 2), "b.v": torch.zeros(2, 4)}
    rule = AGGREGATIONS["reordered"]
    counts = rule.contributors(rule.add(rule.init(state), {"a.u": torch.ones(3, 1)}, 5), state)
    assert {name: float(count.min()) for name, count in counts.items()} == {"a.u": 1, "a.v": 1, "b.u": 0, "b.v": 0}


def function(architecture: Architecture, state: State, images: Tensor) -> Tensor:
    model = architecture.materialize(architecture.full_size)
    load(model, state)
    return model.eval()(images)  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_rolling_keeps_the_whole_function_and_brings_every_channel_to_the_front(model: str) -> None:
    plan = plan_of(model, SubmodelRule(form="dense", rolls=True))
    (state,) = storage.stored(plan, plan.architecture.initial_state(0)).values()
    images = torch.randn(4, *SHAPES[model], generator=torch.Generator().manual_seed(0))
    before = function(plan.architecture, state, images)
    bias = next(name for name, units in storage.rolling_units(plan.architecture).items() if units == (1,))
    first = [float(state[bias][0])]
    rolled = state
    for _ in range(len(state[bias]) - 1):
        rolled = storage.advanced(plan, rolled)
        first.append(float(rolled[bias][0]))
    torch.testing.assert_close(function(plan.architecture, rolled, images), before, rtol=1e-4, atol=1e-5)
    assert first == state[bias].tolist()


def test_rolling_moves_whole_feature_maps_and_neither_pixels_nor_classes() -> None:
    units = storage.rolling_units(Architecture(name="lenet", input_shape=(1, 28, 28), num_classes=10, form="dense"))
    assert units["conv1.weight"] == (1, 0, 0, 0)
    assert units["conv2.weight"] == (1, 1, 0, 0)
    assert units["fc1.weight"] == (1, 16)
    assert units["fc3.weight"] == (0, 1)
    assert units["fc3.bias"] == (0,)
