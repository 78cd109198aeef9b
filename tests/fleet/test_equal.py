"""Equal budgets by choice: no tier spends more than its ranks would with one pass, and the next larger size would."""

from fractions import Fraction
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.fleet.equal import Quantity, fit_equal, spent
from fedmaestro.fleet.plan import Plan, TierPlan, smaller_levels
from fedmaestro.fleet.rule import OWN_PASS
from fedmaestro.rounds.environment import Environment, open_environment

ROWS = {
    "nested": {"train.strategy": "nested"},
    "one pass": {"train.strategy": "partitioned"},
    "rank and width": {"train.strategy": "nested", "train.submodel": "rank-and-width"},
    "width": {"train.strategy": "fjord-kd"},
    "width, one pass": {"train.strategy": "heterofl"},
}
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def environment(by: str, **settings: Any) -> Environment:
    matched = {"fleet.match-macs": True, "fleet.match-by": by, "data.devices": 10}
    return open_environment(load_config(None, {**matched, **settings}))


def spending(env: Environment, plan: Plan, tier: TierPlan, by: Quantity) -> float:
    assert tier.trains is not None
    levels = [tier.trains.cost, *(x.cost for x in smaller_levels(tier.trains, plan.serving))]
    examples = env.task.examples * env.config.train.local_epochs // len(env.parts)
    return spent(by, tier.tier, levels, env.method.objective.passes, examples)


@pytest.mark.parametrize("by", [by for by in QUANTITIES if by != "macs"])
@pytest.mark.parametrize("row", ROWS)
def test_no_tier_spends_more_than_its_ranks_with_one_pass(row: str, by: Quantity) -> None:
    env = environment(by, **ROWS[row])
    ranks = open_environment(load_config(None, {"train.strategy": "partitioned", "data.devices": 10}))
    smallest = env.plan.tiers[-1].serves
    for tier in env.plan.tiers:
        limit = spending(ranks, ranks.plan, ranks.plan.by_name(tier.tier.name), by)
        # Where the smallest size of the chain is dearer, that is what a tier gets.
        assert spending(env, env.plan, tier, by) <= limit or tier.serves == smallest
    if row == "one pass" and by == "bytes":
        assert [x.serves.size for x in env.plan.tiers] == [x.serves.size for x in ranks.plan.tiers]


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=20).map(sorted),
    limits=st.lists(st.integers(0, 60), min_size=1, max_size=5),
)
def test_the_next_larger_size_would_spend_more(costs: list[int], limits: list[int]) -> None:
    positions = list(range(len(costs)))
    found = fit_equal(
        limits,
        [len(costs)] * len(limits),
        lambda own, smaller: [own, *smaller],  # type: ignore[arg-type, list-item, return-value]
        lambda _, levels: float(costs[levels[0]]),  # type: ignore[call-overload]
    )
    for limit, position in zip(limits, found, strict=True):
        expected = max((i for i in positions if costs[i] <= limit), default=0)
        assert costs[position] == costs[expected]


def test_passes_cost_their_sizes() -> None:
    row = environment("train-macs", **ROWS["nested"])
    plain = environment("train-macs", **ROWS["one pass"])
    for many, one in zip(row.plan.tiers[:-1], plain.plan.tiers[:-1], strict=True):
        assert many.serves.cost.params < one.serves.cost.params
        assert many.step_macs <= one.step_macs
    assert OWN_PASS.expected(3) == [1.0, 0.0, 0.0]


def test_matching_by_something_without_matching_is_refused() -> None:
    with pytest.raises(UserError, match=r"fleet\.match-by=bytes has no effect"):
        open_environment(load_config(None, {"fleet.match-by": "bytes"}))


def test_a_whole_model_is_what_the_largest_tier_affords() -> None:
    env = environment("train-macs", **ROWS["nested"])
    assert env.plan.full == env.plan.tiers[0].serves
    assert Fraction(env.plan.full.cost.params, 1) < env.plan.architecture.full_size.ranks["fc1"] * 1000  # type: ignore[index]
