"""What may be said of rows beside a baseline: one test per row, adjusted for their number, and a word for the outcome.

A difference is claimed where the sign-flip test rejects after Holm's adjustment over the rows; rows are called level
only where the test of equivalence rejects after the same adjustment. All else is "not told apart", which is no claim.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fedmaestro.stats.paired import ALPHA, sign_flip_p, smallest_p, t_half_width, tost_p


class Verdict(StrEnum):
    """Whether a row's values are larger or smaller than the baseline's: which is better depends on the metric."""

    ABOVE = "above"
    BELOW = "below"
    ABOVE_WITHIN = "above, within the margin"
    """Larger for sure, and for sure by less than the margin."""
    BELOW_WITHIN = "below, within the margin"
    LEVEL = "level"
    NOT_TOLD_APART = "not told apart"
    TOO_FEW_SEEDS = "too few seeds for a claim"
    """Not even differences of one sign could be told apart from chance."""
    UNKNOWN = "unknown"
    """No seed in common, or a value is missing in one of them: what diverged must not be left out."""

    @property
    def differs(self) -> bool:
        """Whether a difference is claimed."""
        return self in (Verdict.ABOVE, Verdict.BELOW, Verdict.ABOVE_WITHIN, Verdict.BELOW_WITHIN)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row minus the baseline, over the seeds that both have finished.

    Attributes:
        row: its name.
        seeds: that both have.
        differences: one for each; empty where a value is missing.
        mean: of them.
        half_width: of the 95 % t interval.
        p: of the sign-flip test.
        p_holm: the same, adjusted over the rows.
        least_p: the smallest ``p_holm`` that so few seeds can give.
        p_level: of the test of equivalence; None also where there is no margin.
        p_level_holm: the same, adjusted over the rows.
        verdict: what follows.
    """

    row: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None = None
    half_width: float | None = None
    p: float | None = None
    p_holm: float | None = None
    least_p: float | None = None
    p_level: float | None = None
    p_level_holm: float | None = None
    verdict: Verdict = Verdict.UNKNOWN


def differences_from(
    baseline: Mapping[int, float | None], rows: Mapping[str, Mapping[int, float | None]], margin: float | None
) -> list[Difference]:
    """Return every row's difference from the baseline; the rows are one family for Holm's adjustment.

    Args:
        baseline: value by seed; None where a finished seed has none.
        rows: the same by name, without the baseline.
        margin: of equivalence; None: nothing is called level.
    """
    pairs = {name: _paired(baseline, row) for name, row in rows.items()}
    known = {name: differences for name, (_, differences) in pairs.items() if differences}
    p = {name: sign_flip_p(x) for name, x in known.items()}
    p_level = {name: None if margin is None else tost_p(x, margin) for name, x in known.items()}
    p_holm, p_level_holm = _adjusted(p), _adjusted(p_level)
    return [
        Difference(
            row=name,
            seeds=seeds,
            differences=differences,
            mean=statistics.fmean(differences) if differences else None,
            half_width=t_half_width(differences),
            p=p.get(name),
            p_holm=p_holm.get(name),
            least_p=smallest_p(len(differences), len(known)) if differences else None,
            p_level=p_level.get(name),
            p_level_holm=p_level_holm.get(name),
            verdict=_verdict(
                differences, smallest_p(len(differences), len(known)), p_holm.get(name), p_level_holm.get(name)
            ),
        )
        for name, (seeds, differences) in pairs.items()
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's step-down procedure (1979), in the order in which they were given.

    The i-th smallest of m is multiplied by m - i + 1; none becomes smaller than one before it, or larger than 1.
    """
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def _paired(
    baseline: Mapping[int, float | None], row: Mapping[int, float | None]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the common seeds and the differences, none where any is unknown."""
    seeds = tuple(sorted(baseline.keys() & row.keys()))
    pairs = [(row[seed], baseline[seed]) for seed in seeds]
    known = tuple(left - right for left, right in pairs if left is not None and right is not None)
    return seeds, known if len(known) == len(seeds) else ()


def _adjusted(p_values: Mapping[str, float | None]) -> dict[str, float]:
    known = {name: p for name, p in p_values.items() if p is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _verdict(differences: Sequence[float], least: float, p: float | None, p_level: float | None) -> Verdict:
    if p is None:
        return Verdict.UNKNOWN
    if least > ALPHA:
        return Verdict.TOO_FEW_SEEDS
    is_level = p_level is not None and p_level <= ALPHA
    if p > ALPHA:
        return Verdict.LEVEL if is_level else Verdict.NOT_TOLD_APART
    if statistics.fmean(differences) > 0:
        return Verdict.ABOVE_WITHIN if is_level else Verdict.ABOVE
    return Verdict.BELOW_WITHIN if is_level else Verdict.BELOW
