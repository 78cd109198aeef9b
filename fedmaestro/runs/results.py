"""From the run folders of a comparison to ``results.json``: what tables, plots and the report are made of.

Pure functions on records and summaries. Only what the seed determines goes in (no wall time), so an interrupted and
resumed comparison gives the same file.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedmaestro.runs.records import (
    ACCURACY,
    MetricFacts,
    RoundRecord,
    Scores,
    Series,
    Stat,
    StrategyResults,
    Summary,
    TierFigures,
    Updates,
)

MONOTONE_SLACK = 0.005
"""A tier may be this much worse than a smaller one before its seed no longer counts as monotone: of shares, this much
itself, of other metrics, this part of the smaller tier's value."""


@dataclass(frozen=True, kw_only=True)
class FinishedCell:
    """One strategy with one seed."""

    seed: int
    summary: Summary
    records: Sequence[RoundRecord]


def strategy_results(cells: Sequence[FinishedCell], **facts: str) -> StrategyResults:
    """Return one row of a comparison.

    Args:
        cells: the finished ones, by seed.
        facts: name, summary, source and switches of the row.
    """
    first = cells[0].summary.tiers if cells else {}
    metric = cells[0].summary.metric if cells else ACCURACY
    of_tier = {name: [cell.summary.tiers[name] for cell in cells] for name in first}
    finals = [[tier.final for tier in cell.summary.tiers.values()] for cell in cells]
    bests = [[tier.best for tier in cell.summary.tiers.values()] for cell in cells]

    def mean_of(key: str) -> float | None:
        return statistics.fmean(getattr(cell.summary, key) for cell in cells) if cells else None

    spent = [cell.summary.epsilon for cell in cells if cell.summary.epsilon is not None]
    return StrategyResults(
        **facts,
        seeds=[cell.seed for cell in cells],
        budgets={
            name: TierFigures(**{key: getattr(tier, key) for key in TierFigures.model_fields})
            for name, tier in first.items()
        },
        tiers={
            name: Scores(final=stat([x.final for x in tiers]), best=stat([x.best for x in tiers]))
            for name, tiers in of_tier.items()
        },
        mean=Scores(final=stat([_mean(x) for x in finals]), best=stat([_mean(x) for x in bests])),
        worst=Scores(final=stat([_worst(x, metric) for x in finals]), best=stat([_worst(x, metric) for x in bests])),
        monotone_seeds=sum(is_monotone(x, metric) for x in finals),
        download_bytes=mean_of("download_bytes"),
        upload_bytes=mean_of("upload_bytes"),
        virtual_seconds=mean_of("virtual_seconds"),
        failed=mean_of("failed"),
        epsilon=statistics.fmean(spent) if spent else None,
        updates={name: sum((tier.updates for tier in tiers), Updates()) for name, tiers in of_tier.items()},
        failed_by=dict(sorted(sum((Counter(cell.summary.failed_by) for cell in cells), Counter()).items())),
        series=[_series(cell) for cell in cells],
    )


def stat(values: Sequence[float | None]) -> Stat:
    """Return mean, sample standard deviation (None for fewer than two) and the values; None where any is missing."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values) and bool(known)
    return Stat(
        mean=statistics.fmean(known) if complete else None,
        std=statistics.stdev(known) if complete and len(known) > 1 else None,
        values=list(values),
    )


def is_monotone(values: Sequence[float | None], metric: MetricFacts = ACCURACY) -> bool:
    """Return whether no tier (largest first) is worse than a smaller one by more than ``MONOTONE_SLACK``."""
    known = [value for value in values if value is not None]
    sign = 1 if metric.higher_is_better else -1

    def as_good(larger: float, smaller: float) -> bool:
        slack = MONOTONE_SLACK if metric.percent else MONOTONE_SLACK * abs(smaller)
        return sign * larger >= sign * smaller - slack

    pairs = ((larger, smaller) for i, larger in enumerate(known) for smaller in known[i + 1 :])
    return len(known) == len(values) and all(as_good(*pair) for pair in pairs)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _worst(values: Sequence[float | None], metric: MetricFacts) -> float | None:
    known = [value for value in values if value is not None]
    return metric.worst(known) if len(known) == len(values) else None


def _series(cell: FinishedCell) -> Series:
    sent, clock = 0, 0.0
    rows: list[tuple[RoundRecord, int, float]] = []
    for record in cell.records:
        sent += record.download_bytes + record.upload_bytes
        clock += record.virtual_seconds
        if record.tiers:
            rows.append((record, sent, clock))
    return Series(
        seed=cell.seed,
        round=[record.round for record, _, _ in rows],
        values={
            name: [record.tiers.get(name, {}).get(cell.summary.metric.name) for record, _, _ in rows]
            for name in cell.summary.tiers
        },
        bytes=[total for _, total, _ in rows],
        virtual_seconds=[seconds for _, _, seconds in rows],
        tail_energy=[record.tail_energy for record, _, _ in rows],
        factor_bias=[record.factor_bias for record, _, _ in rows],
    )
