"""The laws of aggregation: every strategy × layer kind × tier structure.

A new strategy is one row of ``KEEPS``: the laws that its aggregation keeps. What a row leaves out must really be broken
(``test_a_law_that_is_not_listed_is_broken``), so a row is a statement in both directions.

Shapes: ``O`` out, ``I`` in, ``R`` full rank, ``r`` prefix, ``k×l`` kernel.
"""
# ruff: noqa: N803 (O, I, R, k, l are the shape letters)

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmaestro import lod
from fedmaestro.strategies import STRATEGIES
from fedmaestro.strategies.base import Aggregation, Partial
from fedmaestro.submodel import Shapes, State, cut, shapes_of

ALL_LAWS = (
    "idle rounds keep the state",
    "idle rounds keep every tier's function",
    "equal sizes are FedAvg",
    "what nobody trained is kept",
    "order and split do not matter",
    "a fixed merge order fixes the bits",
    "merging with an empty partial changes nothing",
    "inputs are not modified",
    "an empty round keeps the state",
    "names, shapes and types are kept, memory is new",
)
BROKEN_BY_PADDING = {
    "idle rounds keep the state",
    "idle rounds keep every tier's function",
    "what nobody trained is kept",
}

KEEPS: dict[str, set[str]] = {
    "nested": set(ALL_LAWS),
    "zero-pad": set(ALL_LAWS) - BROKEN_BY_PADDING,
    "fedavg-small": set(ALL_LAWS),
    "fedavg-full": set(ALL_LAWS),
    "capable-only": set(ALL_LAWS),
    "heterofl": set(ALL_LAWS),
}


# ---------------------------------------------------------------- what a law is tried on


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A layer: the shapes of its state at size ``r`` of ``R``, and its weight matrix (its function)."""

    shapes: Callable[[int, int], Shapes]
    """``(r, R)``; every dimension that depends on ``r`` is a leading block of that at ``R``."""
    matrix: Callable[[State], Tensor]


def _linear_shapes(r: int, R: int) -> Shapes:
    return {"layer.u": (R + 3, r), "layer.v": (r, R + 1), "layer.bias": (R + 3,)}


def _conv_shapes(r: int, R: int) -> Shapes:
    return {"layer.u": (R, r), "layer.v": (r, R + 1, 3, 2), "layer.bias": (R,)}


def _dense_shapes(r: int, R: int) -> Shapes:
    return {"layer.weight": (r + 2, 2 * r), "layer.bias": (r + 2,)}


def _pair_matrix(state: State) -> Tensor:
    return state["layer.u"].double() @ state["layer.v"].flatten(1).double()


KINDS = {
    "linear pair": Kind(shapes=_linear_shapes, matrix=_pair_matrix),
    "conv pair": Kind(shapes=_conv_shapes, matrix=_pair_matrix),
    "dense": Kind(shapes=_dense_shapes, matrix=lambda state: state["layer.weight"].double()),
}

SIZES = st.integers(1, 8)
TIERS: dict[str, Callable[[int], st.SearchStrategy[list[int]]]] = {
    "all full": lambda R: st.lists(st.just(R), min_size=1, max_size=4),
    "all equal": lambda R: st.integers(1, R).flatmap(lambda r: st.lists(st.just(r), min_size=1, max_size=4)),
    "mixed, someone full": lambda R: st.lists(st.integers(1, R), max_size=5).map(lambda sizes: [*sizes, R]),
    "mixed, tail untrained": lambda R: st.lists(st.integers(1, max(1, R - 1)), min_size=1, max_size=5),
}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One round: the global state, and a trained submodel with its examples per device."""

    kind: Kind
    full_size: int
    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    seed: int = 0

    @property
    def state(self) -> State:
        return normal_state(self.kind.shapes(self.full_size, self.full_size), self.seed)

    @property
    def submodels(self) -> list[State]:
        """Devices trained: any values."""
        shapes = [self.kind.shapes(size, self.full_size) for size in self.sizes]
        return [normal_state(s, 1000 + 100 * self.seed + k) for k, s in enumerate(shapes)]

    @property
    def idle(self) -> list[State]:
        """Devices did nothing: views of the global state."""
        return [cut(self.state, self.kind.shapes(size, self.full_size)) for size in self.sizes]


@st.composite
def federations(draw: st.DrawFn, kind: str, tiers: str) -> Federation:
    R = draw(SIZES, label="R")
    sizes = draw(TIERS[tiers](R), label="sizes")
    weights = draw(st.lists(st.integers(1, 5000), min_size=len(sizes), max_size=len(sizes)), label="weights")
    return Federation(
        kind=KINDS[kind], full_size=R, sizes=tuple(sizes), weights=tuple(weights), seed=draw(st.integers(0, 50))
    )


