"""What a tuning has searched, chosen and cost, for people: ``tuning.md``, and a table of a comparison."""

import math
from collections.abc import Sequence

from fedmaestro.config.base import Value
from fedmaestro.config.search import is_number, settings_text, text_of
from fedmaestro.report.format import MISSING, Shown, format_bytes, format_count, format_seconds
from fedmaestro.report.text_table import Entry, Number, TextTable, md, to_markdown
from fedmaestro.runs.records import Trial, Tuned, TunedRow, TuningCost

_COST = ("Runs", "Device updates", "Down", "Up", "Virtual", "Wall")


def tuned_line(tuned: Tuned) -> str:
    """Return on one line how settings of the rows were chosen."""
    held = tuned.validation if tuned.validation >= 1 else f"{100 * tuned.validation:.3g} % of the"
    cost = tuned.cost
    return (
        f"{tuned.sampler}, {tuned.trials} trials of every row, seeds {', '.join(map(str, tuned.seeds))}, by "
        f"{tuned.metric.name} on {held} training examples, held out for that, in the final round, mean of tiers; "
        f"{cost.runs} runs, {format_count(cost.updates)} device updates, {format_seconds(cost.wall_seconds)} wall time"
    )


def tuned_table(tuned: Tuned, heading: str = "Tuning") -> TextTable:
    """Return what was searched for each row, what was chosen and what it cost."""
    show = Shown(tuned.metric)
    return TextTable(
        heading=heading,
        note="What was tried for each row, what was chosen by its value on the validation split, and what all its "
        "trials have cost.",
        header=["Row", "Searched", "Chosen", "Trials", "Failed", f"Validation {show.heading}", *_COST],
        rows=[_row_entries(row, show) for row in tuned.rows],
    )


def _row_entries(row: TunedRow, show: Shown) -> list[Entry]:
    searched = "; ".join(f"{key}: {values}" for key, values in row.searched.items())
    failed = sum(trial.value is None for trial in row.trials)
    counts = [Number(str(count), count) for count in (len(row.trials), failed)]
    value = _value(row.value, show)
    return [row.name, searched, settings_text(row.chosen) or MISSING, *counts, value, *_cost_entries(row.cost)]


def _value(value: float | None, show: Shown, *, best: bool = False) -> Number:
    return Number(show.number(value), math.nan if value is None else value, best)


def _cost_entries(cost: TuningCost) -> list[Number]:
    return [
        Number(str(cost.runs), cost.runs),
        Number(format_count(cost.updates), cost.updates),
        Number(format_bytes(cost.download_bytes), cost.download_bytes),
        Number(format_bytes(cost.upload_bytes), cost.upload_bytes),
        Number(format_seconds(cost.virtual_seconds), cost.virtual_seconds),
        Number(format_seconds(cost.wall_seconds), cost.wall_seconds),
    ]


def edge_notes(tuned: Tuned) -> list[str]:
    """Return a sentence for every chosen value at an end of what was declared."""
    return [
        f"{row.name}: {key} = {text_of(row.chosen[key])} is {_END[end]} that was declared: a better one may lie beyond"
        for row in tuned.rows
        for key, end in row.edges.items()
    ]


_END = {
    "smallest": "the smallest value",
    "largest": "the largest value",
    "lowest": "at the lower end of the range",
    "highest": "at the upper end of the range",
}


def tuning_markdown(tuned: Tuned) -> str:
    """Return ``tuning.md``: the choice of every row, its cost, notes, and all trials with the chosen one in bold."""
    notes = [*edge_notes(tuned), *_failure_notes(tuned)]
    parts = [
        f"# Tuning: {md(tuned.experiment)}",
        _protocol(tuned),
        "" if tuned.complete else "**Incomplete**: go on with `--resume`.",
        to_markdown(tuned_table(tuned, "Chosen")),
        "\n".join(f"- {md(note)}" for note in notes),
        *(to_markdown(_trials_table(tuned, row)) for row in tuned.rows),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in tuned.versions.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _protocol(tuned: Tuned) -> str:
    show = Shown(tuned.metric)
    direction = "" if show.metric.higher_is_better else " (lower is better)"
    return (
        f"{md(tuned_line(tuned))}. Values: {show.heading}{direction} on these examples, on which no device "
        "trains; the test set was not read. Of equal trials the first is chosen; a trial of which a run failed is "
        "worse than all others."
    )


def _failure_notes(tuned: Tuned) -> list[str]:
    return [
        f"{row.name}: trial {trial.number} ({settings_text(trial.settings)}) failed: {trial.failed}"
        for row in tuned.rows
        for trial in row.trials
        if trial.value is None
    ]


def _trials_table(tuned: Tuned, row: TunedRow) -> TextTable:
    keys = list(row.searched)
    several = [f"Seed {seed}" for seed in tuned.seeds] if len(tuned.seeds) > 1 else []
    return TextTable(
        heading=row.name,
        note="",
        header=["Trial", *keys, Shown(tuned.metric).heading, *several, "Device updates", "Wall"],
        rows=[_trial_entries(row, trial, keys, len(several), Shown(tuned.metric)) for trial in row.trials],
    )


def _trial_entries(row: TunedRow, trial: Trial, keys: Sequence[str], seeds: int, show: Shown) -> list[Entry]:
    best = trial.number == row.trial
    cost = trial.cost
    values = (
        [_value(value, show) for value in trial.values] if len(trial.values) == seeds else [Number(MISSING)] * seeds
    )
    return [
        Number(str(trial.number), trial.number, best),
        *(_setting(trial.settings[key], best) for key in keys),
        Number("failed") if trial.value is None else _value(trial.value, show, best=best),
        *values,
        Number(format_count(cost.updates), cost.updates),
        Number(format_seconds(cost.wall_seconds), cost.wall_seconds),
    ]


def _setting(value: Value, best: bool) -> Number:
    return Number(text_of(value), float(value) if is_number(value) else math.nan, best)
