"""Equal budgets by choice: what a device of a tier spends on a size, and the largest size that spends no more.

A comparison that equates forward MACs is kind to objectives that run several passes, and blind to traffic: ranks of
equal MACs have more parameters than widths. So what is equated can be chosen.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from fedmaestro.fleet.clock import device_timing
from fedmaestro.fleet.cost import Cost
from fedmaestro.fleet.rule import Passes
from fedmaestro.fleet.tiers import Tier

Quantity = Literal["macs", "train-macs", "bytes", "time"]
"""Forward MACs per example, training MACs per example with all passes of the objective, bytes of a round both ways, or
virtual seconds of a round."""

Levels = Sequence[Cost]
"""What a device's own size costs, then all smaller ones inside of it, largest first."""

Spend = Callable[[int, Levels], float]
"""``(position of the tier in the fleet, costs) -> what its devices spend``."""


def spent(by: Quantity, tier: Tier, levels: Levels, passes: Passes, examples: int) -> float:
    """Return what a device spends in a round, or on an example.

    Args:
        by: of what.
        tier: whose speed and links count for the time.
        levels: the sizes that it may run.
        passes: how often its objective runs each.
        examples: that it trains on in a round, for the time.
    """
    own = levels[0]
    if by == "macs":
        return own.macs_per_example
    if by == "bytes":
        return own.download_bytes + own.upload_bytes
    expected = passes.expected(len(levels))
    macs = round(sum(p * level.train_macs_per_example for p, level in zip(expected, levels, strict=True)))
    return macs if by == "train-macs" else device_timing(tier, own, examples, macs).total


def fit_equal(
    limits: Sequence[float], reach: Sequence[int], levels_at: Callable[[int, Sequence[int]], Levels], spend: Spend
) -> list[int]:
    """Return for every tier the largest position of one chain that spends no more than its limit, or the first one.

    Args:
        limits: of every tier.
        reach: positions that a tier may have.
        levels_at: ``(position, smaller positions) -> costs``.
        spend: grows along the chain.
    """
    found: dict[int, int] = {}

    def fits(i: int, position: int) -> bool:
        smaller = sorted({x for x in found.values() if x < position}, reverse=True)
        return spend(i, levels_at(position, smaller)) <= limits[i]

    for i in sorted(range(len(limits)), key=lambda i: limits[i]):
        low, high = 0, reach[i] - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(i, middle) else (low, middle - 1)
        found[i] = low
    # Tiers that were fitted later may have left further levels inside of earlier ones.
    while over := [i for i, position in found.items() if position > 0 and not fits(i, position)]:
        found |= {i: found[i] - 1 for i in over}
    return [found[i] for i in range(len(limits))]
