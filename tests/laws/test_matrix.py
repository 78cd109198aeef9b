"""The laws of aggregation: every rule × layer kind × tier structure.

A new rule is one row of ``PAIR_LAWS`` (and of ``DENSE_LAWS``, for layers without factors): the laws that it keeps. What
a row leaves out must really be broken (``test_a_law_that_is_not_listed_is_broken``), so a row is a statement in both
directions.

Shapes: ``O`` out, ``I`` in, ``R`` full rank, ``r`` prefix, ``k×l`` kernel.
"""
# ruff: noqa: N803 (O, I, R, k, l are the shape letters)

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, is_dataclass, replace
from functools import cache, reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmaestro import lod
from fedmaestro.rounds.tree import Span, Tree, reduced
from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.strategies.base import Aggregation, Partial
from fedmaestro.submodel import Shapes, Signature, State, cut, num_elements, shapes_of, signature

SHARED_LAWS = (
    "a layer that nobody sent is kept",
    "order and split do not matter",
    "a fixed merge order fixes the bits",
    "a cohort's upload is its partial sum, bit for bit",
    "grouping into cohorts changes no bit",
    "merging with an empty partial changes nothing",
    "memory does not follow the number of devices",
    "inputs are not modified",
    "an empty round keeps the state",
    "names, shapes and types are kept, memory is new",
)
NO_EXAMPLES = "devices without examples count for nothing"
IDLE_STATE = "idle rounds keep the state"
IDLE_TIERS = "idle rounds keep every tier's function"
IDLE_FULL = "idle rounds keep the full function"
UNTRAINED = "what nobody trained is kept"
FEDAVG = "equal sizes are FedAvg"
FEDAVG_OF_PRODUCTS = "full sizes are FedAvg of products"
BASIS = "a change of basis in a tier block changes nothing"
ORDERED = "columns are ordered and balanced"

MEMORY = "memory does not follow the number of devices"
ROBUST_LAWS = {*SHARED_LAWS, NO_EXAMPLES, IDLE_STATE, IDLE_TIERS, IDLE_FULL, UNTRAINED} - {MEMORY}
"""Those of rules that look at every device by itself."""

MEAN_LAWS = {*SHARED_LAWS, NO_EXAMPLES, IDLE_STATE, IDLE_TIERS, IDLE_FULL, UNTRAINED, FEDAVG}
"""Those of a mean over contributors."""

PAIR_LAWS: dict[str, set[str]] = {
    "coverage-mean": MEAN_LAWS,
    "masked-mean": MEAN_LAWS,
    "entry-mean": MEAN_LAWS,
    "zero-pad": {*SHARED_LAWS, NO_EXAMPLES, FEDAVG},
    "hetlora": {*SHARED_LAWS},
    "product-svd": {*SHARED_LAWS, NO_EXAMPLES, FEDAVG_OF_PRODUCTS, BASIS, ORDERED},
    "partitioned-product": {*SHARED_LAWS, NO_EXAMPLES, IDLE_FULL, FEDAVG_OF_PRODUCTS, BASIS, ORDERED},
    "block-product": {*SHARED_LAWS, NO_EXAMPLES, IDLE_TIERS, IDLE_FULL, UNTRAINED, FEDAVG_OF_PRODUCTS, BASIS},
    "reordered": {*SHARED_LAWS, NO_EXAMPLES, IDLE_FULL, ORDERED},
    **dict.fromkeys(("norm-clipping", "coordinate-median", "trimmed-mean", "multi-krum"), ROBUST_LAWS),
}
"""On factor pairs."""

DENSE_LAWS: dict[str, set[str]] = {
    **dict.fromkeys(PAIR_LAWS, MEAN_LAWS),
    "zero-pad": PAIR_LAWS["zero-pad"],
    "hetlora": PAIR_LAWS["hetlora"],
    **dict.fromkeys(("norm-clipping", "coordinate-median", "trimmed-mean", "multi-krum"), ROBUST_LAWS),
}
"""On all other tensors, where rules about products are the coverage mean."""

