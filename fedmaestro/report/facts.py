"""What a report says about a run: from its summary, else from its rounds and configuration."""

import json
from collections.abc import Mapping
from typing import Any

from fedmaestro.config.base import flatten
from fedmaestro.report.curves import as_number, metric_of, tier_curves
from fedmaestro.report.format import MISSING, Shown
from fedmaestro.runs.reader import RunRecord

NAN = float("nan")

# The keys of summary.json and, for a run without one, where the configuration says the same.
HEADLINE = {
    "dataset": "data.name",
    "model": "model.name",
    "strategy": "train.strategy",
    "objective": "train.objective",
    "seed": "seed",
}


def headline(run: RunRecord) -> dict[str, str]:
    """Return dataset, model, strategy, objective and seed."""
    config = flat_config(run.config)
    return {
        key: str(config.get(dotted, MISSING) if run.summary is None else getattr(run.summary, key))
        for key, dotted in HEADLINE.items()
    }


def run_title(run: RunRecord) -> str:
    """Return the headline as one line: ``mnist · lenet · nested · own-prefix · seed 0``."""
    facts = headline(run)
    names = [value for key, value in facts.items() if key != "seed" and value != MISSING]
    names += [f"seed {facts['seed']}"] if facts["seed"] != MISSING else []
    return " · ".join([*names, *(["validation split, not test"] if split(run) == "validation" else [])])


def split(run: RunRecord) -> str:
    """Return what the run's values are of: ``test``, or ``validation`` (``data.validation``)."""
    if run.summary is not None:
        return run.summary.split
    return "validation" if as_number(flatten(run.config).get("data.validation")) > 0 else "test"


def tier_facts(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Return the facts of each tier, largest tier first; a run without summary has only ``final`` and ``best``."""
    facts = {curve.tier: {"final": curve.final, "best": curve.best} for curve in tier_curves(run.rounds)}
    if run.summary is not None:
        for name, known in run.summary.tiers.items():
            facts[name] = {**facts.get(name, {}), **known.to_dict()}
    return facts


def shown(run: RunRecord) -> Shown:
    """Return how the run's main metric is shown."""
    return Shown(metric_of(run.rounds) if run.summary is None else run.summary.metric)


def other_metrics(run: RunRecord) -> dict[str, dict[str, float]]:
    """Return the other metrics of each tier in the last evaluated round: ``{metric: {tier: value}}``."""
    last = next((row for row in reversed(run.rounds) if row.tiers), None)
    main = shown(run).name
    found: dict[str, dict[str, float]] = {}
    for tier, values in (last.tiers if last else {}).items():
        for name, value in values.items():
            if name not in (main, "loss"):
                found.setdefault(name, {})[tier] = as_number(value)
    return found


def totals(run: RunRecord) -> dict[str, float]:
    """Return rounds, bytes both ways, virtual and wall seconds, failed and dropped devices so far."""
    keys = ("download_bytes", "upload_bytes", "virtual_seconds", "wall_seconds", "failed", "dropped")
    sums = {key: float(sum(getattr(row, key) for row in run.rounds)) for key in keys}
    if run.summary is not None:
        sums |= {"virtual_seconds": run.summary.virtual_seconds, "wall_seconds": run.summary.wall_seconds}
    return {"rounds": max((row.round for row in run.rounds), default=0), **sums}


def epsilon(run: RunRecord) -> float | None:
    """Return ε of the rounds so far; None without differential privacy."""
    return next((row.epsilon for row in reversed(run.rounds) if row.epsilon is not None), None)


def rank_history(run: RunRecord) -> list[tuple[float, dict[str, dict[str, int]]]]:
    """Return (round, ``{tier: {layer: rank}}``) where ranks could change; the last entry is the last round's."""
    changes = [(float(row.round), row.ranks) for row in run.rounds if row.ranks]
    if changes and (last := float(run.rounds[-1].round)) > changes[-1][0]:
        changes.append((last, changes[-1][1]))
    return changes


def full_ranks(run: RunRecord) -> dict[str, int]:
    """Return the ranks of the whole model at the start; empty where ranks could not change."""
    return next((row.full_ranks for row in run.rounds if row.full_ranks), {})


def mean_and_worst(run: RunRecord) -> tuple[float, float]:
    """Return the mean and the worst final value over the tiers; nan where there is none."""
    if run.summary is not None:
        return as_number(run.summary.mean_tier), as_number(run.summary.worst_tier)
    finals = [as_number(facts.get("final")) for facts in tier_facts(run).values()]
    finals = [value for value in finals if value == value]
    return (sum(finals) / len(finals), as_number(shown(run).metric.worst(finals))) if finals else (NAN, NAN)


def flat_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Return nested tables as dotted names, as ``--set`` takes them, with values as text."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        for key, value in flatten(config).items()
    }
