"""From comparisons of the same rows in several settings to ``ranks.json``: how the rows rank over settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from fedmaestro.runs.records import MetricFacts, Record, Results
from fedmaestro.stats.ranks import average_ranks, cliques, critical_difference, friedman, ranks_of

_DIGITS = 12  # means that agree so far are equal


class SettingRanks(Record):
    """One setting: an experiment in which every row has finished every seed."""

    name: str
    metric: MetricFacts
    values: list[float]
    """Mean over tiers and seeds of each row."""
    ranks: list[float]
    """1 is the best; equal values share the mean of their ranks."""


class Ranking(Record):
    """``ranks.json``: lists are in the order of ``rows``."""

    format: int = 1
    rows: list[str]
    seeds: int
    """Of every row in every experiment."""
    settings: list[SettingRanks]
    left_out: list[str]
    """Experiments in which a row lacks a seed or a value."""
    average: list[float]
    """Mean rank of each row; empty without settings."""
    chi_squared: float | None = None
    """Friedman's; None without settings."""
    f: float | None = None
    """Iman's and Davenport's; None also where it is infinite."""
    p: float | None = None
    smallest_p: float | None = None
    """That so few settings can give."""
    critical_difference: float | None = None
    """Nemenyi's, at .05."""
    cliques: list[list[str]] = Field(default_factory=list)
    """Groups of rows that do not differ, best first."""


def ranking(comparisons: Mapping[str, Results]) -> Ranking:
    """Return how the rows rank.

    Args:
        comparisons: by experiment, at least one; all have the same rows.
    """
    first = next(iter(comparisons.values()))
    rows = [row.name for row in first.strategies]
    settings = [_setting(name, results) for name, results in comparisons.items() if _is_whole(results)]
    facts = _tests(rows, [setting.ranks for setting in settings]) if settings and len(rows) > 1 else {"average": []}
    return Ranking(
        rows=rows,
        seeds=len(first.seeds),
        settings=settings,
        left_out=[name for name, results in comparisons.items() if not _is_whole(results)],
        **facts,
    )


def _is_whole(results: Results) -> bool:
    return results.complete and all(row.mean.judged.mean is not None for row in results.strategies)


def _setting(name: str, results: Results) -> SettingRanks:
    means = [mean for row in results.strategies if (mean := row.mean.judged.mean) is not None]
    rounded = [round(mean, _DIGITS) for mean in means]
    ranks = ranks_of(rounded, higher_is_better=results.metric.higher_is_better)
    return SettingRanks(name=name, metric=results.metric, values=means, ranks=ranks)


def _tests(rows: Sequence[str], ranks: Sequence[Sequence[float]]) -> dict[str, Any]:
    averages, test = average_ranks(ranks), friedman(ranks)
    distance = critical_difference(len(rows), len(ranks))
    return {
        "average": averages,
        "chi_squared": test.chi_squared,
        "f": test.f,
        "p": test.p,
        "smallest_p": test.smallest_p,
        "critical_difference": distance,
        "cliques": [[rows[index] for index in group] for group in cliques(averages, distance)],
    }