BLOCK_LAWS: dict[str, set[str]] = {
    **dict.fromkeys(DENSE_LAWS, MEAN_LAWS),
    # What a device does not send is not padded: that is for tensors of which it sends a part.
    "zero-pad": MEAN_LAWS,
    "hetlora": {*SHARED_LAWS, IDLE_STATE, IDLE_TIERS, IDLE_FULL, UNTRAINED},
    **dict.fromkeys(("norm-clipping", "coordinate-median", "trimmed-mean", "multi-krum"), ROBUST_LAWS),
}
"""On submodels that leave out whole tensors."""

RULES = {name: rule.of(lambda key: {"train.assumed-attackers": 0.3}[key]) for name, rule in AGGREGATIONS.items()}

LAWS_OF_PAIRS = {FEDAVG_OF_PRODUCTS, BASIS, ORDERED}
"""What says nothing about a layer without factors."""

SPECTRAL = {"product-svd", "partitioned-product", "block-product", "reordered"}
"""Rules that end with an SVD: their results are compared as functions, because factors amplify rounding."""


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


def _block_shapes(r: int, R: int) -> Shapes:
    """A network of ``R`` blocks of which the first ``r`` are held, each with its classifier."""
    more = {f"block{i}.weight": (R + 1, 3) for i in range(2, r + 1)}
    return {
        "layer.weight": (R + 1, 2),
        "layer.bias": (R + 1,),
        **more,
        **{f"exit{i}.weight": (2, i) for i in range(1, r + 1)},
    }


def _pair_matrix(state: State) -> Tensor:
    return state["layer.u"].double() @ state["layer.v"].flatten(1).double()


