"""Differences between two rows on the same seeds: how large, how sure, whether small enough to be called level.

A seed fixes the initial model, the partition and the sampled devices of every row, so rows are compared seed by seed.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALPHA = 0.05
"""The error that a claim may have."""
EXACT_SEEDS = 20
"""Up to so many seeds the sign-flip test counts all 2ⁿ patterns; beyond, it draws ``DRAWS`` of them."""
DRAWS = 100_000
_ROUNDING = 1e-9  # of the largest sum: sums this near to each other are equal


def t_half_width(differences: Sequence[float], confidence: float = 1 - ALPHA) -> float | None:
    """Return half the width of the t interval of the mean; None for fewer than two differences.

    Args:
        differences: one for each seed.
        confidence: of the interval.
    """
    if len(differences) < 2:
        return None
    from scipy import stats

    quantile = float(stats.t.ppf(0.5 + confidence / 2, len(differences) - 1))
    return quantile * _standard_error(differences)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of the sign-flip (randomisation) test of paired differences.

    Under the null hypothesis a difference is as likely as its negative; p is the share of all sign patterns whose sum
    lies as far from zero as the one that was seen (Fisher, The Design of Experiments, 1935, section 21). Exact up to
    ``EXACT_SEEDS``. Beyond, patterns are drawn from a fixed generator and the one that was seen counts as drawn too
    (Phipson and Smyth, 2010), so p is reproducible and never zero.

    Args:
        differences: at least one.
    """
    sizes = sorted(map(abs, differences))
    seen = abs(math.fsum(differences)) - _ROUNDING * math.fsum(sizes)
    exact = len(sizes) <= EXACT_SEEDS
    sums = _all_sums(sizes) if exact else _drawn_sums(sizes)
    as_far = int((abs(sums) >= seen).sum())
    return as_far / len(sums) if exact else (as_far + 1) / (len(sums) + 1)


def smallest_p(seeds: int, rows: int = 1) -> float:
    """Return the smallest p that the sign-flip test can give, after Holm's adjustment for so many rows.

    All differences have one sign in 2 of 2ⁿ patterns: .25 for 3 seeds, .0625 for 5, .031 for 6, .002 for 10.
    """
    return min(1.0, rows * 2.0 ** (1 - seeds))


def seeds_needed(rows: int = 1) -> int:
    """Return how many seeds it takes before any of so many rows can be told apart from the baseline at ``ALPHA``."""
    return math.ceil(1 + math.log2(rows / ALPHA))


def tost_p(differences: Sequence[float], margin: float) -> float | None:
    """Return the p of two one-sided paired t tests: small where the mean lies within ±``margin``.

    The larger of the p of "at least ``margin`` below" and of "at least ``margin`` above" (Schuirmann, 1987). It is
    below .05 exactly where the 90 % t interval lies inside the margin.

    Args:
        differences: one for each seed.
        margin: positive; what is smaller counts as no difference.

    Returns:
        None for fewer than two differences.
    """
    if len(differences) < 2:
        return None
    from scipy import stats

    room = margin - abs(statistics.fmean(differences))
    error = _standard_error(differences)
    if error == 0:
        return 0.0 if room > 0 else 1.0
    return float(stats.t.sf(room / error, len(differences) - 1))


def _standard_error(differences: Sequence[float]) -> float:
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _all_sums(sizes: Sequence[float]) -> "NDArray[np.float64]":
    """Return the sums of all sign patterns but for a flip of all signs: 2ⁿ⁻¹ values."""
    import numpy as np

    sums = np.array(sizes[:1], dtype=float)
    for size in sizes[1:]:
        sums = np.concatenate((sums + size, sums - size))
    return sums


def _drawn_sums(sizes: Sequence[float]) -> "NDArray[np.float64]":
    import numpy as np

    rng, sums = np.random.default_rng(0), np.zeros(DRAWS)
    for size in sizes:
        sums += rng.choice((-size, size), DRAWS)
    return sums
