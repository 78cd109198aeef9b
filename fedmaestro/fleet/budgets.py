"""What a tier may spend, and the largest of a chain of nested sizes that fits all of its budgets.

Units: bytes, MACs per example (forward).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import Cost
from fedmaestro.fleet.tiers import Tier

Link = TypeVar("Link")
"""One size in a chain of nested ones, in whatever form: a fraction, ranks, a position."""


TRAINING_SHARE_OF_RAM = 0.25
"""Our assumption: Android kills background work that holds much more; no source measures it for training."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One bound on one figure of a ``Cost``."""

    name: str
    limit: int
    unit: str
    of: Callable[[Cost], int]

    def excess(self, cost: Cost) -> str:
        """Return '' when ``cost`` fits, else by how much it does not."""
        used = self.of(cost)
        if used <= self.limit:
            return ""
        ratio = f" (×{used / self.limit:.2f})" if self.limit else ""
        return f"{self.name} {self.limit:,} {self.unit}, needed {used:,}{ratio}"


def budgets(tier: Tier, full: Cost) -> list[Budget]:
    """Return the budgets that bind ``tier``; ``full`` is the cost of the whole model, for relative ones."""
    bounds = [
        ("macs-fraction", _times(tier.macs_fraction, full.macs_per_example), "MACs", _macs),
        ("macs", tier.macs, "MACs", _macs),
        ("memory-bytes", tier.memory_bytes, "bytes", _memory),
        ("ram-bytes", _times(TRAINING_SHARE_OF_RAM, tier.ram_bytes), "bytes (a quarter of the RAM)", _memory),
        ("round-bytes", tier.round_bytes, "bytes", _traffic),
    ]
    return [Budget(name=name, limit=limit, unit=unit, of=of) for name, limit, unit, of in bounds if limit is not None]


def within_ranks(tier: Tier, fractions: Sequence[Fraction]) -> Sequence[Fraction]:
    """Return those of ``fractions`` (ascending) that the tier's rank fraction allows: the smallest one in any case."""
    cap = Fraction(1) if tier.rank_fraction is None else exact(tier.rank_fraction)
    return [f for f in fractions if f <= cap] or fractions[:1]


def within_widths(tier: Tier, fractions: Sequence[Fraction]) -> Sequence[Fraction]:
    """Return those of ``fractions`` (ascending) that the tier's width allows: the smallest one in any case."""
    cap = Fraction(1) if tier.width is None else exact(tier.width)
    return [f for f in fractions if f <= cap] or fractions[:1]


def fit(tier: Tier, chain: Sequence[Link], cost_at: Callable[[Link], Cost], full: Cost) -> Link:
    """Return the largest of a ``chain`` of nested sizes (ascending) whose cost fits every budget of ``tier``.

    Costs grow along the chain, so this is a binary search; being one chain, the sizes of all tiers are nested. The rank
    fraction is no budget: ``within_ranks`` shortens a chain of fractions by it, ``without_fraction`` replaces it.

    Raises:
        UserError: even the smallest size (rank 1 everywhere) does not fit: which budgets, and by how much.
    """
    limits = budgets(tier, full)
    if excess := [text for budget in limits if (text := budget.excess(cost_at(chain[0])))]:
        raise UserError(
            f"tier {tier.name!r} cannot afford the smallest submodel: {'; '.join(excess)}: "
            "raise the budget, or choose a smaller model or batch size"
        )
    low, high = 0, len(chain) - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = not any(budget.excess(cost_at(chain[middle])) for budget in limits)
        low, high = (middle, high) if fits else (low, middle - 1)
    return chain[low]


def exact(fraction: float) -> Fraction:
    """Return the fraction that a decimal in a configuration means: 0.0625 is 1/16, 0.333333 is 1/3."""
    return Fraction(fraction).limit_denominator(10_000)


def with_macs_budget(tier: Tier, macs: int) -> Tier:
    """Return ``tier`` for a width-scaled model: the MACs of its ranks take the place of the rank fraction.

    A tier that says its width, and nothing of ranks, has no ranks of its own.
    """
    if tier.width is not None and tier.rank_fraction is None:
        return tier
    limit = macs if tier.macs is None else min(macs, tier.macs)
    return tier.model_copy(update={"rank_fraction": None, "macs_fraction": None, "macs": limit})


def without_fraction(tier: Tier, uniform: Cost) -> Tier:
    """Return ``tier`` for other ranks than uniform ones: what these cost takes the place of the rank fraction.

    MACs and traffic both: layers that share weights over many positions are dear in MACs, others in bytes, so ranks of
    equal MACs can differ several times in bytes.
    """
    if tier.rank_fraction is None:
        return tier
    limits = {"macs": _macs(uniform), "round_bytes": _traffic(uniform)}
    given = {"macs": tier.macs, "round_bytes": tier.round_bytes}
    lowest = {key: min(limit, given[key] or limit) for key, limit in limits.items()}
    return tier.model_copy(update={"rank_fraction": None, **lowest})


def _times(factor: float | None, value: int | None) -> int | None:
    return None if factor is None or value is None else math.floor(factor * value)


def _macs(cost: Cost) -> int:
    return cost.macs_per_example


def _memory(cost: Cost) -> int:
    return cost.train_memory_bytes


def _traffic(cost: Cost) -> int:
    return cost.download_bytes + cost.upload_bytes
