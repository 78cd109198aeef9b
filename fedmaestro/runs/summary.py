"""From the rounds of a run to its summary."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmaestro.runs.records import ACCURACY, MetricFacts, RoundRecord, Summary, TierFigures, TierSummary, Updates


def tier_values(records: Sequence[RoundRecord], tier: str, metric: str) -> dict[int, float]:
    """Return a tier's values of a metric by round, for the rounds that were evaluated."""
    scores = {record.round: record.tiers[tier].get(metric) for record in records if tier in record.tiers}
    return {server_round: score for server_round, score in scores.items() if score is not None}


def summarize(
    records: Sequence[RoundRecord],
    tiers: Mapping[str, TierFigures],
    model_sha256: str,
    metric: MetricFacts = ACCURACY,
    **facts: Any,
) -> Summary:
    """Return the summary of a run.

    Args:
        records: the rounds.
        tiers: what each tier's submodel costs, largest first.
        model_sha256: hash of ``model.safetensors``.
        metric: the main one.
        facts: strategy, seed and whatever else of ``Summary`` does not follow from the rounds.
    """
    scored = {
        name: _scored(figures, tier_values(records, name, metric.name), metric).model_copy(
            update={"updates": _updates(record.updates.get(name, Updates()) for record in records)}
        )
        for name, figures in tiers.items()
    }
    failed_by: Counter[str] = Counter()
    for record in records:
        failed_by.update(record.failed_by)
    finals = [tier.final for tier in scored.values() if tier.final is not None]
    return Summary(
        **facts,
        tiers=scored,
        metric=metric,
        mean_tier=sum(finals) / len(finals) if finals else None,
        worst_tier=metric.worst(finals),
        rounds=records[-1].round if records else 0,
        download_bytes=sum(record.download_bytes for record in records),
        upload_bytes=sum(record.upload_bytes for record in records),
        failed=sum(record.failed for record in records),
        failed_by=dict(sorted(failed_by.items())),
        updates=_updates(counts for record in records for counts in record.updates.values()),
        wall_seconds=round(sum(record.wall_seconds for record in records), 3),
        virtual_seconds=sum(record.virtual_seconds for record in records),
        epsilon=next((record.epsilon for record in reversed(records) if record.epsilon is not None), None),
        model_sha256=model_sha256,
    )


def _updates(counts: Iterable[Updates]) -> Updates:
    return sum(counts, Updates())


def _scored(figures: TierFigures, values: Mapping[int, float], metric: MetricFacts) -> TierSummary:
    final_round = max(values, default=None)
    return TierSummary(
        **figures.to_dict(),
        final=None if final_round is None else values[final_round],
        final_round=final_round,
        best=metric.best(values.values()),
    )
