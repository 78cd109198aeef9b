"""From the run folders of a comparison to ``results.json``: what tables, plots and the report are made of.

Pure functions on records and summaries. Only what the seed determines goes in (no wall time), so an interrupted and
resumed comparison gives the same file.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedmaestro.runs.records import (
    ACCURACY,
    AS_IT_IS,
    Analysis,
    MetricFacts,
    OwnTest,
    Reached,
    RoundRecord,
    Scores,
    Series,
    Stat,
    StrategyResults,
    Summary,
    TierFigures,
    Updates,
)
from fedmaestro.runs.summary import tier_values

MONOTONE_SLACK = 0.005
"""A tier may be this much worse than a smaller one before its seed no longer counts as monotone: of shares, this much
itself, of other metrics, this part of the smaller tier's value."""


@dataclass(frozen=True, kw_only=True)
class FinishedCell:
    """One strategy with one seed."""

    seed: int
    summary: Summary
    records: Sequence[RoundRecord]


_Fold = Callable[[FinishedCell, Sequence[float | None]], float | None]
"""From the values of a cell's tiers, largest first, to one."""


def strategy_results(cells: Sequence[FinishedCell], analysis: Analysis = AS_IT_IS, **facts: str) -> StrategyResults:
    """Return one row of a comparison.

    Args:
        cells: the finished ones, by seed.
        analysis: how many last rounds count, and the target.
        facts: name, summary, source and switches of the row.
    """
    first = cells[0].summary.tiers if cells else {}
    metric = cells[0].summary.metric if cells else ACCURACY
    finals = [[tier.final for tier in cell.summary.tiers.values()] for cell in cells]
    by_kind = {"final": finals, "best": [[tier.best for tier in cell.summary.tiers.values()] for cell in cells]}
    if analysis.last > 1:
        by_kind["last"] = [_means_of_last(cell, analysis.last) for cell in cells]

    def scores(fold: _Fold) -> Scores:
        return Scores(**{kind: stat(list(map(fold, cells, of_cells))) for kind, of_cells in by_kind.items()})

    def mean_of(key: str) -> float | None:
        return statistics.fmean(getattr(cell.summary, key) for cell in cells) if cells else None

    spent = [cell.summary.epsilon for cell in cells if cell.summary.epsilon is not None]
    updates = {name: [cell.summary.tiers[name].updates for cell in cells] for name in first}
    series = [_series(cell) for cell in cells]
    target = analysis.target
    return StrategyResults(
        **facts,
        seeds=[cell.seed for cell in cells],
        budgets={
            name: TierFigures(**{key: getattr(tier, key) for key in TierFigures.model_fields})
            for name, tier in first.items()
        },
        tiers={name: scores(_nth_tier(index)) for index, name in enumerate(first)},
        mean=scores(lambda _, values: _mean(values)),
        worst=scores(lambda _, values: _worst(values, metric)),
        over_devices=scores(_mean_over_devices),
        **_own_tests(cells, list(first)),
        reached=[] if target is None else [_reached(of_seed, target, metric) for of_seed in series],
        monotone_seeds=sum(is_monotone(x, metric) for x in finals),
        download_bytes=mean_of("download_bytes"),
        upload_bytes=mean_of("upload_bytes"),
        virtual_seconds=mean_of("virtual_seconds"),
        failed=mean_of("failed"),
        epsilon=statistics.fmean(spent) if spent else None,
        updates={name: sum(counts, Updates()) for name, counts in updates.items()},
        failed_by=dict(sorted(sum((Counter(cell.summary.failed_by) for cell in cells), Counter()).items())),
        series=series,
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


def _nth_tier(index: int) -> _Fold:
    return lambda _, values: values[index]


def _mean_over_devices(cell: FinishedCell, values: Sequence[float | None]) -> float | None:
    """Return the mean of the tiers' values, weighted by how many devices they have."""
    return _weighted_mean(values, [tier.devices for tier in cell.summary.tiers.values()])


def _weighted_mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values) or not sum(weights):
        return None
    return statistics.fmean(known, weights)


def _means_of_last(cell: FinishedCell, count: int) -> list[float | None]:
    """Return for each tier the mean of its last values; None where it has fewer."""
    ends = [
        list(tier_values(cell.records, tier, cell.summary.metric.name).values())[-count:] for tier in cell.summary.tiers
    ]
    return [statistics.fmean(values) if len(values) == count else None for values in ends]


def _own_tests(cells: Sequence[FinishedCell], tiers: Sequence[str]) -> dict[str, Any]:
    """Return the fields of ``StrategyResults`` about devices' own tests; none where devices have none."""
    tested = [next((row.device_test for row in reversed(cell.records) if row.device_test), {}) for cell in cells]
    if not any(tested):
        return {}

    def of_tier(tier: str, key: str) -> list[float | None]:
        return [facts.get(tier, {}).get(key) for facts in tested]

    by_tier = {
        tier: OwnTest(mean=stat(of_tier(tier, "mean")), worst_decile=stat(of_tier(tier, "worst_decile")))
        for tier in tiers
        if any(tier in facts for facts in tested)
    }
    counts = [[of_tier["devices"] or 0 for of_tier in facts.values()] for facts in tested]
    means = [[of_tier["mean"] for of_tier in facts.values()] for facts in tested]
    return {"own_test": by_tier, "own_test_mean": stat(list(map(_weighted_mean, means, counts)))}


def _reached(series: Series, target: float, metric: MetricFacts) -> Reached | None:
    """Return the first evaluated round whose mean over tiers is the target or better; None: there was none."""
    for index, number in enumerate(series.round):
        mean = _mean([values[index] for values in series.values.values()])
        if mean is not None and not metric.better(target, mean):
            return Reached(round=number, bytes=series.bytes[index], virtual_seconds=series.virtual_seconds[index])
    return None


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
