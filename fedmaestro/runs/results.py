"""From the run folders of a comparison to ``results.json``: what tables, plots and the report are made of.

Pure functions on records and summaries. Only what the seed determines goes in (no wall time), so an interrupted and
resumed comparison gives the same file.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmaestro.runs.folder import RoundRecord

MONOTONE_SLACK = 0.005
"""A tier may be this much below a smaller one before its seed no longer counts as monotone."""

BUDGET_KEYS = (
    "devices",
    "ranks",
    "params",
    "macs_per_example",
    "train_macs_per_example",
    "train_memory_bytes",
    "download_bytes",
    "upload_bytes",
)


@dataclass(frozen=True, kw_only=True)
class FinishedCell:
    """One strategy with one seed."""

    seed: int
    summary: Mapping[str, Any]
    records: Sequence[RoundRecord]


def strategy_results(facts: Mapping[str, Any], cells: Sequence[FinishedCell]) -> dict[str, Any]:
    """Return one entry of ``results.json``'s ``strategies``.

    Args:
        facts: name, summary, source and switches of the row.
        cells: the finished ones, by seed.
    """
    tiers = {
        name: [cell.summary["tiers"][name] for cell in cells] for name in (cells[0].summary["tiers"] if cells else {})
    }
    finals = [[tier["final_accuracy"] for tier in cell.summary["tiers"].values()] for cell in cells]
    bests = [[tier["best_accuracy"] for tier in cell.summary["tiers"].values()] for cell in cells]
    return {
        **facts,
        "seeds": [cell.seed for cell in cells],
        "budgets": {name: {key: of[0][key] for key in BUDGET_KEYS} for name, of in tiers.items()},
        "tiers": {
            name: {
                "final": stat([tier["final_accuracy"] for tier in of]),
                "best": stat([tier["best_accuracy"] for tier in of]),
            }
            for name, of in tiers.items()
        },
        "mean": {"final": stat([_mean(x) for x in finals]), "best": stat([_mean(x) for x in bests])},
        "worst": {"final": stat([_worst(x) for x in finals]), "best": stat([_worst(x) for x in bests])},
        "monotone_seeds": sum(is_monotone(x) for x in finals),
        **{
            key: statistics.fmean(cell.summary[key] for cell in cells) if cells else None
            for key in ("download_bytes", "upload_bytes", "virtual_seconds", "failed")
        },
        "series": [_series(cell) for cell in cells],
    }


def stat(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for fewer than two) and the values; None where any is missing."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values) and known
    return {
        "mean": statistics.fmean(known) if complete else None,
        "std": statistics.stdev(known) if complete and len(known) > 1 else None,
        "values": list(values),
    }


def is_monotone(accuracies: Sequence[float | None]) -> bool:
    """Return whether no tier (largest first) is more than half a point below a smaller one."""
    known = [value for value in accuracies if value is not None]
    return all(
        larger >= smaller - MONOTONE_SLACK for i, larger in enumerate(known) for smaller in known[i + 1 :]
    ) and len(known) == len(accuracies)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known and len(known) == len(values) else None


def _series(cell: FinishedCell) -> dict[str, Any]:
    sent, clock = 0, 0.0
    rows: list[tuple[RoundRecord, int, float]] = []
    for record in cell.records:
        sent += record.download_bytes + record.upload_bytes
        clock += record.virtual_seconds
        if record.tiers:
            rows.append((record, sent, clock))
    return {
        "seed": cell.seed,
        "round": [record.round for record, _, _ in rows],
        "accuracy": {
            name: [record.tiers.get(name, {}).get("accuracy") for record, _, _ in rows]
            for name in cell.summary["tiers"]
        },
        "bytes": [total for _, total, _ in rows],
        "virtual_seconds": [seconds for _, _, seconds in rows],
        "tail_energy": [record.tail_energy for record, _, _ in rows],
        "factor_bias": [record.factor_bias for record, _, _ in rows],
    }