def normal_state(shapes: Shapes, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def aggregate(agg: Aggregation, state: State, submodels: list[State], weights: tuple[int, ...]) -> State:
    return agg.finish(partial_of(agg, state, submodels, weights), state)


def partial_of(agg: Aggregation, state: State, submodels: list[State], weights: tuple[int, ...]) -> Partial:
    partial = agg.init(state)
    for submodel, weight in zip(submodels, weights, strict=True):
        partial = agg.add(partial, submodel, weight)
    return partial


def assert_equal(actual: State, expected: State) -> None:
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def assert_equal_partials(actual: Partial, expected: Partial) -> None:
    assert actual.keys() == expected.keys()
    for key, block in actual.items():
        assert block.weight == expected[key].weight
        assert_equal(block.sums, expected[key].sums)


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def copied_partial(partial: Partial) -> Partial:
    return {key: type(block)(copied(block.sums), block.weight) for key, block in partial.items()}


# ---------------------------------------------------------------- the laws


def idle_state(agg: Aggregation, fed: Federation) -> None:
    assert_equal(aggregate(agg, fed.state, fed.idle, fed.weights), fed.state)


def idle_functions(agg: Aggregation, fed: Federation) -> None:
    new = aggregate(agg, fed.state, fed.idle, fed.weights)
    for size in {*fed.sizes, fed.full_size}:
        shapes = fed.kind.shapes(size, fed.full_size)
        before, after = (cut(state, shapes) for state in (fed.state, new))
        torch.testing.assert_close(fed.kind.matrix(after), fed.kind.matrix(before), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after["layer.bias"], before["layer.bias"], rtol=1e-5, atol=1e-5)


def equal_sizes_are_fedavg(agg: Aggregation, fed: Federation) -> None:
    size = fed.sizes[0]
    same = Federation(
        kind=fed.kind, full_size=fed.full_size, sizes=(size,) * len(fed.sizes), weights=fed.weights, seed=fed.seed
    )
    new = cut(aggregate(agg, same.state, same.submodels, same.weights), fed.kind.shapes(size, fed.full_size))
    for name, tensor in new.items():
        stack = np.stack([submodel[name].numpy().astype(np.float64) for submodel in same.submodels])
        np.testing.assert_allclose(tensor, np.average(stack, axis=0, weights=fed.weights), rtol=1e-6, atol=1e-7)


def untrained_is_kept(agg: Aggregation, fed: Federation) -> None:
    state = fed.state
    new = aggregate(agg, state, fed.submodels, fed.weights)
    for name, tensor in state.items():
        trained = torch.zeros(tensor.shape, dtype=torch.bool)
        for submodel in fed.submodels:
            trained[tuple(slice(n) for n in submodel[name].shape)] = True
        assert new[name][~trained].numpy().tobytes() == tensor[~trained].numpy().tobytes(), name


def order_and_split(agg: Aggregation, fed: Federation) -> None:
    state, submodels, weights = fed.state, fed.submodels, fed.weights
    whole = partial_of(agg, state, submodels, weights)
    order = np.random.default_rng(fed.seed).permutation(len(submodels))
    cohorts = np.array_split(order, 3)
    parts = [partial_of(agg, state, [submodels[i] for i in c], tuple(weights[i] for i in c)) for c in cohorts]
    left = agg.merge(agg.merge(parts[0], parts[1]), parts[2])
    right = agg.merge(parts[2], agg.merge(parts[1], parts[0]))
    for other in (left, right):
        assert other.keys() == whole.keys()
        for key, block in other.items():
            assert block.weight == whole[key].weight
            for name, total in block.sums.items():
                assert total.dtype == torch.float64
                torch.testing.assert_close(total, whole[key].sums[name], rtol=1e-13, atol=1e-10)
        for name, tensor in agg.finish(other, state).items():
            torch.testing.assert_close(tensor, agg.finish(whole, state)[name], rtol=3e-7, atol=1e-9)


def fixed_order(agg: Aggregation, fed: Federation) -> None:
    """Cohorts are made in any order on any host; the server merges them in one order."""
    state, submodels, weights = fed.state, fed.submodels, fed.weights
    cohorts = np.array_split(np.arange(len(submodels)), 3)

    def merged(made_in: list[int]) -> State:
        parts: dict[int, Partial] = {}
        for i in made_in:
            members = cohorts[i]
            parts[i] = partial_of(agg, state, [submodels[k] for k in members], tuple(weights[k] for k in members))
        return agg.finish(reduce(agg.merge, [parts[i] for i in sorted(parts)], agg.init(state)), state)

    assert_equal(merged([0, 1, 2]), merged([2, 0, 1]))
    assert_equal(merged([0, 1, 2]), aggregate(agg, state, submodels, weights))


def empty_partial(agg: Aggregation, fed: Federation) -> None:
    partial = partial_of(agg, fed.state, fed.submodels, fed.weights)
    assert_equal_partials(agg.merge(partial, agg.init(fed.state)), partial)
    assert_equal_partials(agg.merge(agg.init(fed.state), partial), partial)


def purity(agg: Aggregation, fed: Federation) -> None:
    state, submodels = fed.state, fed.submodels
    left = partial_of(agg, state, submodels[:1], fed.weights[:1])
    right = partial_of(agg, state, submodels, fed.weights)
    before = copied_partial(left), copied_partial(right), copied(state), copied(submodels[0])
    agg.add(left, submodels[0], 7)
    agg.finish(agg.merge(left, right), state)
    agg.finish(left, state)
    assert_equal_partials(left, before[0])
    assert_equal_partials(right, before[1])
    assert_equal(state, before[2])
    assert_equal(submodels[0], before[3])


def empty_round(agg: Aggregation, fed: Federation) -> None:
    assert_equal(agg.finish(agg.init(fed.state), fed.state), fed.state)


def outputs(agg: Aggregation, fed: Federation) -> None:
    for dtype in (torch.float32, torch.float64):
        state = {name: tensor.to(dtype) for name, tensor in fed.state.items()}
        submodels = [{name: tensor.to(dtype) for name, tensor in submodel.items()} for submodel in fed.submodels]
        before = copied(state), [copied(submodel) for submodel in submodels]
        for new in (aggregate(agg, state, submodels, fed.weights), agg.finish(agg.init(state), state)):
            assert list(new) == list(state)
            assert shapes_of(new) == shapes_of(state)
            assert {tensor.dtype for tensor in new.values()} == {dtype}
            for tensor in new.values():
                tensor.zero_()
        assert_equal(state, before[0])
        for submodel, untouched in zip(submodels, before[1], strict=True):
            assert_equal(submodel, untouched)


CHECKS: tuple[Callable[[Aggregation, Federation], None], ...] = (
    idle_state,
    idle_functions,
    equal_sizes_are_fedavg,
    untrained_is_kept,
    order_and_split,
    fixed_order,
    empty_partial,
    purity,
    empty_round,
    outputs,
)
LAWS = dict(zip(ALL_LAWS, CHECKS, strict=True))


# ---------------------------------------------------------------- the matrix


def test_every_strategy_has_a_row() -> None:
    assert KEEPS.keys() == STRATEGIES.keys()
    assert all(kept <= LAWS.keys() for kept in KEEPS.values())


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", KEEPS)
@settings(max_examples=5)
@given(data=st.data())
def test_a_strategy_keeps_its_laws(strategy: str, kind: str, tiers: str, data: st.DataObject) -> None:
    fed = data.draw(federations(kind, tiers))
    for law in sorted(KEEPS[strategy]):
        LAWS[law](STRATEGIES[strategy].aggregation, fed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "law"), [(strategy, law) for strategy in KEEPS for law in ALL_LAWS if law not in KEEPS[strategy]]
)
def test_a_law_that_is_not_listed_is_broken(strategy: str, law: str, kind: str) -> None:
    fed = Federation(kind=KINDS[kind], full_size=6, sizes=(1, 2, 2, 4), weights=(30, 10, 20, 40))
    with pytest.raises(AssertionError):
        LAWS[law](STRATEGIES[strategy].aggregation, fed)


