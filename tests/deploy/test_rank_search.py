"""Costs of deployed models against real ones, the largest model in a budget, and what is said when none fits."""

import math
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro import lod
from fedmaestro.deploy.rank_search import (
    Candidate,
    deployed_cost,
    deployed_weights,
    search,
    uniform,
    within,
    within_latency,
)
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import LayerTrace, Trace, trace

SHAPE = (2, 6, 5)
KEPT = ("3", "8")
"""Layers that stay dense: one convolution, one linear layer."""

Ranks = dict[str, int]


@cache
def net() -> nn.Module:
    """Convolutions and linear layers of both kinds, with and without bias, on the ``meta`` device."""
    with torch.device("meta"):
        dense = nn.Sequential(
            nn.Conv2d(2, 9, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(3, 9),
            nn.ReLU(),
            nn.Conv2d(9, 5, 2),
            nn.Conv2d(5, 8, 1),
            nn.Flatten(),
            nn.Linear(8 * 2 * 2, 7),
            nn.ReLU(),
            nn.Linear(7, 6),
            nn.Linear(6, 11, bias=False),
        )
    return lod.factorize(dense, KEPT)


@cache
def traced() -> Trace:
    return trace(net(), SHAPE)


FULL: Ranks = {"0": 9, "4": 5, "6": 7, "9": 6}
some_ranks = st.fixed_dictionaries({name: st.integers(1, top) for name, top in FULL.items()})
ranks_and_zeros = st.fixed_dictionaries({name: st.integers(0, top) for name, top in FULL.items()})


def real_cost(ranks: Ranks) -> tuple[int, int]:
    return counted(lod.recompose(lod.truncate(net(), ranks)))


def counted(model: nn.Module) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *SHAPE, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@given(some_ranks)
@settings(max_examples=25)
def test_deployed_cost_is_that_of_the_real_model(ranks: Ranks) -> None:
    assert deployed_cost(traced(), ranks) == real_cost(ranks)


@pytest.mark.parametrize(
    "ranks",
    [
        FULL,
        dict.fromkeys(FULL, 1),
        {**FULL, "0": 0},
        {**FULL, "6": 0, "9": 2},
        dict.fromkeys(FULL, 0),
    ],
    ids=str,
)
def test_deployed_cost_at_the_ends(ranks: Ranks) -> None:
    assert deployed_cost(traced(), ranks) == real_cost(ranks)


@given(
    out=st.integers(1, 40),
    inner=st.integers(1, 40),
    dense=st.booleans(),
    data=st.data(),
)
def test_weights_of_a_layer(out: int, inner: int, dense: bool, data: st.DataObject) -> None:
    full = min(out, inner)
    layer = layer_trace(out, inner, max_rank=None if dense else full)
    rank = data.draw(st.integers(0, full))
    expected = out * inner if dense else min(rank * out + rank * inner, out * inner)
    assert deployed_weights(layer, rank) == expected


def layer_trace(out: int, inner: int, *, max_rank: int | None, name: str = "a", positions: int = 1) -> LayerTrace:
    return LayerTrace(name=name, out=out, inner=inner, positions=positions, max_rank=max_rank, input_needs_grad=True)


# Search and uniform ranks


def toy_loss(ranks: Ranks) -> float:
    """Each layer has its own value per column."""
    worth = {"0": 3.0, "4": 0.5, "6": 1.0, "9": 0.1}
    return sum(worth[name] / (1 + rank) for name, rank in ranks.items())


def check_points(points: list[Candidate], start: Ranks, loss: Callable[[Ranks], float]) -> None:
    """What both ways to choose ranks have in common."""
    assert points[0].ranks == start
    for larger, smaller in pairwise(points):
        assert all(smaller.ranks[name] <= rank for name, rank in larger.ranks.items())
        assert smaller.ranks != larger.ranks
        assert smaller.macs <= larger.macs
        assert smaller.params <= larger.params
    for point in points:
        assert point.ranks.keys() == start.keys()
        assert (point.params, point.macs) == deployed_cost(traced(), point.ranks)
        assert point.loss == loss(point.ranks)
    middle = points[len(points) // 2]
    if 0 not in start.values():
        assert (middle.params, middle.macs) == real_cost(middle.ranks)


@given(ranks_and_zeros)
@settings(max_examples=15)
def test_a_search_goes_from_the_start_to_rank_one_in_nested_steps(start: Ranks) -> None:
    points = search(traced(), start, toy_loss)
    check_points(points, start, toy_loss)
    assert points[-1].ranks == {name: min(1, rank) for name, rank in start.items()}


def test_a_search_takes_what_costs_the_least_loss_per_mac() -> None:
    points = search(traced(), FULL, toy_loss)
    for before, after in pairwise(points):
        (changed,) = (name for name in FULL if before.ranks[name] != after.ranks[name])
        price = (after.loss - before.loss) / max(before.macs - after.macs, 1e-9)
        for name in FULL:
            later = [p for p in points if p.ranks[name] < before.ranks[name]]
            if name == changed or not later:
                continue
            other = {**before.ranks, name: later[0].ranks[name]}
            saved = before.macs - deployed_cost(traced(), other)[1]
            assert price <= (toy_loss(other) - before.loss) / max(saved, 1e-9) + 1e-9


@given(ranks_and_zeros, st.integers(1, 12))
@settings(max_examples=15)
def test_uniform_ranks(start: Ranks, count: int) -> None:
    points = uniform(traced(), start, toy_loss, count)
    check_points(points, start, toy_loss)
    expected = []
    for step in range(count, 0, -1):
        ranks = {name: max(rank * step // count, min(rank, 1)) for name, rank in start.items()}
        expected += [ranks] if ranks not in expected else []
    assert [point.ranks for point in points] == expected


# Budgets

budgets = st.just(math.inf) | st.integers(0, 1000)


@st.composite
def descending_points(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(1, 20))
    params, macs = (sorted(draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count)))[::-1] for _ in "ab")
    return [Candidate(ranks={"a": count - i}, params=params[i], macs=macs[i], loss=0.0) for i in range(count)]


@given(descending_points(), budgets, budgets)
def test_within_is_the_first_that_fits(points: list[Candidate], max_macs: float, max_params: float) -> None:
    fitting = [point for point in points if point.macs <= max_macs and point.params <= max_params]
    if fitting:
        assert within(points, max_macs=max_macs, max_params=max_params) is fitting[0]
    else:
        with pytest.raises(UserError):
            within(points, max_macs=max_macs, max_params=max_params)


POINTS = [
    Candidate(ranks={"a": 3}, params=50, macs=9000, loss=0.0),
    Candidate(ranks={"a": 2}, params=20, macs=4000, loss=0.0),
    Candidate(ranks={"a": 1}, params=5, macs=1200, loss=0.0),
]


def test_below_the_smallest_model() -> None:
    with pytest.raises(UserError, match=re.escape("no model fits 1,199 MACs: the smallest one")) as error:
        within(POINTS, max_macs=1199)
    assert str(error.value).endswith("needs 1,200")
    with pytest.raises(UserError, match=re.escape("no model fits 4 parameters: the smallest one")) as error:
        within(POINTS, max_params=4)
    assert str(error.value).endswith("needs 5")
    assert within(POINTS, max_macs=1200, max_params=5) is POINTS[2]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60, unique=True), st.integers(0, 101))
