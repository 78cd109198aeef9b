"""Equal MACs for rank prefixes and for widths, so that the two families can be compared tier by tier."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedmaestro.fleet.cost import Trace
from fedmaestro.lod.search import add_columns
from fedmaestro.models.architecture import Architecture, Size

TOLERANCE = 0.03
"""Largest difference of the MACs of a tier's two sizes, relative to the width's, that counts as equal."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Two sizes of (nearly) the same MACs."""

    width: Size
    ranks: Size


def matched_sizes(
    dense: Architecture, ranked: Trace, macs: Sequence[int], trace_of: Callable[[Architecture, Fraction | None], Trace]
) -> list[Matched]:
    """Return for each tier the width next to its MACs that ranks can match within ``TOLERANCE``, and those ranks.

    Widths are the coarser of the two, so ranks follow them. Smallest tier first; every layer has at least the rank of
    the next smaller tier, so both chains are nested. Where no width can be matched, a tier gets the closest pair.

    Args:
        dense: the plain form.
        ranked: trace of the LoD form.
        macs: forward MACs per example of every tier, in any order.
        trace_of: the trace of a width.
    """
    costs = {width: sum(x.macs(0) for x in trace_of(dense, width).layers) for width in dense.fractions()}
    result: dict[int, Matched] = {}
    least, narrowest = dict.fromkeys(_full_ranks(ranked), 1), min(costs)
    for limit in sorted(set(macs)):
        pairs: list[tuple[float, Fraction, dict[str, int]]] = []
        # Of widths that are as near, the larger one.
        for width in sorted((w for w in costs if w >= narrowest), key=lambda w: (abs(costs[w] - limit), -w)):
            ranks = ranks_of_macs(ranked, costs[width], least)
            pairs.append((abs(_macs(ranked, ranks) / costs[width] - 1), width, ranks))
            if pairs[-1][0] <= TOLERANCE:
                break
        _, width, ranks = min(pairs, key=lambda pair: pair[0])
        result[limit] = Matched(width=Size(width=width), ranks=Size(ranks=ranks))
        least, narrowest = ranks, width
    return [result[limit] for limit in macs]


def ranks_of_macs(ranked: Trace, target: int, least: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks, ``least`` or more, that use the MACs ``target`` best, and no more unless ``least`` does.

    A uniform fraction of every layer's rank first; then single columns, always of the layer that is furthest behind in
    its share of columns and still affords one.
    """
    full = _full_ranks(ranked)
    ranks = dict(least)
    for fraction in sorted({Fraction(j, rank) for rank in full.values() for j in range(1, rank + 1)}):
        candidate = {x: max(least[x], int(fraction * full[x])) for x in full}
        if _macs(ranked, candidate) > target:
            break
        ranks = candidate
    return add_columns(ranks, full, lambda layer, rank: -rank / full[layer], lambda more: _macs(ranked, more) <= target)


def _full_ranks(ranked: Trace) -> dict[str, int]:
    return {layer.name: layer.max_rank for layer in ranked.layers if layer.max_rank is not None}


def _macs(ranked: Trace, ranks: Mapping[str, int]) -> int:
    return sum(layer.macs(ranks.get(layer.name, 0)) for layer in ranked.layers)
