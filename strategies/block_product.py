r"""Mean of the devices' products per rank segment, each factored anew within its own columns.

With ``M_b`` the mean product of segment b over its contributors (``partitioned_product``), ``new U[:, b], V[b, :]`` is
the best approximation of ``M_b`` of rank ``|b|``, with ``√Σ`` on each side. No weighting bias and no factor bias, and
what distinguishes it from ``partitioned_product``: nothing moves across a tier edge, so every tier's function is kept
when nobody trains, and a segment that nobody trained keeps its bits.

Source: the tier-preserving block aggregation of our notes (exact block product, truncated within the block).

Known pathologies: the columns of a segment are rotated and ordered in every round (a segment without contributors keeps
both), so moments of factors would belong to another basis (``Aggregation.rebases``); what ``M_b`` has beyond rank
``|b|`` is lost, while ``partitioned_product`` may find room for it in another segment. In our pilot it was worth no
more than the coverage mean: the factor bias that it removes was small.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies.base import Aggregation, Partial
from fedmaestro.strategies.partitioned_product import SEGMENT_STACKS, Segment, SegmentSums, plain, segments
from fedmaestro.strategies.product_svd import trained_pairs, weighted, with_coverage_mean
from fedmaestro.strategies.spectral import Pair, balanced
from fedmaestro.submodel import State


def finish(partial: Partial[SegmentSums], global_state: Mapping[str, Tensor]) -> State:
    """Return every trained segment as the truncated SVD of its mean product; the others keep their bits."""
    partial = weighted(partial)
    new = {}
    for layer in trained_pairs(partial, global_state):
        old_u, old_v = global_state[f"{layer}.u"], global_state[f"{layer}.v"]
        pairs = [_factored(part) for part in segments(layer, partial, global_state)]
        new[f"{layer}.u"] = torch.cat([u for u, _ in pairs], dim=1).to(old_u.dtype)
        new[f"{layer}.v"] = torch.cat([v for _, v in pairs]).to(old_v.dtype)
    return with_coverage_mean(new, plain(partial), global_state)


def _factored(part: Segment) -> Pair:
    return balanced(part.u, part.v, part.last - part.first) if part.trained else (part.u, part.v)


BLOCK_PRODUCT = Aggregation(
    name="block-product",
    finish=finish,
    reduction=SEGMENT_STACKS,
    rebases=True,
    whole_factors=True,
    summary="products averaged per rank segment over the devices that hold it, factored within the segment",
    source="raFLoRA (2602.13486) without its re-ordering across tiers",
)