def test_within_latency_is_the_first_that_fits(latencies: list[int], limit: int) -> None:
    by_rank = dict(enumerate(sorted(latencies)))
    points = [Candidate(ranks={"a": rank}, params=1, macs=1, loss=0.0) for rank in sorted(by_rank, reverse=True)]
    measured: list[int] = []

    def measure(point: Candidate) -> float:
        measured.append(point.ranks["a"])
        return by_rank[point.ranks["a"]]

    if min(latencies) > limit:
        with pytest.raises(UserError):
            within_latency(points, limit, measure)
        assert measured == [0]
        return
    point, latency = within_latency(points, limit, measure)
    assert point.ranks["a"] == max(rank for rank, value in by_rank.items() if value <= limit)
    assert latency == by_rank[point.ranks["a"]] <= limit
    assert point.ranks["a"] in measured
    assert len(measured) <= 2 + math.log2(len(points) + 1)


def test_within_latency_never_trusts_a_model_that_it_did_not_measure() -> None:
    """Also when noise turns the order around, the answer was measured and fits."""
    noisy = {8: 5.0, 7: 1.0, 6: 9.0, 5: 1.5, 4: 9.0, 3: 1.0, 2: 0.5, 1: 0.9}
    points = [Candidate(ranks={"a": rank}, params=1, macs=1, loss=0.0) for rank in noisy]
    point, latency = within_latency(points, 2.0, lambda point: noisy[point.ranks["a"]])
    assert latency == noisy[point.ranks["a"]] <= 2.0


def test_below_the_smallest_latency() -> None:
    with pytest.raises(UserError, match=re.escape("no model fits 0.25 ms")) as error:
        within_latency(POINTS, 0.25, lambda _candidate: 0.5)
    assert "takes 0.5 ms on this machine" in str(error.value)
