"""Every rule against a second implementation: NumPy, dense matrices, one device and one entry at a time.

Two layers with ranks of their own (a linear one and a convolution) and tensors without factors; in float64, so that
prefixes of an SVD can be compared as well.
"""

import itertools
from typing import Literal

import numpy as np
import pytest
import torch

from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.strategies.base import Partial, signature
from fedmaestro.submodel import Shapes, State, cut

Array = np.ndarray
Dense = dict[str, Array]

R1, R2 = 5, 4
LAYERS = {"a": R1, "b": R2}
TIERS = ((1, 1), (2, 3), (4, 3), (R1, R2))
FLEETS = {
    "all tiers": (0, 1, 1, 2, 3, 3),
    "tail untrained": (0, 1, 2),
    "middle tier absent": (0, 3, 3, 0),
    "smallest only": (0, 0),
    "one device": (2,),
    "many": (3, 0, 1) * 9,
}


def shapes(r1: int, r2: int) -> Shapes:
    return {"a.u": (7, r1), "a.v": (r1, 5), "a.bias": (7,), "b.u": (4, r2), "b.v": (r2, 3, 2, 1), "scale": ()}


def state_of(sizes: Shapes, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in sizes.items()}


def as_dense(state: State) -> Dense:
    return {name: tensor.numpy() for name, tensor in state.items()}


# ---------------------------------------------------------------- the rules once more


def padded(x: Array, shape: tuple[int, ...]) -> Array:
    new = np.zeros(shape)
    new[tuple(slice(n) for n in x.shape)] = x
    return new


def product(state: Dense, layer: str, first: int = 0, last: int | None = None) -> Array:
    v = state[f"{layer}.v"]
    return state[f"{layer}.u"][:, first:last] @ v.reshape(len(v), -1)[first:last]


def best(matrix: Array, rank: int) -> Array:
    """The best approximation of this rank (Eckart and Young)."""
    p, sigma, qt = np.linalg.svd(matrix)
    return sum((sigma[j] * np.outer(p[:, j], qt[j]) for j in range(min(rank, len(sigma)))), np.zeros_like(matrix))


def held(x: Array, index: tuple[int, ...]) -> bool:
    return all(i < n for i, n in zip(index, x.shape, strict=True))


def mean_of_entries(
    old: Dense, devices: list[Dense], starts: list[Dense], n: list[float], *, changed: Literal["row", "entry", ""]
) -> Dense:
    """The mean over those that hold an entry and, if that is asked for, have changed its row, or the entry itself."""
    new = {name: x.copy() for name, x in old.items()}
    for name, x in new.items():
        for index in itertools.product(*map(range, x.shape)):
            total = weight = 0.0
            for device, start, examples in zip(devices, starts, n, strict=True):
                if held(device[name], index):
                    of = index if changed == "entry" else index[:1]
                    if not changed or device[name][of].tobytes() != start[name][of].tobytes():
                        total, weight = total + examples * device[name][index], weight + examples
            if weight:
                x[index] = total / weight
    return new


def mean_of_padded(old: Dense, devices: list[Dense], n: list[float]) -> Dense:
    return {
        name: sum(w * padded(device[name], x.shape) for device, w in zip(devices, n, strict=True)) / sum(n)
        for name, x in old.items()
    }


def norm_of_products(device: Dense) -> float:
    return float(np.sqrt(sum(np.linalg.norm(product(device, layer)) ** 2 for layer in LAYERS)))


def segment_means(old: Dense, devices: list[Dense], n: list[float], layer: str, at: int) -> list[tuple[int, Array]]:
    """The end and the mean product of every segment between the tiers' ranks."""
    edges = sorted({0, LAYERS[layer], *(tier[at] for tier in TIERS)})
    means = []
    for first, last in itertools.pairwise(edges):
        holders = [(d, w) for d, w in zip(devices, n, strict=True) if d[f"{layer}.u"].shape[1] >= last]
        total = sum((w * product(d, layer, first, last) for d, w in holders), np.zeros_like(product(old, layer)))
        means.append((last, total / sum(w for _, w in holders) if holders else product(old, layer, first, last)))
    return means


Prefixes = dict[str, Array]
"""The function of every prefix, under ``<layer>:<rank>``, and all tensors without factors."""


def prefixes(state: Dense) -> Prefixes:
    found = {f"{layer}:{r}": product(state, layer, 0, r) for layer, R in LAYERS.items() for r in range(R + 1)}
    return found | {name: state[name] for name in ("a.bias", "scale")}


