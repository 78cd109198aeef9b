"""From the rounds of a run to its summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmaestro.runs.records import RoundRecord, Summary, TierFigures, TierSummary


def tier_accuracies(records: Sequence[RoundRecord], tier: str) -> dict[int, float]:
    """Return a tier's accuracy by round, for the rounds that were evaluated."""
    scores = {record.round: record.tiers[tier]["accuracy"] for record in records if tier in record.tiers}
    return {server_round: score for server_round, score in scores.items() if score is not None}


def summarize(
    records: Sequence[RoundRecord], tiers: Mapping[str, TierFigures], model_sha256: str, **facts: Any
) -> Summary:
    """Return the summary of a run.

    Args:
        records: the rounds.
        tiers: what each tier's submodel costs, largest first.
        model_sha256: hash of ``model.safetensors``.
        facts: strategy, seed and whatever else of ``Summary`` does not follow from the rounds.
    """
    scored = {name: _scored(figures, tier_accuracies(records, name)) for name, figures in tiers.items()}
    finals = [tier.final_accuracy for tier in scored.values() if tier.final_accuracy is not None]
    return Summary(
        **facts,
        tiers=scored,
        mean_tier_accuracy=sum(finals) / len(finals) if finals else None,
        worst_tier_accuracy=min(finals, default=None),
        rounds=records[-1].round if records else 0,
        download_bytes=sum(record.download_bytes for record in records),
        upload_bytes=sum(record.upload_bytes for record in records),
        failed=sum(record.failed for record in records),
        wall_seconds=round(sum(record.wall_seconds for record in records), 3),
        virtual_seconds=sum(record.virtual_seconds for record in records),
        model_sha256=model_sha256,
    )


def _scored(figures: TierFigures, accuracies: Mapping[int, float]) -> TierSummary:
    final_round = max(accuracies, default=None)
    return TierSummary(
        **figures.to_dict(),
        final_accuracy=None if final_round is None else accuracies[final_round],
        final_round=final_round,
        best_accuracy=max(accuracies.values(), default=None),
    )
