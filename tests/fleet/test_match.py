"""Rank and width submodels of equal MACs."""

from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.fleet.cost import LayerTrace, Trace
from fedmaestro.fleet.match import TOLERANCE, ranks_of_macs
from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.tiers import load_tiers
from fedmaestro.models import InputShape
from fedmaestro.models.architecture import Architecture

MODELS: dict[str, InputShape] = {"mlp": (1, 8, 8), "lenet": (1, 28, 28), "cnn": (3, 32, 32)}


def planned(model: str, fleet: str, rule: SubmodelRule) -> Plan:
    architecture = Architecture(name=model, input_shape=MODELS[model], num_classes=10, keep_dense="head")
    return make_plan(architecture, load_tiers(fleet), rule, batch_size=32, match_macs=True)


@pytest.mark.parametrize("fleet", ["five-tiers", "skewed"])
@pytest.mark.parametrize("model", MODELS)
def test_ranks_and_widths_cost_the_same_and_tiers_stay_distinct_and_nested(model: str, fleet: str) -> None:
    ranks, widths = (planned(model, fleet, SubmodelRule(form=form)) for form in ("lod", "dense"))
    for ranked, wide in zip(ranks.tiers, widths.tiers, strict=True):
        assert ranked.tier.name == wide.tier.name
        assert ranked.serves.cost.macs_per_example == pytest.approx(wide.serves.cost.macs_per_example, rel=TOLERANCE)
    assert len({tier.serves.cost.params for tier in ranks.tiers}) == len(ranks.tiers)
    for larger, smaller in zip(ranks.tiers, ranks.tiers[1:], strict=False):
        of_larger, of_smaller = larger.serves.size.ranks, smaller.serves.size.ranks
        assert of_larger is not None
        assert of_smaller is not None
        assert all(of_smaller[layer] <= of_larger[layer] for layer in of_larger)
    assert ranks.full is ranks.tiers[0].serves, "what nobody can afford is no part of a matched model"


@pytest.mark.parametrize("form", ["lod", "dense"])
def test_capable_devices_of_a_matched_plan_are_those_of_the_largest_tier(form: Literal["lod", "dense"]) -> None:
    plan = planned("lenet", "five-tiers", SubmodelRule(form=form, trains="capable"))
    assert [tier.tier.name for tier in plan.tiers if tier.trains is not None] == ["flagship"]


def test_tiers_that_are_given_by_widths_keep_them_as_far_as_ranks_can_match_them() -> None:
    plan = planned("lenet", "five-widths", SubmodelRule(form="dense"))
    assert [tier.serves.size.width for tier in plan.tiers[:3]] == [Fraction(1, 2**i) for i in range(3)]


def layer(name: str, rank: int, price: int) -> LayerTrace:
    """A layer of which one column costs ``price`` MACs."""
    return LayerTrace(name=name, out=price - 1, inner=1, positions=1, max_rank=rank, input_needs_grad=True)


@given(
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    prices=st.lists(st.integers(2, 50), min_size=3, max_size=3),
    target=st.integers(0, 2000),
    data=st.data(),
)
def test_ranks_use_the_macs_up_and_never_exceed_them(
    ranks: list[int], prices: list[int], target: int, data: st.DataObject
) -> None:
    layers = tuple(layer(str(i), rank, price) for i, (rank, price) in enumerate(zip(ranks, prices, strict=False)))
    traced = Trace(layers=layers, fixed_params=0, fixed_activation_bytes=0)
    least = {x.name: data.draw(st.integers(1, x.max_rank or 1)) for x in layers}
    found = ranks_of_macs(traced, target, least)
    used = sum(x.macs(found[x.name]) for x in layers)
    assert all(least[x.name] <= found[x.name] <= (x.max_rank or 0) for x in layers)
    assert used <= max(target, sum(x.macs(least[x.name]) for x in layers))
    if used <= target:
        assert all(found[x.name] == x.max_rank or x.macs(1) > target - used for x in layers), "a column would have fit"
