"""Models for budgets: per-layer ranks searched on a calibration batch, or one fraction of all ranks.

A deployed model is ``lod.recompose``d: a layer is dense where that has no more weights. Costs here count it so. Units:
MACs per example (forward; linear layers and convolutions), scalars, milliseconds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import LayerTrace, Trace
from fedmaestro.lod.search import Ranks, greedy_path, levels

LossOf = Callable[[Ranks], float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model on the way from the whole one down: its ranks and what it costs when deployed."""

    ranks: Ranks
    params: int
    macs: int
    loss: float
    """On the calibration batch."""


def deployed_weights(layer: LayerTrace, rank: int) -> int:
    """Return the weights of a layer: ``r · (I + O)`` as factors, ``O · I`` where that is not more."""
    dense = layer.out * layer.inner
    return dense if layer.max_rank is None else min(rank * (layer.inner + layer.out), dense)


def deployed_cost(traced: Trace, ranks: Mapping[str, int]) -> tuple[int, int]:
    """Return parameters and MACs per example of the recomposed model at ``ranks``."""
    params, macs = traced.fixed_params, 0
    for layer in traced.layers:
        weights = deployed_weights(layer, ranks.get(layer.name, 0))
        macs += layer.positions * weights
        params += weights if layer.max_rank is not None else 0
    return params, macs


def search(traced: Trace, start: Mapping[str, int], loss_of: LossOf, *, level_ratio: float = 0.85) -> list[Candidate]:
    """Search one path from the ranks ``start`` down to rank 1 everywhere; every point is nested in the one before.

    A step lowers one layer's rank where the loss rises least per saved MAC (``lod.search.greedy_path``).

    Args:
        traced: costs of the model at full rank (``cost.trace``).
        start: the model's ranks; layers of rank 0 stay there.
        loss_of: loss on a calibration batch at the given ranks.
        level_ratio: of neighbouring ranks that are tried.
    """
    lod = {layer.name: layer for layer in traced.layers if layer.max_rank is not None}
    ladders = {name: levels(rank, ceiling=_last_cheaper(lod[name]), shrink=level_ratio) for name, rank in start.items()}

    def macs(name: str, rank: int) -> int:
        return lod[name].positions * deployed_weights(lod[name], rank)

    return [_candidate(traced, step.ranks, step.loss) for step in greedy_path(ladders, macs, loss_of)]


def uniform(traced: Trace, start: Mapping[str, int], loss_of: LossOf, count: int = 40) -> list[Candidate]:
    """Return models at one fraction of all ranks of ``start``: ``max(1, ⌊fraction · R⌋)``, largest first."""
    points: list[Candidate] = []
    for step in range(count, 0, -1):
        fraction = Fraction(step, count)
        ranks = {name: max(min(1, rank), math.floor(fraction * rank)) for name, rank in start.items()}
        if not points or ranks != points[-1].ranks:
            points.append(_candidate(traced, ranks, loss_of(ranks)))
    return points


def within(points: Sequence[Candidate], *, max_macs: float = math.inf, max_params: float = math.inf) -> Candidate:
    """Return the first (largest) point that fits both budgets.

    Raises:
        UserError: not even the smallest model fits.
    """
    for point in points:
        if point.macs <= max_macs and point.params <= max_params:
            return point
    least = points[-1]
    wanted = [("MACs", max_macs, least.macs), ("parameters", max_params, least.params)]
    unmet = [(f"{limit:,.0f} {unit}", f"{needed:,}") for unit, limit, needed in wanted if needed > limit]
    budgets, needs = (" and ".join(texts) for texts in zip(*unmet, strict=True))
    raise UserError(f"no model fits {budgets}: the smallest one (rank 1 everywhere) needs {needs}")


def within_latency(
    points: Sequence[Candidate], max_ms: float, measure: Callable[[Candidate], float]
) -> tuple[Candidate, float]:
    """Return the largest point whose measured latency fits, and that latency.

    Latencies fall along the path but for noise, so this is a binary search over it; the answer itself was measured.

    Raises:
        UserError: not even the smallest model fits.
    """
    low, high = 0, len(points) - 1
    latency = measure(points[high])
    if latency > max_ms:
        raise UserError(
            f"no model fits {max_ms:g} ms: the smallest one (rank 1 everywhere) takes {latency:.3g} ms on this machine"
        )
    while low < high:
        middle = (low + high) // 2
        measured = measure(points[middle])
        if measured <= max_ms:
            high, latency = middle, measured
        else:
            low = middle + 1
    return points[high], latency


def _last_cheaper(layer: LayerTrace) -> int:
    """Return the largest rank at which factors have fewer weights than the dense layer."""
    return max(1, math.ceil(layer.out * layer.inner / (layer.out + layer.inner)) - 1)


def _candidate(traced: Trace, ranks: Ranks, loss: float) -> Candidate:
    params, macs = deployed_cost(traced, ranks)
    return Candidate(ranks=ranks, params=params, macs=macs, loss=loss)
