"""Robust rules: Flower's own results on equal sizes, entry by entry on nested ones, and what attackers cannot do."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.strategies.base import AnyAggregation
from fedmaestro.strategies.multi_krum import apportioned
from fedmaestro.submodel import Shapes, State, cut, leading_block

ROBUST = ("norm-clipping", "coordinate-median", "trimmed-mean", "multi-krum")
RANKS = (2, 4, 7)


def rule(name: str, attackers: float = 0.3) -> AnyAggregation:
    return AGGREGATIONS[name].of(lambda _key: attackers)


def shapes(rank: int) -> Shapes:
    return {"fc.u": (5, rank), "fc.v": (rank, 3, 2), "fc.bias": (5,), "scale": ()}


def drawn(rank: int, generator: torch.Generator) -> State:
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(rank).items()}


def aggregated(agg: AnyAggregation, devices: Sequence[State], weights: Sequence[float], old: State) -> State:
    partial = agg.init(old)
    for device, weight in zip(devices, weights, strict=True):
        partial = agg.add(partial, device, weight)
    return agg.finish(partial, old)


@st.composite
def fleets(draw: st.DrawFn, ranks: Sequence[int] = RANKS) -> tuple[list[State], list[float], State]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    sizes = draw(st.lists(st.sampled_from(ranks), min_size=1, max_size=12))
    weights = draw(st.lists(st.integers(1, 500), min_size=len(sizes), max_size=len(sizes)))
    return [drawn(rank, generator) for rank in sizes], [float(x) for x in weights], drawn(max(RANKS), generator)


@pytest.mark.parametrize("name", ["coordinate-median", "trimmed-mean", "multi-krum"])
@given(fleet=fleets(ranks=(7,)), attackers=st.floats(0, 0.49))
def test_on_equal_ranks_a_rule_is_flowers(
    name: str, fleet: tuple[list[State], list[float], State], attackers: float
) -> None:
    devices, weights, old = fleet
    count, assumed = len(devices), int(attackers * len(devices))
    results = [
        ([x.double().numpy() for x in device.values()], int(w)) for device, w in zip(devices, weights, strict=True)
    ]
    flowers = {
        "coordinate-median": lambda: aggregate_median(results),
        "trimmed-mean": lambda: aggregate_trimmed_avg(results, attackers),
        # Flower breaks ties of scores, which two nearest to each other have, by position.
        "multi-krum": lambda: aggregate_krum(results, assumed, count - assumed),
    }
    if name == "multi-krum" and count - assumed - 2 <= 1 < count:
        return
    new = aggregated(rule(name, attackers), devices, weights, old)
    for got, expected in zip(new.values(), flowers[name](), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["coordinate-median", "trimmed-mean"])
@given(fleet=fleets(), attackers=st.floats(0, 0.49))
def test_on_nested_ranks_every_entry_is_that_of_its_holders(
    name: str, fleet: tuple[list[State], list[float], State], attackers: float
) -> None:
    devices, weights, old = fleet
    new = aggregated(rule(name, attackers), devices, weights, old)
    for tensor, before in old.items():
        for index in np.ndindex(*before.shape):
            held = sorted(
                float(device[tensor][index])
                for device in devices
                if all(i < n for i, n in zip(index, device[tensor].shape, strict=True))
            )
            cut_off = int(attackers * len(held)) if name == "trimmed-mean" else (len(held) - 1) // 2
            middle = held[cut_off : len(held) - cut_off]
            expected = sum(middle) / len(middle) if held else float(before[index])
            assert float(new[tensor][index]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(fleet=fleets(), attackers=st.floats(0, 0.49))
def test_multi_krum_chooses_in_each_block(fleet: tuple[list[State], list[float], State], attackers: float) -> None:
    """A block by plain loops: the columns between two ranks; what all devices hold goes with the smallest."""
    devices, weights, old = fleet
    new = aggregated(rule("multi-krum", attackers), devices, weights, old)
    ranks = [device["fc.u"].shape[1] for device in devices]
    edges = sorted({0, *ranks})
    for first, last in itertools.pairwise(edges):
        holders = [i for i, rank in enumerate(ranks) if rank >= last]

        def block(state: State, first: int = first, last: int = last) -> np.ndarray:
            parts = [state["fc.u"][:, first:last], state["fc.v"][first:last]]
            parts += [state["fc.bias"], state["scale"]] if first == 0 else []
            return np.concatenate([x.double().numpy().ravel() for x in parts])

        values = [block(devices[i]) for i in holders]
        assumed = int(attackers * len(holders))
        distances = [[float(((x - y) ** 2).sum()) for y in values] for x in values]
        nearest = max(1, len(holders) - assumed - 2)
        keys = [(sum(sorted(row)[1 : nearest + 1]), sum(row)) for row in distances]
        # Each size loses its share of those assumed, the worst of its own.
        own_ranks = [ranks[i] for i in holders]
        groups = [[i for i, rank in enumerate(own_ranks) if rank == one] for one in sorted({*own_ranks}, reverse=True)]
        chosen = []
        for group, lost in zip(groups, apportioned(assumed, [len(group) for group in groups]), strict=True):
            chosen += sorted(group, key=lambda i: keys[i])[: len(group) - lost]
        share = np.array([weights[holders[i]] for i in chosen])
        expected = np.average(np.stack([values[i] for i in chosen]), axis=0, weights=share)
        np.testing.assert_allclose(block(new), expected, rtol=1e-5, atol=1e-6)
    untouched = leading_block(old["fc.v"], (7, 3, 2))[max(ranks) :]
    assert torch.equal(new["fc.v"][max(ranks) :], untouched)


@given(fleet=fleets())
def test_clipped_updates_are_no_longer_than_the_median(fleet: tuple[list[State], list[float], State]) -> None:
    devices, _, old = fleet
    lengths = []
    for device in devices:
        start = cut(old, {name: tuple(x.shape) for name, x in device.items()})
        moved = np.concatenate([(device[name] - x).double().numpy().ravel() for name, x in start.items()])
        lengths.append(float(np.sqrt((moved**2).mean())))
    # Alone, a device is its own median; as the only one with examples beside the others, it is clipped to theirs.
    threshold = np.median(lengths)
    longest = int(np.argmax(lengths))
    new = aggregated(rule("norm-clipping"), devices, [1e9 if i == longest else 1e-9 for i in range(len(devices))], old)
    start = cut(old, {name: tuple(x.shape) for name, x in devices[longest].items()})
    factor = min(1.0, threshold / lengths[longest])
    for name, x in start.items():
        expected = x + factor * (devices[longest][name] - x)
        got = leading_block(new[name], tuple(x.shape))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["coordinate-median", "trimmed-mean", "multi-krum"])
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), far=st.sampled_from([1e3, -1e6, 1e30]))
def test_attackers_do_not_move_a_model_out_of_what_honest_devices_say(name: str, seed: int, far: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks = [2] * 4 + [4] * 4 + [7] * 10
    honest = [drawn(rank, generator) for rank in ranks]
    attackers = [{n: torch.full_like(x, far) for n, x in honest[i].items()} for i in (0, 5, 9, 10, 11)]
    mixed = attackers + [x for i, x in enumerate(honest) if i not in (0, 5, 9, 10, 11)]
    good = mixed[len(attackers) :]
    new = aggregated(rule(name, 0.34), mixed, [1.0] * len(mixed), drawn(7, generator))
    for tensor, x in new.items():
        low, high = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
        for device in good:
            own = device[tensor]
            for bound, least in ((low, torch.minimum), (high, torch.maximum)):
                block = leading_block(bound, tuple(own.shape))
                block.copy_(least(block, own))
        assert bool((x >= low - 1e-6).all()), tensor
        assert bool((x <= high + 1e-6).all()), tensor


def test_a_mean_is_moved_by_one_attacker() -> None:
    generator = torch.Generator().manual_seed(0)
    devices = [drawn(7, generator) for _ in range(9)]
    attacker = {name: torch.full_like(x, 1e6) for name, x in devices[0].items()}
    new = aggregated(AGGREGATIONS["coverage-mean"], [attacker, *devices], [1.0] * 10, drawn(7, generator))
    assert float(new["fc.bias"].min()) > 1e4


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_take_devices_one_by_one(name: str) -> None:
    assert AGGREGATIONS[name].alone
