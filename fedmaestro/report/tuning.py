"""What a tuning has searched, chosen and cost, for people: ``tuning.md``, and a part of a comparison's ``table.md``."""

from collections.abc import Sequence

from fedmaestro.config.search import settings_text, text_of
from fedmaestro.report.format import MISSING, Shown, format_bytes, format_count, format_seconds
from fedmaestro.report.markdown import escaped, table
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


def tuned_table(tuned: Tuned) -> str:
    """Return what was searched for each row, what was chosen and what it cost, in Markdown."""
    show = Shown(tuned.metric)
    header = ["Row", "Searched", "Chosen", "Trials", "Failed", f"Validation {show.heading}", *_COST]
    return table(header, (_row_cells(row, show) for row in tuned.rows), text_columns=3)


def _row_cells(row: TunedRow, show: Shown) -> list[str]:
    searched = "; ".join(f"{key}: {values}" for key, values in row.searched.items())
    chosen = settings_text(row.chosen) or MISSING
    failed = sum(trial.value is None for trial in row.trials)
    counts = [str(len(row.trials)), str(failed), show.number(row.value)]
    return [*map(escaped, (row.name, searched, chosen)), *counts, *_cost_cells(row.cost)]


def _cost_cells(cost: TuningCost) -> list[str]:
    return [
        str(cost.runs),
        format_count(cost.updates),
        format_bytes(cost.download_bytes),
        format_bytes(cost.upload_bytes),
        format_seconds(cost.virtual_seconds),
        format_seconds(cost.wall_seconds),
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
        f"# Tuning: {escaped(tuned.experiment)}",
        _protocol(tuned),
        "" if tuned.complete else "**Incomplete**: go on with `--resume`.",
        "## Chosen",
        tuned_table(tuned),
        "\n".join(f"- {escaped(note)}" for note in notes),
        *(part for row in tuned.rows for part in (f"## {escaped(row.name)}", _trials_table(tuned, row))),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in tuned.versions.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _protocol(tuned: Tuned) -> str:
    show = Shown(tuned.metric)
    direction = "" if show.metric.higher_is_better else " (lower is better)"
    return (
        f"{escaped(tuned_line(tuned))}. Values: {show.heading}{direction} on these examples, on which no device "
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


def _trials_table(tuned: Tuned, row: TunedRow) -> str:
    show, keys = Shown(tuned.metric), list(row.searched)
    several = [f"Seed {seed}" for seed in tuned.seeds] if len(tuned.seeds) > 1 else []
    header = ["Trial", *map(escaped, keys), show.heading, *several, "Device updates", "Wall"]
    lines = [_trial_cells(row, trial, keys, len(several), show) for trial in row.trials]
    return table(header, lines, text_columns=1)


def _trial_cells(row: TunedRow, trial: Trial, keys: Sequence[str], seeds: int, show: Shown) -> list[str]:
    values = [show.number(value) for value in trial.values] if len(trial.values) == seeds else [MISSING] * seeds
    value = "failed" if trial.value is None else show.number(trial.value)
    cells = [str(trial.number), *(escaped(text_of(trial.settings[key])) for key in keys), value]
    if trial.number == row.trial:
        cells = [f"**{cell}**" for cell in cells]
    return [*cells, *values, format_count(trial.cost.updates), format_seconds(trial.cost.wall_seconds)]
