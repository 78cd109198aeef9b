r"""Mean of the devices' products over *all* devices, factored anew by a truncated SVD.

``W = Σ_k n_k U_k V_k / Σ_k n_k`` per layer, ``new U, V`` its best approximation of rank R with ``√Σ`` on each side;
tensors that are no factor pair are averaged over their holders (``coverage_mean``). The mean has no factor bias (the
mean of products is not the product of means), and every prefix of the result is the best of its rank.

Source: FlexLoRA; FedHM (arXiv 2111.14655). Departures: products stay thin factors until they are wide; the SVD is cut
once, at R, and a tier's prefix of it is the cut that these methods make per device.

Known pathologies: rank collapse (raFLoRA, arXiv 2602.13486). A device of rank r adds nothing to the columns above r but
counts in their weight, so without any training the singular value of column j shrinks to ``p_j`` of itself per round,
``p_j`` being the weight share of the devices that hold it (factors that start orthogonal, such as those of
``factorize``). It therefore fails the law that zero local steps change nothing (``partitioned_product`` is the cure).
When all devices of a round have few columns together, the others become zero in *both* factors, where no gradient
revives them. Columns are mixed across tier edges, as in ``reordered``.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedmaestro.strategies import coverage_mean
from fedmaestro.strategies.base import (
    SUMS,
    WEIGHTED_SUMS,
    Aggregation,
    AnyPartial,
    Partial,
    Reduction,
    S,
    Sizes,
    factor_layers,
)
from fedmaestro.strategies.spectral import Pair, compress, is_wide, joined, refactored, why_no_products
from fedmaestro.submodel import State


def _row_factors(state: Mapping[str, Tensor]) -> set[str]:
    return {f"{layer}.v" for layer in factor_layers(state)}


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> State:  # noqa: ARG001
    rows = _row_factors(submodel)
    return {n: x.to(torch.float64, copy=True) if n in rows else x.double() * weight for n, x in submodel.items()}


def _add(left: State, right: State, sizes: Sizes) -> State:  # noqa: ARG001
    sums: State = {}
    for layer in factor_layers(left):
        names = f"{layer}.u", f"{layer}.v"
        u, v = joined(*((sums_of[names[0]], sums_of[names[1]]) for sums_of in (left, right)))
        sums |= zip(names, compress(u, v) if is_wide(u, v) else (u, v), strict=True)
    return {name: sums[name] if name in sums else tensor + right[name] for name, tensor in left.items()}


STACKS: Reduction[State] = replace(
    WEIGHTED_SUMS,
    lift=_lift,
    add=_add,
    why_not=lambda parts, weight, radius: why_no_products(parts[SUMS], weight, radius),
)
"""``<layer>.u (O, K)`` and ``.v (K, I…)`` hold the devices' columns, U weighted: ``u @ v = Σ_k n_k U_k V_k``.

At twice ``min(O, I)`` columns a stack is compressed, so its size does not follow the number of devices.
"""


def finish(partial: Partial[State], global_state: Mapping[str, Tensor]) -> State:
    """Return the truncated SVD of every layer's mean product; a layer whose pair nobody sent keeps its bits."""
    partial = weighted(partial)
    new: State = {}
    for layer in trained_pairs(partial, global_state):
        new |= refactored(global_state, layer, *_mean_product(layer, partial))
    return with_coverage_mean(new, partial, global_state)


def _mean_product(layer: str, partial: Partial[State]) -> Pair:
    blocks = [block for shapes, block in partial if has_pair(layer, shapes)]
    weight = sum(block.weight for block in blocks)
    us, vs = ([block.sums[f"{layer}.{factor}"] for block in blocks] for factor in "uv")
    return torch.cat(us, dim=1) / weight, torch.cat(vs)


def weighted(partial: Partial[S]) -> Partial[S]:
    """Return ``partial`` without the blocks that have no weight: their devices count for nothing."""
    return replace(partial, blocks={size: block for size, block in partial.blocks.items() if block.weight > 0})


def has_pair(layer: str, names: Mapping[str, object]) -> bool:
    """Return whether both factors of ``layer`` are there (a device sends one only where the other is frozen)."""
    return f"{layer}.u" in names and f"{layer}.v" in names


def trained_pairs(partial: AnyPartial, global_state: Mapping[str, Tensor]) -> list[str]:
    """Return the layers of which some device sent both factors; a factor that comes alone is averaged as it is."""
    sizes = [shapes for shapes, _ in partial]
    return [layer for layer in factor_layers(global_state) if any(has_pair(layer, shapes) for shapes in sizes)]


def with_coverage_mean(new: State, partial: Partial[State], global_state: Mapping[str, Tensor]) -> State:
    """Complete ``new`` by the coverage mean of all other tensors, in the order of ``global_state``."""
    rest = {name: old for name, old in global_state.items() if name not in new}
    means = coverage_mean.finish(partial, rest)
    return {name: new[name] if name in new else means[name] for name in global_state}


PRODUCT_SVD = Aggregation(
    name="product-svd",
    finish=finish,
    reduction=STACKS,
    mixes=True,
    rebases=True,
    whole_factors=True,
    summary="products averaged over all devices, then cut to full rank by SVD (shrinks the tail: rank collapse)",
    source="FlexLoRA, FedHM (2111.14655)",
)
