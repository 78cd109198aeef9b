"""Greedy search over per-layer ranks: one path from the whole model down, so that all budgets give nested models.

Source: Maestro (ICML 2024), section 4.4, which names a greedy search per layer by the loss on one batch. Ours weighs
each step by the cost it saves and re-evaluates only the step that looks best (a lazy greedy), which needs two or three
evaluations per step instead of one per layer.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Ranks = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One point of a path."""

    ranks: Ranks
    loss: float


def levels(start: int, *, ceiling: int | None = None, smallest: int = 1, shrink: float = 0.85) -> list[int]:
    """Return the ranks that a search tries for a layer: ``start``, then ever smaller ones down to ``smallest``.

    Args:
        start: the layer's current rank.
        ceiling: the largest rank worth trying below ``start`` (the largest that is cheaper than the dense layer).
        smallest: the last level; a layer that starts at or below it has one level.
        shrink: ratio of neighbouring levels (each step takes at least one column).
    """
    ranks = [start]
    rank = start - 1 if ceiling is None else min(start - 1, ceiling)
    while rank >= smallest:
        ranks.append(rank)
        rank = min(rank - 1, round(shrink * rank))
    if ranks[-1] > smallest and (ceiling is None or smallest <= ceiling):
        ranks.append(smallest)
    return ranks


def greedy_path(
    levels: Mapping[str, Sequence[int]],
    cost_of: Callable[[str, int], float],
    loss_of: Callable[[Ranks], float],
) -> Iterator[Step]:
    """Yield models from the first level of every layer to the last one, each nested in the one before.

    A step lowers one layer by one level: the one with the smallest increase of the loss per cost saved.

    Args:
        levels: descending ranks to try, by layer.
        cost_of: cost of a layer at a rank, for example its MACs.
        loss_of: loss of the model at the given ranks, all layers named.
    """
    ranks = {name: ladder[0] for name, ladder in levels.items()}
    loss = loss_of(ranks)
    yield Step(ranks=ranks, loss=loss)

    def candidate(name: str, position: int) -> tuple[float, int, str, int, float]:
        rank = levels[name][position]
        lowered = loss_of({**ranks, name: rank})
        # A step that saves nothing is free to skip over: the level below it decides.
        saved = max(cost_of(name, ranks[name]) - cost_of(name, rank), 1e-9)
        return (lowered - loss) / saved, taken, name, position, lowered

    taken = 0
    heap = [candidate(name, 1) for name, ladder in levels.items() if len(ladder) > 1]
    heapq.heapify(heap)
    while heap:
        _, evaluated, name, position, lowered = heapq.heappop(heap)
        if evaluated < taken:
            heapq.heappush(heap, candidate(name, position))
            continue
        ranks = {**ranks, name: levels[name][position]}
        loss, taken = lowered, taken + 1
        yield Step(ranks=ranks, loss=loss)
        if position + 1 < len(levels[name]):
            heapq.heappush(heap, candidate(name, position + 1))


def add_columns(
    ranks: Mapping[str, int],
    most: Mapping[str, int],
    worth: Callable[[str, int], float],
    fits: Callable[[Ranks], bool],
) -> Ranks:
    """Return ``ranks`` with single columns added until no layer's next one fits.

    Args:
        ranks: what to start from.
        most: the rank at which each layer ends.
        worth: of a layer's next column, at its rank so far: the one of the highest worth is tried first.
        fits: whether ranks can be afforded. A column that does not fit is not tried again: costs only grow.
    """
    grown = dict(ranks)
    left = [layer for layer in grown if grown[layer] < most[layer]]
    while left:
        layer = max(left, key=lambda x: worth(x, grown[x]))
        more = {**grown, layer: grown[layer] + 1}
        affordable = fits(more)
        if affordable:
            grown = more
        if not affordable or grown[layer] == most[layer]:
            left.remove(layer)
    return grown