PAIRS = {
    "linear pair": Kind(shapes=_linear_shapes, matrix=_pair_matrix),
    "conv pair": Kind(shapes=_conv_shapes, matrix=_pair_matrix),
}
KINDS = PAIRS | {
    "dense": Kind(shapes=_dense_shapes, matrix=lambda state: state["layer.weight"].double()),
    "blocks": Kind(
        shapes=_block_shapes, matrix=lambda state: torch.cat([x.double().flatten() for x in state.values()])
    ),
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
    tiers: tuple[int, ...] = ()
    """Sizes that have no device in this round."""
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def shapes(self, size: int) -> Shapes:
        return self.kind.shapes(size, self.full_size)

    @property
    def edges(self) -> list[int]:
        """Where a size ends, from 0 on."""
        return sorted({0, *self.sizes, *self.tiers, self.full_size})

    @property
    def announced(self) -> list[Signature]:
        return [signature(self.shapes(size)) for size in self.edges[1:]]

    @property
    def state(self) -> State:
        return normal_state(self.shapes(self.full_size), self.seed, self.dtype)

    @property
    def starts(self) -> list[State]:
        """What devices were sent: views of the global state."""
        state = self.state
        return [cut(state, self.shapes(size)) for size in self.sizes]

    @property
    def submodels(self) -> list[State]:
        """Devices trained: any values."""
        return [
            normal_state(self.shapes(size), 1000 + 100 * self.seed + k, self.dtype) for k, size in enumerate(self.sizes)
        ]

    def empty(self, agg: Aggregation) -> Partial:
        """The server's, which knows all sizes."""
        return agg.init(self.state, self.announced)

    def added(self, agg: Aggregation, partial: Partial, devices: Iterable[int], submodels: list[State]) -> Partial:
        starts = self.starts
        for k in devices:
            partial = agg.add(partial, submodels[k], self.weights[k], start=starts[k])
        return partial

    def partial(self, agg: Aggregation, submodels: list[State]) -> Partial:
        return self.added(agg, self.empty(agg), range(len(self.sizes)), submodels)

    def aggregated(self, agg: Aggregation, submodels: list[State]) -> State:
        return agg.finish(self.partial(agg, submodels), self.state)


@st.composite
def federations(draw: st.DrawFn, kind: str, tiers: str) -> Federation:
    R = draw(SIZES, label="R")
    sizes = draw(TIERS[tiers](R), label="sizes")
    weights = draw(st.lists(st.integers(1, 5000), min_size=len(sizes), max_size=len(sizes)), label="weights")
    absent = draw(st.lists(st.integers(1, R), max_size=2), label="tiers without devices")
    return Federation(
        kind=KINDS[kind],
        full_size=R,
        sizes=tuple(sizes),
        weights=tuple(weights),
        tiers=tuple(absent),
        seed=draw(st.integers(0, 50)),
    )


def normal_state(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> State:
    return {name: tensor.clone() for name, tensor in _normal_state(tuple(shapes.items()), seed, dtype)}


@cache
def _normal_state(shapes: Signature, seed: int, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes]


def assert_equal(actual: State, expected: State) -> None:
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def assert_close(agg: Aggregation, fed: Federation, actual: State, expected: State, tolerance: float = 1e-6) -> None:
    """Compare entries; of factors that an SVD made, the function and what each prefix misses of it."""
    assert list(actual) == list(expected)
    if agg.name in SPECTRAL:
        new, other = fed.kind.matrix(actual), fed.kind.matrix(expected)
        scale = float(other.abs().max())
        torch.testing.assert_close(new, other, rtol=tolerance, atol=tolerance * scale)
        for size in fed.edges[1:]:
            missing = [
                float((whole - fed.kind.matrix(cut(state, fed.shapes(size)))).norm())
                for whole, state in ((new, actual), (other, expected))
                if "layer.u" in state
            ]
            assert missing[:1] == pytest.approx(missing[1:], rel=10 * tolerance, abs=10 * tolerance * scale)
    for name, tensor in actual.items():
        if agg.name not in SPECTRAL or name not in ("layer.u", "layer.v"):
            torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)


def assert_equal_partials(actual: Partial, expected: Partial) -> None:
    assert (actual.sizes, actual.blocks.keys()) == (expected.sizes, expected.blocks.keys())
    for size, block in actual.blocks.items():
        other = expected.blocks[size]
        assert (block.weight, block.devices) == (other.weight, other.devices)
        assert_equal(tensors(block.sums), tensors(other.sums))


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def tensors(sums: Any, prefix: str = "") -> State:
    """Every tensor that a reduction's sums hold, whatever records they lie in."""
    if isinstance(sums, Tensor):
        return {prefix: sums}
    parts = sums.items() if isinstance(sums, Mapping) else enumerate(sums) if isinstance(sums, tuple) else None
    if parts is None:
        parts = vars(sums).items() if is_dataclass(sums) else ()
    return {key: x for name, part in parts for key, x in tensors(part, f"{prefix}/{name}").items()}


def copied_partial(partial: Partial) -> Partial:
    blocks = {size: replace(block, sums=deepcopy(block.sums)) for size, block in partial.blocks.items()}
    return Partial(blocks, partial.sizes)


# ---------------------------------------------------------------- the laws


def idle_state(agg: Aggregation, fed: Federation) -> None:
    assert_equal(fed.aggregated(agg, fed.starts), fed.state)


def idle_tiers(agg: Aggregation, fed: Federation, sizes: Sequence[int] = ()) -> None:
    new = fed.aggregated(agg, fed.starts)
    for size in sizes or fed.edges[1:]:
        before, after = (cut(state, fed.shapes(size)) for state in (fed.state, new))
        torch.testing.assert_close(fed.kind.matrix(after), fed.kind.matrix(before), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after["layer.bias"], before["layer.bias"], rtol=1e-5, atol=1e-5)


def idle_full(agg: Aggregation, fed: Federation) -> None:
    idle_tiers(agg, fed, [fed.full_size])


def untrained_is_kept(agg: Aggregation, fed: Federation) -> None:
    state = fed.state
    new = fed.aggregated(agg, fed.submodels)
    for name, tensor in state.items():
        trained = torch.zeros(tensor.shape, dtype=torch.bool)
        for submodel in fed.submodels:
            if name in submodel:
                trained[tuple(slice(n) for n in submodel[name].shape)] = True
        assert new[name][~trained].numpy().tobytes() == tensor[~trained].numpy().tobytes(), name


def equal_sizes_are_fedavg(agg: Aggregation, fed: Federation) -> None:
    size = fed.sizes[0]
    same = replace(fed, sizes=(size,) * len(fed.sizes))
    new = cut(same.aggregated(agg, same.submodels), fed.shapes(size))
    for name, tensor in new.items():
        stack = np.stack([submodel[name].numpy().astype(np.float64) for submodel in same.submodels])
        np.testing.assert_allclose(tensor, np.average(stack, axis=0, weights=fed.weights), rtol=1e-6, atol=1e-7)


def full_sizes_are_fedavg_of_products(agg: Aggregation, fed: Federation) -> None:
    """And then the best approximation of their mean that has R columns."""
    R = fed.full_size
    full = replace(fed, sizes=(R,) * len(fed.sizes), tiers=())
    products = np.stack([fed.kind.matrix(submodel).numpy() for submodel in full.submodels])
    p, sigma, qt = np.linalg.svd(np.average(products, axis=0, weights=fed.weights), full_matrices=False)
    best = (p[:, :R] * sigma[:R]) @ qt[:R]
    new = full.aggregated(agg, full.submodels)
    np.testing.assert_allclose(fed.kind.matrix(new), best, rtol=1e-5, atol=1e-5 * sigma[0])


def change_of_basis(agg: Aggregation, fed: Federation) -> None:
    """``U_k[:, b] G`` and ``G⁻¹ V_k[b]`` are the same product, whatever G each device takes in each block."""
    fed = replace(fed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(fed.seed)
    turned = [copied(submodel) for submodel in fed.submodels]
    for submodel in turned:
        u, v = submodel["layer.u"], submodel["layer.v"]
        for first, last in pairwise(edge for edge in fed.edges if edge <= u.shape[1]):
            rotation, _ = torch.linalg.qr(torch.randn(last - first, last - first, generator=generator).double())
            change = rotation * (0.5 + torch.rand(last - first, generator=generator)).double()
            u[:, first:last] = u[:, first:last].clone() @ change
            v[first:last] = (torch.linalg.inv(change) @ v[first:last].flatten(1)).reshape(v[first:last].shape)
    assert_close(agg, fed, fed.aggregated(agg, turned), fed.aggregated(agg, fed.submodels), tolerance=1e-9)


def ordered_columns(agg: Aggregation, fed: Federation) -> None:
    """``UᵀU = V Vᵀ = diag(σ)``, σ descending: every prefix is the best of its rank."""
    fed = replace(fed, dtype=torch.float64)
    new = fed.aggregated(agg, fed.submodels)
    u, v = new["layer.u"], new["layer.v"].flatten(1)
    sigma = u.square().sum(0)
    assert bool((sigma.diff() <= 1e-9).all())
    for gram in (u.T @ u, v @ v.T):
        torch.testing.assert_close(gram, torch.diag(sigma), rtol=1e-9, atol=1e-9 * float(sigma[0]))


def no_examples(agg: Aggregation, fed: Federation) -> None:
    """Neither alone nor beside others."""
    nobody = replace(fed, weights=(0,) * len(fed.sizes))
    assert_equal(nobody.aggregated(agg, fed.submodels), fed.state)
    more = replace(fed, sizes=(*fed.sizes, fed.full_size), weights=(*fed.weights, 0))
    fewer = replace(fed, tiers=(*fed.tiers, fed.full_size))
    assert_close(agg, fed, more.aggregated(agg, more.submodels), fewer.aggregated(agg, fewer.submodels))


def absent_layer(agg: Aggregation, fed: Federation) -> None:
    absent = normal_state({"absent.u": (5, 2), "absent.v": (2, 3), "absent.bias": (5,)}, 7)
    new = agg.finish(fed.partial(agg, fed.submodels), absent | fed.state)
    assert_equal({name: new[name] for name in absent}, absent)


def order_and_split(agg: Aggregation, fed: Federation) -> None:
    state, submodels = fed.state, fed.submodels
    whole = fed.partial(agg, submodels)
    order = np.random.default_rng(fed.seed).permutation(len(submodels))
    parts = [fed.added(agg, agg.init(state), cohort, submodels) for cohort in np.array_split(order, 3)]
    left = agg.merge(agg.merge(agg.merge(fed.empty(agg), parts[0]), parts[1]), parts[2])
    right = agg.merge(agg.merge(parts[2], agg.merge(parts[1], parts[0])), fed.empty(agg))
    for other in (left, right):
        for size, block in other.blocks.items():
            assert block.devices == whole.blocks[size].devices
            assert block.weight == pytest.approx(whole.blocks[size].weight, rel=1e-14)
            types = {tensor.dtype for tensor in tensors(block.sums).values()}
            assert types <= {torch.float64} or agg.reduction.keeps_devices
        assert other.devices == len(submodels)
        assert_close(agg, fed, agg.finish(other, state), agg.finish(whole, state))


def fixed_order(agg: Aggregation, fed: Federation) -> None:
    """Cohorts are made in any order on any host; the server merges them in one order."""
    cohorts = np.array_split(np.arange(len(fed.sizes)), 3)

    def merged(made_in: list[int]) -> State:
        parts = {i: fed.added(agg, agg.init(fed.state), cohorts[i], fed.submodels) for i in made_in}
        return agg.finish(reduce(agg.merge, [parts[i] for i in sorted(parts)], fed.empty(agg)), fed.state)

    assert_equal(merged([0, 1, 2]), merged([2, 0, 1]))


def wire(agg: Aggregation, fed: Federation) -> None:
    """What a cohort amounts to travels without a loss, mixed stacks included."""
    for size in sorted({*fed.sizes}):
        devices = [k for k, other in enumerate(fed.sizes) if other == size] * 9
        partial = fed.added(agg, fed.empty(agg), devices, fed.submodels)
        ((key, block),) = partial.blocks.items()
        arrived = agg.unpack(agg.pack(partial), key, block.weight, block.devices, fed.announced)
        assert_equal_partials(arrived, partial)


def grouping(agg: Aggregation, fed: Federation) -> None:
    """Cohorts are nodes of a tree: how it is cut, who fails and in which order replies come changes no bit."""
    rng = np.random.default_rng(fed.seed)
    size = fed.sizes[0]
    key, count = signature(fed.shapes(size)), int(rng.integers(1, 12))
    weights = [int(weight) for weight in rng.integers(1, 50, count)]
    devices = [replace(fed, seed=fed.seed + k).submodels[0] for k in range(count)]
    failed = {k for k in range(count) if rng.random() < 0.2}

    def leaf(k: int) -> Partial | None:
        return None if k in failed else agg.add(fed.empty(agg), devices[k], weights[k], start=fed.starts[0])

    def cut(span: Span) -> list[Span]:
        if len(span) == 1 or rng.random() < 0.3:
            return [span]
        return [node for half in span.halves for node in cut(half)]

    def gathered(spans: list[Span]) -> Partial | None:
        tree: Tree[Partial] = Tree(count, agg.merge)
        for span in (spans[i] for i in rng.permutation(len(spans))):
            partial = reduced(span, leaf, agg.merge)
            if partial is not None:
                block = partial.blocks[key]
                partial = agg.unpack(agg.pack(partial), key, block.weight, block.devices, fed.announced)
            tree.put(span, partial)
        return tree.root

    whole = reduced(Span(0, count), leaf, agg.merge)
    for _ in range(3):
        other = gathered(cut(Span(0, count)))
        assert (other is None) == (whole is None)
        if whole is not None and other is not None:
            assert_equal_partials(other, whole)
            assert_equal(agg.finish(other, fed.state), agg.finish(whole, fed.state))


def empty_partial(agg: Aggregation, fed: Federation) -> None:
    for empty in (agg.init(fed.state), fed.empty(agg)):
        partial = fed.added(agg, empty, range(len(fed.sizes)), fed.submodels)
        for merged in (agg.merge(partial, empty), agg.merge(empty, partial)):
            assert_equal_partials(replace(merged, sizes=partial.sizes), partial)
            assert {*merged.sizes.known} == {*partial.sizes.known}


def bounded_memory(agg: Aggregation, fed: Federation) -> None:
    """Of 50 devices, no more than a few copies of the model per rank segment are kept (once all sizes are known)."""
    full = replace(fed, sizes=(fed.full_size,) * 50, weights=(1,) * 50, tiers=(*fed.sizes, *fed.tiers))
    partial = full.added(agg, full.empty(agg), [0] * 50, full.submodels[:1])
    ((_, block),) = partial
    limit = 4 * (len(full.edges) - 1) * num_elements(full.shapes(fed.full_size))
    assert block.devices == 50
    assert sum(tensor.numel() for tensor in tensors(block.sums).values()) <= limit


def purity(agg: Aggregation, fed: Federation) -> None:
    state, submodels, starts = fed.state, fed.submodels, fed.starts
    left = fed.added(agg, fed.empty(agg), [0], submodels)
    right = fed.partial(agg, submodels)
    before = copied_partial(left), copied_partial(right), copied(state), copied(submodels[0]), copied(starts[0])
    agg.add(left, submodels[0], 7, start=starts[0])
    agg.finish(agg.merge(left, right), state)
    agg.finish(left, state)
    agg.pack(left)
    assert_equal_partials(left, before[0])
    assert_equal_partials(right, before[1])
    for actual, expected in zip((state, submodels[0], starts[0]), before[2:], strict=True):
        assert_equal(actual, expected)


def empty_round(agg: Aggregation, fed: Federation) -> None:
    for empty in (agg.init(fed.state), fed.empty(agg)):
        assert_equal(agg.finish(empty, fed.state), fed.state)


def outputs(agg: Aggregation, fed: Federation) -> None:
    """A host's model is resident: the next device's training may not change what was added before."""
    for dtype in (torch.float32, torch.float64):
        fed = replace(fed, dtype=dtype)
        state, submodels = fed.state, fed.submodels
        partial = fed.partial(agg, submodels)
        new = agg.finish(partial, state)
        for submodel in submodels:
            for tensor in submodel.values():
                tensor.zero_()
        assert_equal(agg.finish(partial, state), new)
        for result in (new, agg.finish(fed.empty(agg), state)):
            assert shapes_of(result) == fed.shapes(fed.full_size)
            assert list(result) == list(state)
            assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in result.values())
            for tensor in result.values():
                tensor.zero_()
        assert_equal(state, fed.state)
        assert_equal_partials(partial, fed.partial(agg, fed.submodels))


SHARED_CHECKS = (
    absent_layer,
    order_and_split,
    fixed_order,
    wire,
    grouping,
    empty_partial,
    bounded_memory,
    purity,
    empty_round,
    outputs,
)

LAWS: dict[str, Callable[[Aggregation, Federation], None]] = {
    **dict(zip(SHARED_LAWS, SHARED_CHECKS, strict=True)),
    NO_EXAMPLES: no_examples,
    IDLE_STATE: idle_state,
    IDLE_TIERS: idle_tiers,
    IDLE_FULL: idle_full,
    UNTRAINED: untrained_is_kept,
    FEDAVG: equal_sizes_are_fedavg,
    FEDAVG_OF_PRODUCTS: full_sizes_are_fedavg_of_products,
    BASIS: change_of_basis,
    ORDERED: ordered_columns,
}


# ---------------------------------------------------------------- the matrix


def kept_laws(rule: str, kind: str) -> set[str]:
    return (PAIR_LAWS if kind in PAIRS else BLOCK_LAWS if kind == "blocks" else DENSE_LAWS)[rule]


def test_every_rule_has_a_row() -> None:
    tables = PAIR_LAWS, DENSE_LAWS, BLOCK_LAWS
    assert all(table.keys() == AGGREGATIONS.keys() for table in tables)
    assert all(kept <= LAWS.keys() for table in tables for kept in table.values())


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", PAIR_LAWS)
@settings(max_examples=4)
@given(data=st.data())
def test_a_rule_keeps_its_laws(rule: str, kind: str, tiers: str, data: st.DataObject) -> None:
    fed = data.draw(federations(kind, tiers))
    for law in sorted(kept_laws(rule, kind)):
        LAWS[law](RULES[rule], fed)


@pytest.mark.parametrize(
    ("rule", "kind", "law"),
    [
        (rule, kind, law)
        for rule in PAIR_LAWS
        for kind in KINDS
        for law in sorted(LAWS.keys() - kept_laws(rule, kind) - (set() if kind in PAIRS else LAWS_OF_PAIRS))
    ],
)
def test_a_law_that_is_not_listed_is_broken(rule: str, kind: str, law: str) -> None:
    fed = Federation(kind=KINDS[kind], full_size=6, sizes=(1, 2, 2, 4), weights=(30, 10, 20, 40))
    with pytest.raises(AssertionError):
        LAWS[law](RULES[rule], fed)


def test_rules_that_mix_say_so() -> None:
    """Server optimisers leave alone what no device covered, unless the rule itself moves it."""
    for rule in AGGREGATIONS.values():
        assert not (rule.mixes and UNTRAINED in PAIR_LAWS[rule.name]), rule.name
        assert rule.mixes or rule.name not in SPECTRAL - {"block-product"}, rule.name


# ---------------------------------------------------------------- the checks themselves


def broken(finish: Callable[[Partial, State], State]) -> Aggregation:
    return Aggregation(name="broken", finish=finish, summary="", source="")  # type: ignore[arg-type]


def _returns_its_input(partial: Partial, state: State) -> State:
    return dict(state)


def _writes_into_its_input(partial: Partial, state: State) -> State:
    return {name: tensor.add_(1.0) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("law", "finish"),
    [
        (IDLE_STATE, _writes_into_its_input),
        (FEDAVG, _returns_its_input),
        (FEDAVG_OF_PRODUCTS, _returns_its_input),
        (ORDERED, _returns_its_input),
        ("inputs are not modified", _writes_into_its_input),
        ("an empty round keeps the state", lambda partial, state: {n: 2 * t for n, t in state.items()}),
        ("a layer that nobody sent is kept", lambda partial, state: {n: 2 * t for n, t in state.items()}),
        ("names, shapes and types are kept, memory is new", _returns_its_input),
        ("names, shapes and types are kept, memory is new", lambda p, s: {n: t.double() for n, t in s.items()}),
    ],
)
def test_a_law_catches_a_rule_that_breaks_it(law: str, finish: Callable[[Partial, State], State]) -> None:
    fed = Federation(kind=KINDS["linear pair"], full_size=4, sizes=(4, 4), weights=(1, 2))
    with pytest.raises(AssertionError):
        LAWS[law](broken(finish), fed)


def test_memory_that_follows_the_devices_is_noticed() -> None:
    rule = AGGREGATIONS["product-svd"]
    lazy = replace(rule.reduction, add=lambda left, right, sizes: {n: torch.cat((left[n], right[n])) for n in left})
    fed = Federation(kind=KINDS["linear pair"], full_size=4, sizes=(4, 4), weights=(1, 2))
    with pytest.raises(AssertionError):
        bounded_memory(replace(rule, reduction=lazy), fed)


def test_the_kinds_are_the_shapes_of_real_layers() -> None:
    R = 4
    linear = lod.LoDLinear(torch.zeros(R + 3, R), torch.zeros(R, R + 1), torch.zeros(R + 3))
    conv = lod.LoDConv2d(torch.zeros(R, R), torch.zeros(R, R + 1, 3, 2), torch.zeros(R))
    for kind, layer in (("linear pair", linear), ("conv pair", conv)):
        for r in range(1, R + 1):
            model = lod.truncate(torch.nn.ModuleDict({"layer": layer}), {"layer": r})
            assert shapes_of(model) == KINDS[kind].shapes(r, R)
            assert dict(signature(shapes_of(model))) == KINDS[kind].shapes(r, R)