def best_prefixes(old: Dense, full: dict[str, Array], plain: Dense) -> Prefixes:
    found = {f"{layer}:{r}": best(full[layer], r) for layer, R in LAYERS.items() for r in range(R + 1)}
    return found | {name: plain[name] for name in ("a.bias", "scale")}


def expected(rule: str, old: Dense, devices: list[Dense], starts: list[Dense], n: list[float]) -> Prefixes:
    changed: dict[str, Literal["row", "entry", ""]] = {"masked-mean": "row", "entry-mean": "entry"}
    mean = mean_of_entries(old, devices, starts, n, changed=changed.get(rule, ""))
    if rule in ("coverage-mean", *changed):
        return prefixes(mean)
    if rule in ("zero-pad", "hetlora"):
        weights = n if rule == "zero-pad" else [norm_of_products(device) for device in devices]
        return prefixes(mean_of_padded(old, devices, weights))
    if rule == "reordered":
        return best_prefixes(old, {layer: product(mean, layer) for layer in LAYERS}, mean)
    if rule == "product-svd":
        products = {x: sum(w * product(d, x) for d, w in zip(devices, n, strict=True)) / sum(n) for x in LAYERS}
        return best_prefixes(old, products, mean)
    segments = {x: segment_means(old, devices, n, x, at) for at, x in enumerate(LAYERS)}
    if rule == "partitioned-product":
        return best_prefixes(old, {x: sum(matrix for _, matrix in segments[x]) for x in LAYERS}, mean)
    assert rule == "block-product"
    found = prefixes(mean)
    for layer, parts in segments.items():
        below, matrix_below = 0, np.zeros_like(product(old, layer))
        for last, matrix in parts:
            trained = any(device[f"{layer}.u"].shape[1] >= last for device in devices)
            for r in range(below + 1, last + 1):
                block = best(matrix, r - below) if trained else product(old, layer, below, r)
                found[f"{layer}:{r}"] = matrix_below + block
            below, matrix_below = last, found[f"{layer}:{last}"]
    return found


# ---------------------------------------------------------------- both


def trained(tier: int, start: State, seed: int) -> State:
    """Rows 0 and 3 of every tensor stay as they were (``masked-mean``), the others take any value."""
    new = state_of(shapes(*TIERS[tier]), seed)
    for name, tensor in new.items():
        if tensor.dim():
            tensor[0] = start[name][0]
            tensor[3:4] = start[name][3:4]
    return new


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("rule", [name for name, rule in AGGREGATIONS.items() if not rule.reduction.keeps_devices])
def test_a_rule_is_what_its_formula_says(rule: str, fleet: str, seed: int) -> None:
    agg = AGGREGATIONS[rule]
    state = state_of(shapes(R1, R2), seed)
    starts = [cut(state, shapes(*TIERS[tier])) for tier in FLEETS[fleet]]
    devices = [trained(t, start, 50 + 100 * seed + k) for k, (t, start) in enumerate(zip(FLEETS[fleet], starts))]  # noqa: B905
    n = np.random.default_rng(seed).integers(1, 600, len(devices)).astype(float).tolist()
    partial: Partial = agg.init(state, [tuple(shapes(*tier).items()) for tier in TIERS])
    for device, start, examples in zip(devices, starts, n, strict=True):
        partial = agg.add(partial, device, examples, start=start)
    new = prefixes(as_dense(agg.finish(partial, state)))
    naive = expected(rule, as_dense(state), [as_dense(d) for d in devices], [as_dense(s) for s in starts], n)
    assert new.keys() == naive.keys()
    for name, matrix in new.items():
        np.testing.assert_allclose(matrix, naive[name], rtol=1e-7, atol=1e-7, err_msg=name)


# ---------------------------------------------------------------- frozen factors


@pytest.mark.parametrize("rule", ["product-svd", "partitioned-product", "block-product"])
@pytest.mark.parametrize("frozen", ["u", "v"])
def test_a_factor_that_comes_alone_is_averaged_over_its_holders(rule: str, frozen: str) -> None:
    """Its partner is the same everywhere, so the mean of products is the product of means."""
    state = state_of(shapes(R1, R2), 0)
    results = []
    for agg in (AGGREGATIONS[rule], AGGREGATIONS["coverage-mean"]):
        partial = agg.init(state)
        for k, tier in enumerate((0, 2, 3, 3)):
            device = state_of(shapes(*TIERS[tier]), 10 + k)
            partial = agg.add(partial, {n: x for n, x in device.items() if not n.endswith(f".{frozen}")}, 3 + k)
        results.append(agg.finish(partial, state))
    new, mean = results
    assert list(new) == list(state)
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, mean[name])
        if name.endswith(f".{frozen}"):
            assert torch.equal(tensor, state[name])


