"""Sizes of the tiers: exact ranks of the presets, nested whatever the budgets, and what each rule trains."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.fleet.budgets import fit, within_ranks
from fedmaestro.fleet.cost import Cost, cost, trace
from fedmaestro.fleet.plan import Plan, Submodel, make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.tiers import FLEETS, Tier
from fedmaestro.models.architecture import Architecture

IMAGES = {"mlp": (1, 8, 8), "lenet": (1, 28, 28), "cnn": (3, 32, 32), "resnet18": (3, 32, 32)}
FIVE = FLEETS["five-tiers"].tiers
ALL_TIERS = tuple(tier for fleet in FLEETS.values() for tier in fleet.tiers)
WIDTHS = SubmodelRule(form="dense")
SLOW_WIDTHS = pytest.param("resnet18", marks=pytest.mark.slow)
"""Many of its widths are traced with real tensors."""


def architecture(model: str) -> Architecture:
    return Architecture(name=model, input_shape=IMAGES[model], num_classes=10)


@cache
def planned(model: str, rule: SubmodelRule = SubmodelRule()) -> Plan:  # noqa: B008
    """The tiers of all presets in one plan: the parts are independent, and tracing the models takes the time."""
    return make_plan(architecture(model), ALL_TIERS, rule, batch_size=32, slots=True)


def within(small: Submodel, large: Submodel) -> bool:
    """Whether ``small`` is a leading block of ``large``."""
    return all(n <= m for name, shape in small.shapes.items() for n, m in zip(shape, large.shapes[name], strict=True))


@pytest.mark.parametrize("model", IMAGES)
def test_presets_fit_every_model(model: str) -> None:
    plan = planned(model)
    assert sorted(tier.index for tier in plan.tiers) == list(range(len(ALL_TIERS)))
    assert [tier.tier for tier in plan.tiers] == [ALL_TIERS[tier.index] for tier in plan.tiers]


@pytest.mark.parametrize("model", ["mlp", "lenet", "cnn", SLOW_WIDTHS])
def test_presets_fit_every_model_as_widths(model: str) -> None:
    """A width has at most the MACs of the tier's ranks, and the next larger width has more."""
    dense = replace(architecture(model), form="dense")
    widths, by_ranks = planned(model, WIDTHS), planned(model)
    steps = dense.fractions()
    for tier in widths.tiers:
        budget = by_ranks.by_index(tier.index).serves.cost.macs_per_example
        assert not tier.serves.size.ranks
        if tier.tier.width is not None:
            assert dense.shapes(dense.size_at(Fraction(tier.tier.width))) == tier.serves.shapes
            continue
        assert tier.serves.cost.macs_per_example <= budget
        width = tier.serves.size.width
        if width < 1:
            wider = trace(dense.build(dense.size_at(steps[steps.index(width) + 1])), dense.input_shape)
            assert cost(wider, {}, batch_size=32).macs_per_example > budget


