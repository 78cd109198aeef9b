"""Columns of few holders start with smaller singular values."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.fleet.holders import expected_holders
from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.tiers import assign_tiers, load_tiers
from fedmaestro.models.architecture import Architecture
from fedmaestro.rounds.schedule import schedule_round
from fedmaestro.strategies import SUBMODELS
from fedmaestro.strategies.tail_start import start_tails
from fedmaestro.submodel import State, cut

TIERS = load_tiers("skewed")
ARCHITECTURE = Architecture(name="mlp", input_shape=(1, 8, 8), num_classes=10)


def plan_of(submodel: str = "own", availability: float = 1.0) -> Plan:
    """Availability is the smallest tier's."""
    tiers = (*TIERS[:-1], TIERS[-1].model_copy(update={"availability": availability}))
    return make_plan(ARCHITECTURE, tiers, SUBMODELS[submodel], batch_size=8)


def segments(plan: Plan, holders: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The figure of the last column of every tier, smallest first: columns of a segment have one figure."""
    result = {}
    for layer, figures in holders.items():
        ends = [0, *((tier.serves.size.ranks or {})[layer] for tier in reversed(plan.tiers))]
        parts = [figures[first:last] for first, last in pairwise(ends)]
        assert all(bool((part == part[0]).all()) for part in parts)
        result[layer] = [float(part[0]) for part in parts]
    return result


@pytest.mark.parametrize(
    ("submodel", "availability", "expected"),
    [
        # 100 devices in shares of 60, 25, 10 and 5 %, ten of them in a round.
        ("own", 1.0, [10, 4, 1.5, 0.5]),
        # Only 30 of the 60 small devices can be reached, on average: 40 of 70 hold more than they do.
        ("own", 0.5, [10, 40 / 7, 15 / 7, 5 / 7]),
        ("full", 1.0, [10, 10, 10, 10]),
        # There are five devices that train, all of them the whole model.
        ("capable", 1.0, [5, 5, 5, 5]),
    ],
)
def test_holders_are_the_sampled_devices_that_train_a_column(
    submodel: str, availability: float, expected: list[float]
) -> None:
    plan = plan_of(submodel, availability)
    tier_of = assign_tiers(TIERS, 100, 3)
    for figures in segments(plan, expected_holders(plan, devices_of(tier_of), 10)).values():
        assert figures == pytest.approx(expected)


def devices_of(tier_of: np.ndarray) -> dict[int, int]:
    return dict(enumerate(np.bincount(tier_of).tolist()))


def initial() -> State:
    return ARCHITECTURE.initial_state(0)


def singular_values(state: State, layer: str) -> torch.Tensor:
    return torch.linalg.svdvals(state[f"{layer}.u"].double() @ state[f"{layer}.v"].flatten(1).double())


def test_singular_values_start_at_the_square_of_the_share() -> None:
    plan = plan_of()
    state = initial()
    new = start_tails(state, expected_holders(plan, devices_of(assign_tiers(TIERS, 100, 3)), 10), 4.0)
    for layer in plan.full.size.ranks or {}:
        low, mid, high, flagship = ((tier.serves.size.ranks or {})[layer] for tier in reversed(plan.tiers))
        widths = (low, mid - low, high - mid, flagship - high)
        factors = torch.cat([torch.full((n,), x) for n, x in zip(widths, (1, 1, 0.375**2, 0.125**2), strict=True)])
        before, after = singular_values(state, layer), singular_values(new, layer)
        torch.testing.assert_close(after[: len(factors)], factors * before[: len(factors)], rtol=1e-4, atol=1e-6)
        u, v = new[f"{layer}.u"], new[f"{layer}.v"].flatten(1)
        torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1), rtol=1e-4, atol=1e-6)  # still balanced
    smallest = plan.tiers[-1].serves.shapes
    assert all(torch.equal(x, cut(state, smallest)[name]) for name, x in cut(new, smallest).items())
    assert {name: (x.shape, x.dtype) for name, x in new.items()} == {n: (x.shape, x.dtype) for n, x in state.items()}


@given(st.lists(st.floats(0.01, 20.0), min_size=3, max_size=3), st.floats(0.1, 1e6))
def test_columns_keep_their_order_none_grows_or_vanishes_and_the_most_held_stays(
    holders: list[float], threshold: float
) -> None:
    state = {"a.u": torch.ones(3, 3), "a.v": torch.ones(3, 5, 2, 2)}
    new = start_tails(state, {"a": torch.tensor(sorted(holders, reverse=True), dtype=torch.float64)}, threshold)
    columns, rows = new["a.u"][0], new["a.v"][:, 0, 0, 0]
    assert torch.equal(columns, rows)
    assert columns[0] == 1
    assert bool((columns.diff() <= 0).all())
    assert bool((columns > 0).all())
    assert all(torch.equal(new["a.u"][i], columns) for i in range(3))


@pytest.mark.parametrize(("submodel", "availability"), [("own", 1.0), ("own", 0.3), ("capable", 1.0)])
def test_holders_are_what_the_schedule_draws(submodel: str, availability: float) -> None:
    rounds, devices = 300, 10
    plan = plan_of(submodel, availability)
    tier_of = assign_tiers(TIERS, 100, 3)
    layer, counts = next(iter(plan.full.size.ranks or {})), torch.zeros(plan.full.shapes["fc1.u"][1])
    for server_round in range(1, rounds + 1):
        drawn = schedule_round(
            plan=plan,
            tier_of=tier_of,
            examples=[1] * 100,
            seed=0,
            server_round=server_round,
            devices_per_round=devices,
        )
        for group in drawn.groups:
            counts[: (group.submodel.size.ranks or {})[layer]] += len(group.devices)
    expected = expected_holders(plan, devices_of(tier_of), devices)[layer]
    torch.testing.assert_close(counts.double() / rounds, expected, rtol=0.1, atol=0.1)


def test_without_a_threshold_and_in_layers_of_other_models_nothing_changes() -> None:
    state = initial()
    plan = plan_of()
    holders = expected_holders(plan, devices_of(assign_tiers(TIERS, 100, 3)), 10)
    separate = {f"flagship/{name}": tensor for name, tensor in state.items()}
    for before, new in ((state, start_tails(state, holders, 0.0)), (separate, start_tails(separate, holders, 4.0))):
        assert all(torch.equal(tensor, new[name]) for name, tensor in before.items())