# ---------------------------------------------------------------- sizes that nobody announced


def merged(rule: str, known: list[tuple[int, int]], cohorts: list[tuple[int, list[int]]]) -> tuple[Partial, State]:
    """Stream cohorts of (tier, seeds); a host knows no other size."""
    agg, state = AGGREGATIONS[rule], state_of(shapes(R1, R2), 0)
    partial = agg.init(state, [tuple(shapes(*tier).items()) for tier in known])
    for tier, seeds in cohorts:
        cohort = agg.init(state)
        for seed in seeds:
            cohort = agg.add(cohort, state_of(shapes(*TIERS[tier]), seed), 1 + seed % 7)
        partial = agg.merge(partial, cohort)
    return partial, agg.finish(agg.merge(partial, agg.init(state, [tuple(shapes(*t).items()) for t in TIERS])), state)


@pytest.mark.parametrize("rule", ["partitioned-product", "block-product"])
@pytest.mark.parametrize("known", [[], [TIERS[3]], [TIERS[0], TIERS[3]]], ids=["none", "one", "some"])
def test_a_size_that_was_not_announced_is_aggregated_right(rule: str, known: list[tuple[int, int]]) -> None:
    cohorts = [(3, [1]), (3, [3]), (0, [4]), (2, [5, 6]), (1, [7]), (2, [8])]
    _, new = merged(rule, known, cohorts)
    _, right = merged(rule, list(TIERS), cohorts)
    for name, matrix in prefixes(as_dense(new)).items():
        np.testing.assert_allclose(matrix, prefixes(as_dense(right))[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["partitioned-product", "block-product"])
def test_without_announcements_nothing_is_added_up_across_devices(rule: str) -> None:
    partial, new = merged(rule, [], [(3, list(range(1, 30))), (3, list(range(30, 60))), (1, [60])])
    ((stack_a,), (stack_b,)) = partial.blocks[signature(shapes(R1, R2))].sums.stacks.values()
    assert stack_a.u.shape == (7, 59 * R1)
    assert stack_b.v.shape == (59 * R2, 3, 2, 1)
    _, right = merged(rule, list(TIERS), [(3, list(range(1, 60))), (1, [60])])
    for name, matrix in prefixes(as_dense(new)).items():
        np.testing.assert_allclose(matrix, prefixes(as_dense(right))[name], rtol=1e-9, atol=1e-9)


def test_a_surprise_inside_what_is_already_added_up_is_refused() -> None:
    cohorts = [(3, [seed]) for seed in range(40)] + [(1, [50])]
    with pytest.raises(ValueError, match=r"cannot be split at \[2, 4\]: announce all sizes"):
        merged("partitioned-product", [TIERS[0], TIERS[3]], cohorts)


def test_what_is_added_up_on_either_side_stays_so() -> None:
    """Stacks that were compressed may grow by others that were not, and cannot be split after that either."""
    agg, state = AGGREGATIONS["partitioned-product"], state_of(shapes(R1, R2), 0)
    wide = agg.init(state, [tuple(shapes(*TIERS[3]).items())])
    for seed in range(3):  # 15 columns are more than 2 · min(O, I)
        wide = agg.add(wide, state_of(shapes(*TIERS[3]), seed), 5)
    thin, surprise = (agg.add(Partial(), state_of(shapes(*TIERS[tier]), 9), 5) for tier in (3, 0))
    for partial in (agg.merge(wide, thin), agg.merge(thin, wide)):
        with pytest.raises(ValueError, match="already added up"):
            agg.finish(agg.merge(partial, surprise), state)


@pytest.mark.parametrize("rule", ["product-svd", "partitioned-product", "block-product"])
def test_a_device_of_rank_0_holds_no_column(rule: str) -> None:
    agg, state = AGGREGATIONS[rule], state_of(shapes(R1, R2), 0)
    partial = agg.init(state, [tuple(shapes(*tier).items()) for tier in TIERS])
    for seed in (1, 2):
        partial = agg.add(partial, state_of(shapes(*TIERS[2]), seed), 6)
    more = agg.add(agg.add(partial, state_of(shapes(0, 3), 3), 4), state_of(shapes(0, 3), 4), 4)
    without, beside = (product(as_dense(agg.finish(p, state)), "a") for p in (partial, more))
    share = 12 / 20 if rule == "product-svd" else 1.0
    np.testing.assert_allclose(beside, share * without, rtol=1e-9, atol=1e-9)