# ---------------------------------------------------------------- the checks themselves


def broken(finish: Callable[[Partial, State], State]) -> Aggregation:
    return Aggregation(finish=finish, summary="", source="")  # type: ignore[arg-type]


def _returns_its_input(partial: Partial, state: State) -> State:
    return dict(state)


def _writes_into_its_input(partial: Partial, state: State) -> State:
    return {name: tensor.add_(1.0) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("law", "finish"),
    [
        ("idle rounds keep the state", _writes_into_its_input),
        ("equal sizes are FedAvg", _returns_its_input),
        ("inputs are not modified", _writes_into_its_input),
        ("an empty round keeps the state", lambda partial, state: {n: 2 * t for n, t in state.items()}),
        ("names, shapes and types are kept, memory is new", _returns_its_input),
        ("names, shapes and types are kept, memory is new", lambda p, s: {n: t.double() for n, t in s.items()}),
    ],
)
def test_a_law_catches_a_rule_that_breaks_it(law: str, finish: Callable[[Partial, State], State]) -> None:
    fed = Federation(kind=KINDS["linear pair"], full_size=4, sizes=(4, 4), weights=(1, 2))
    with pytest.raises(AssertionError):
        LAWS[law](broken(finish), fed)


def test_the_kinds_are_the_shapes_of_real_layers() -> None:
    R = 4
    linear = lod.LoDLinear(torch.zeros(R + 3, R), torch.zeros(R, R + 1), torch.zeros(R + 3))
    conv = lod.LoDConv2d(torch.zeros(R, R), torch.zeros(R, R + 1, 3, 2), torch.zeros(R))
    for kind, layer in (("linear pair", linear), ("conv pair", conv)):
        for r in range(1, R + 1):
            model = lod.truncate(torch.nn.ModuleDict({"layer": layer}), {"layer": r})
            assert shapes_of(model) == KINDS[kind].shapes(r, R)