@pytest.mark.parametrize("model", IMAGES)
def test_five_tiers_have_their_ranks(model: str) -> None:
    full = lod.max_ranks(architecture(model).full)
    assert full
    for index, divisor in enumerate((1, 2, 4, 8, 16)):
        tier = planned(model).by_index(ALL_TIERS.index(FIVE[index]))
        assert dict(tier.serves.size.ranks) == {name: max(1, rank // divisor) for name, rank in full.items()}


@cache
def lenet_costs() -> tuple[Architecture, dict[Fraction, Cost]]:
    lenet = architecture("lenet")
    traced = trace(lenet.full, lenet.input_shape)
    return lenet, {f: cost(traced, lenet.size_at(f).ranks, batch_size=32) for f in lenet.fractions()}


@st.composite
def lenet_tiers(draw: st.DrawFn) -> Tier:
    """A tier with some budgets, none below the smallest submodel's cost and most of them binding."""
    _, costs = lenet_costs()
    least, most = costs[min(costs)], costs[Fraction(1)]

    def between(low: int, high: int) -> st.SearchStrategy[int | None]:
        return st.none() | st.integers(low, high)

    return Tier(
        name="a",
        share=1,
        rank_fraction=draw(st.none() | st.floats(0.01, 1)),
        macs=draw(between(least.macs_per_example, most.macs_per_example)),
        memory_bytes=draw(between(least.train_memory_bytes, most.train_memory_bytes)),
        round_bytes=draw(between(8 * least.params, 8 * most.params)),
    )


@given(st.lists(lenet_tiers(), min_size=2, max_size=5))
def test_ranks_are_nested_whatever_the_budgets(tiers: list[Tier]) -> None:
    lenet, costs = lenet_costs()
    chains = [within_ranks(tier, list(costs)) for tier in tiers]
    fitted = [fit(tier, c, costs.__getitem__, costs[Fraction(1)]) for tier, c in zip(tiers, chains, strict=True)]
    ranks = [lenet.size_at(fraction).ranks for fraction in fitted]
    ranks.sort(key=lambda r: tuple(r.values()))
    for small, large in pairwise(ranks):
        assert all(small[name] <= large[name] for name in large)


@settings(max_examples=15)
@given(tiers=st.lists(lenet_tiers(), min_size=2, max_size=4).map(tuple))
def test_plan_keeps_every_budget(tiers: tuple[Tier, ...]) -> None:
    plan = make_plan(architecture("lenet"), tiers, SubmodelRule(), batch_size=32)
    for large, small in pairwise(plan.tiers):
        assert within(small.serves, large.serves)
    for planned_tier in plan.tiers:
        tier, figures = tiers[planned_tier.index], planned_tier.serves.cost
        assert figures.macs_per_example <= (tier.macs or figures.macs_per_example)
        assert figures.train_memory_bytes <= (tier.memory_bytes or figures.train_memory_bytes)
        assert figures.download_bytes + figures.upload_bytes <= (tier.round_bytes or 8 * figures.params)


def test_memory_budget_counts_batch_and_momentum() -> None:
    def ranks(batch_size: int, slots: bool) -> int:
        tier = Tier(name="a", share=1, memory_bytes=600_000)
        plan = make_plan(architecture("lenet"), (tier,), SubmodelRule(), batch_size=batch_size, slots=slots)
        return sum(plan.tiers[0].serves.size.ranks.values())

    assert ranks(8, slots=False) > ranks(8, slots=True)
    assert ranks(8, slots=False) > ranks(12, slots=False)


# Rules


def five(rule: SubmodelRule, tiers: tuple[Tier, ...] = FIVE) -> Plan:
    return make_plan(architecture("lenet"), tiers, rule, batch_size=32)


def test_own_trains_what_serves() -> None:
    plan = five(SubmodelRule(trains="own"))
    assert all(tier.trains == tier.serves for tier in plan.tiers)
    assert len({tier.serves.cost.params for tier in plan.tiers}) == 5


def test_smallest_trains_and_serves_the_smallest_everywhere() -> None:
    smallest = five(SubmodelRule()).by_name("minimal").serves
    for tier in five(SubmodelRule(trains="smallest")).tiers:
        assert tier.trains == tier.serves == smallest


def test_full_trains_the_whole_model_and_serves_prefixes() -> None:
    own, plan = five(SubmodelRule()), five(SubmodelRule(trains="full"))
    whole = own.by_name("flagship").serves
    for tier in plan.tiers:
        assert tier.trains == whole
        assert tier.serves == own.by_index(tier.index).serves
    assert whole.shapes == plan.architecture.shapes(plan.architecture.full_size)


def test_full_needs_no_tier_that_affords_it() -> None:
    plan = five(SubmodelRule(trains="full"), FIVE[1:])
    assert {tier.trains.cost.params for tier in plan.tiers if tier.trains} == {
        five(SubmodelRule()).by_name("flagship").serves.cost.params
    }


def test_capable_trains_in_tiers_that_afford_the_whole_model() -> None:
    own, plan = five(SubmodelRule()), five(SubmodelRule(trains="capable"))
    assert [tier.tier.name for tier in plan.tiers if tier.trains] == ["flagship"]
    assert plan.by_name("flagship").trains == own.by_name("flagship").serves
    for tier in plan.tiers:
        assert tier.serves == own.by_index(tier.index).serves


def test_capable_without_such_a_tier() -> None:
    with pytest.raises(UserError, match=r"no tier affords the whole model \(largest fraction 0\.5\)"):
        five(SubmodelRule(trains="capable"), FIVE[1:])


def test_a_tier_that_affords_nothing_is_named() -> None:
    tiers = (*FIVE, Tier(name="watch", share=0.1, memory_bytes=1000))
    with pytest.raises(UserError, match=r"'watch' cannot afford .*memory-bytes 1,000 bytes, needed [\d,]+ \(×"):
        five(SubmodelRule(), tiers)
