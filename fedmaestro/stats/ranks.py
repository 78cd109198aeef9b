"""Ranks of rows over several settings: Friedman's test, and which rows differ (Demšar, JMLR 7, 2006).

A setting (an experiment, a dataset) gives one value per row, its mean over seeds. Settings are the sample here: what
the ranks say is about settings like these.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedmaestro.stats.paired import ALPHA

ENOUGH_SETTINGS = 6
"""With fewer, ranks describe; the approximations of the tests are not to be relied on."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Friedman:
    """Whether rows differ at all.

    Attributes:
        chi_squared: Friedman's statistic, corrected for ties.
        f: Iman's and Davenport's; None where all settings rank the rows in one way, which makes it infinite.
        p: by ``f``, but never below ``smallest_p``.
        smallest_p: what one order in all settings has by chance: 1 / (k!)ᴺ⁻¹ for k rows and N settings.
    """

    chi_squared: float
    f: float | None
    p: float
    smallest_p: float


def ranks_of(values: Sequence[float], *, higher_is_better: bool = True) -> list[float]:
    """Return the rank of each value, 1 for the best; equal values share the mean of their ranks."""
    from scipy import stats

    signed = [-value if higher_is_better else value for value in values]
    return [float(rank) for rank in stats.rankdata(signed)]


def average_ranks(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean rank of each row; ``ranks`` has a sequence of them for each setting."""
    return [statistics.fmean(column) for column in zip(*ranks, strict=True)]


def friedman(ranks: Sequence[Sequence[float]]) -> Friedman:
    """Return Friedman's test of the ranks of k ≥ 2 rows in N ≥ 1 settings.

    χ² = (k - 1) Σⱼ (Rⱼ - N (k + 1) / 2)² / Σᵢⱼ (rᵢⱼ - (k + 1) / 2)² with the rank sums Rⱼ, which without ties is the
    formula of the textbooks. As χ² is too conservative, p is that of F = (N - 1) χ² / (N (k - 1) - χ²) with k - 1 and
    (k - 1)(N - 1) degrees of freedom (Iman and Davenport, 1980). Departure: where settings are few and agree, F gives
    p = 0; here it is at least what that agreement has by chance.

    Args:
        ranks: a sequence of k ranks for each setting.
    """
    settings, rows = len(ranks), len(ranks[0])
    middle = (rows + 1) / 2
    within = math.fsum((rank - middle) ** 2 for row in ranks for rank in row)
    between = math.fsum((math.fsum(column) - settings * middle) ** 2 for column in zip(*ranks, strict=True))
    chi_squared = (rows - 1) * between / within if within else 0.0
    least = math.exp((1 - settings) * math.lgamma(rows + 1))
    f = _iman_davenport(chi_squared, settings, rows)
    p = 0.0 if f is None else _f_tail(f, settings, rows)
    return Friedman(chi_squared=chi_squared, f=f, p=min(1.0, max(p, least)), smallest_p=least)


def critical_difference(rows: int, settings: int, alpha: float = ALPHA) -> float:
    """Return how far apart two average ranks are at least if the rows differ (Nemenyi, 1963).

    q √(k (k + 1) / 6N), with q the quantile of the studentised range for k groups and infinite degrees of freedom,
    divided by √2.
    """
    from scipy import stats

    quantile = float(stats.studentized_range.ppf(1 - alpha, rows, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(rows * (rows + 1) / (6 * settings))


def cliques(averages: Sequence[float], distance: float) -> list[tuple[int, ...]]:
    """Return the largest groups of at least two rows whose average ranks lie less than ``distance`` apart.

    Returns:
        Indices into ``averages``, best rank first; the group of the best row first.
    """
    order = sorted(range(len(averages)), key=lambda index: (averages[index], index))
    groups: list[tuple[int, ...]] = []
    reached = 0
    for start, first in enumerate(order):
        group = [index for index in order[start:] if averages[index] - averages[first] < distance]
        if len(group) > 1 and start + len(group) > reached:
            groups.append(tuple(group))
            reached = start + len(group)
    return groups


def _iman_davenport(chi_squared: float, settings: int, rows: int) -> float | None:
    room = settings * (rows - 1) - chi_squared
    return (settings - 1) * chi_squared / room if room > _ROUNDING * settings * rows else None


def _f_tail(f: float, settings: int, rows: int) -> float:
    """Return the p of ``f``; a single setting says nothing."""
    from scipy import stats

    return float(stats.f.sf(f, rows - 1, (rows - 1) * (settings - 1))) if settings > 1 else 1.0
