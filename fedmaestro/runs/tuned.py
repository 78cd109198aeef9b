"""``tuned.toml``: which trial is chosen, and what a comparison may do with it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmaestro.config.base import Value
from fedmaestro.config.search import settings_text
from fedmaestro.errors import UserError
from fedmaestro.places import absolute
from fedmaestro.runs.reader import parse, read_toml
from fedmaestro.runs.records import MetricFacts, Trial, Tuned, TunedRow

FILE = "tuned.toml"

_FREE = (
    "seed",
    "out",
    "use",
    "data.dir",
    "data.validation",
    "train.strategy",
    "train.evaluate-every",
    "train.cohort-size",
    "train.record-bias",
    "train.reply-timeout-seconds",
)
"""Settings that may differ between a tuning and the comparison that uses it: they change no result, or must differ."""

_FILES = ("data.file", "fleet.file")
"""Settings that are paths: their last part counts."""

_SHOWN = 3


def best_of(trials: Sequence[Trial], metric: MetricFacts) -> Trial | None:
    """Return the best trial, of equal ones the first; None where all failed."""
    best: Trial | None = None
    for trial in trials:
        if trial.value is not None and (best is None or metric.better(trial.value, best.value or 0.0)):
            best = trial
    return best


def read_tuned(path: str | os.PathLike[str]) -> Tuned:
    """Return a finished tuning.

    Args:
        path: its file, or its folder.

    Raises:
        UserError: it cannot be read, is not finished, or says another choice than its trials do.
    """
    file = absolute(Path(path))
    file = file / FILE if file.is_dir() else file
    tuned = parse(read_toml(file), Tuned, str(file))
    if not tuned.complete:
        raise UserError(f"{file}: the tuning is not finished: go on with `fedmaestro tune --resume`")
    for row in tuned.rows:
        best = best_of(row.trials, tuned.metric)
        if best is None:
            raise UserError(f"{file}: all trials of row {row.name!r} failed: search other values for it")
        if (row.trial, row.chosen) != (best.number, best.settings):
            raise UserError(
                f"{file}: row {row.name!r} says {settings_text(row.chosen)}, and its best trial is {best.number} with "
                f"{settings_text(best.settings)}: restore the file, or tune again"
            )
    return tuned


def chosen_for(tuned: Tuned, name: str, strategy: str, changes: Mapping[str, Value]) -> dict[str, Value]:
    """Return the settings that were chosen for a row.

    Raises:
        UserError: the tuning has no such row, or what it calls so is another one.
    """
    row = next((row for row in tuned.rows if row.name == name), None)
    if row is None:
        names = ", ".join(row.name for row in tuned.rows)
        raise UserError(f"--tuned: row {name!r} was not tuned; rows that were: {names}")
    if (row.strategy, row.set) != (strategy, dict(changes)):
        now, before = _variant_text(strategy, changes), _variant_text(row.strategy, row.set)
        raise UserError(f"--tuned: row {name!r} is {now} here, and was tuned as {before}")
    return row.chosen


def check_comparable(tuned: Tuned, settings: Mapping[str, Value], seeds: Sequence[int], names: Sequence[str]) -> None:
    """Raise UserError where a comparison uses a seed of the tuning, or is another experiment.

    Args:
        tuned: the tuning.
        settings: what all cells of the comparison share, by dotted keys.
        seeds: of the comparison.
        names: its rows.
    """
    if used := [seed for seed in seeds if seed in tuned.seeds]:
        raise UserError(
            f"seed {used[0]} is one that the rows were tuned on ({', '.join(map(str, tuned.seeds))}): a comparison "
            "needs others: give other --seeds, or another --set seed=N to count from"
        )
    chosen = [row.chosen for row in tuned.rows if row.name in names]
    replaced = set.intersection(*map(set, chosen)) if chosen else set()
    keys = [key for key in settings if key not in _FREE and key not in replaced]
    before = tuned.settings
    if differ := [key for key in keys if _compared(key, before.get(key)) != _compared(key, settings[key])]:
        said = [f"{key} = {before.get(key)!r} there, {settings[key]!r} here" for key in differ[:_SHOWN]]
        more = f", and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise UserError(f"--tuned: it was made for another experiment ({'; '.join(said)}{more}): tune this one")


def to_toml(tuned: Tuned) -> dict[str, Any]:
    """Return what TOML holds, which has no null: what is None is left out."""
    return tuned.model_dump(mode="json", exclude_none=True)


def row_of(row: TunedRow, trials: Sequence[Trial], metric: MetricFacts) -> TunedRow:
    """Return a row with its trials and the one that is chosen."""
    best = best_of(trials, metric)
    cost = sum((trial.cost for trial in trials), row.cost)
    facts = {} if best is None else {"trial": best.number, "chosen": best.settings, "value": best.value}
    return row.model_copy(update={"trials": list(trials), "cost": cost, **facts})


def _variant_text(strategy: str, changes: Mapping[str, Value]) -> str:
    return "+".join([strategy, *(f"{key}={value}" for key, value in changes.items())])


def _compared(key: str, value: Value | None) -> Value | None:
    return " ".join(Path(word).name for word in value.split()) if key in _FILES and isinstance(value, str) else value
