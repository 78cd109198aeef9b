"""Cells: what comparisons and tunings run, one variant of an experiment with one seed each.

Each is an ordinary run folder under ``cells/``.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from flwr.serverapp import Grid

from fedmaestro.config.base import Value, parse_assignment
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UserError
from fedmaestro.flower.federation import FREE_ON_RESUME, Federation
from fedmaestro.flower.run import prepare
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.places import file_name
from fedmaestro.report.compare_files import EXPERIMENTS
from fedmaestro.rounds.method import method_of
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.code import activate
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.history import check_seal
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import ACCURACY, AS_IT_IS, Analysis, Results, Summary, Tuned
from fedmaestro.runs.results import FinishedCell, strategy_results
from fedmaestro.runs.start import check_folder, code_of, resolve
from fedmaestro.runs.tuned import to_toml

COMPARISON, TUNING = "compare.toml", "tune.toml"
"""The files that say what is in a folder, beside ``EXPERIMENTS``."""

_KINDS = {COMPARISON: "comparison", EXPERIMENTS: "comparison of several experiments", TUNING: "tuning"}

Experiment = str | Path | ExperimentConfig | None
"""TOML file or configuration; None: the demo on embedded data."""

_FIXED = (
    "seed",
    "out",
    "use",
    "data.",
    "train.strategy",
    "fleet.preset",
    "fleet.file",
    "fleet.assignment",
    "fleet.match-macs",
    "fleet.match-by",
    "model.name",
)
"""What all variants share: settings, or tables with a dot at the end."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A strategy to compare, perhaps with some of its switches changed."""

    label: str
    strategy: str
    changes: Mapping[str, Value]

    @property
    def folder_name(self) -> str:
        """The label as a file name."""
        return file_name(self.label)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One variant with one seed."""

    variant: Variant
    seed: int
    config: ExperimentConfig
    folder: RunFolder

    def finished(self) -> FinishedCell | None:
        """Return its results, or None when it was not run to the end."""
        path = self.folder.summary
        if not path.exists() or (summary := read_json(path, Summary)).interrupted:
            return None
        return FinishedCell(seed=self.seed, summary=summary, records=self.folder.read_rounds())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells of one experiment.

    Attributes:
        name: of the experiment.
        base: what all cells share.
        variants: the rows.
        seeds: of each.
        folder: of the comparison.
        cells: seed by seed.
        facts: what each row is, by its label: said by the user's code that was loaded when the plan was made.
        analysis: how the rows are judged.
        tuning: how their settings were chosen; None: nobody says.
    """

    name: str
    base: ExperimentConfig
    variants: Sequence[Variant]
    seeds: Sequence[int]
    folder: Path
    cells: Sequence[Cell]
    facts: Mapping[str, Mapping[str, str]]
    analysis: Analysis = AS_IT_IS
    tuning: Tuned | None = None

    @property
    def description(self) -> str:
        """``compare.toml``: what is compared, and the settings that all cells share."""
        shared = self.base.model_dump(by_alias=True)
        shared["train"].pop("strategy")
        rows = [{"label": v.label, "strategy": v.strategy, "set": dict(v.changes)} for v in self.variants]
        tuned = {} if self.tuning is None else {"tuned": to_toml(self.tuning)}
        return tomli_w.dumps(
            {"experiment": self.name, "seeds": list(self.seeds), "strategies": rows, "settings": shared, **tuned}
        )

    @property
    def evaluated_rounds(self) -> int:
        """Rounds after the start that the row with the fewest evaluates."""
        of_cells = [cell.config.train for cell in self.cells]
        return min(-(-train.rounds // train.evaluate_every) for train in of_cells)

    def results(self) -> Results:
        """Return what the finished cells have come to."""
        done = [(cell, finished) for cell in self.cells if (finished := cell.finished()) is not None]
        rows = [
            strategy_results(
                [finished for cell, finished in done if cell.variant is variant],
                self.analysis,
                **self.facts[variant.label],
            )
            for variant in self.variants
        ]
        private = {"seed", "out", "use", "data.dir", "train.strategy"}
        private |= set.intersection(*(set(variant.changes) for variant in self.variants))  # nothing that they share
        return Results(
            experiment=self.name,
            complete=all(len(row.seeds) == len(self.seeds) for row in rows),
            seeds=list(self.seeds),
            tiers=next((list(row.tiers) for row in rows if row.tiers), []),
            metric=next((finished.summary.metric for _, finished in done), ACCURACY),
            matched_macs=self.base.fleet.match_macs,
            protocol={key: value for key, value in self.base.flat().items() if key not in private},
            analysis=self.analysis,
            tuned=self.tuning,
            strategies=rows,
        )


def parse_variant(text: str) -> Variant:
    """Parse ``[LABEL:]NAME[+KEY=VALUE…]``, for example ``both:nested+train.objective=paired-prefixes``."""
    parts = re.fullmatch(r"(?:(?P<label>[^:=]+):)?(?P<name>[A-Za-z0-9_-]+)(?P<set>(?:\+[^+=]+=[^+]*)*)", text.strip())
    if parts is None:
        raise UserError(f"strategy {text!r}: write NAME, or LABEL:NAME+KEY=VALUE")
    changes = dict(parse_assignment(assignment) for assignment in parts["set"].split("+")[1:])
    for key in changes:
        check_free(key, f"strategy {text!r}")
    return Variant(label=parts["label"] or text.strip(), strategy=parts["name"], changes=changes)


def check_free(key: str, where: str) -> None:
    """Raise UserError for a setting that all variants share."""
    if any(key == fixed or (fixed.endswith(".") and key.startswith(fixed)) for fixed in _FIXED):
        raise UserError(f"{where}: {key} is the same for all of a comparison: give it with --set")


def check_rows(variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Raise UserError without a seed, or for two variants of one name."""
    if not seeds:
        raise UserError("--seeds 0: at least one is needed")
    labels = [variant.folder_name for variant in variants]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"strategy {repeated[0]!r} is given twice: name each once, or give one a label (LABEL:NAME)")


def seeds_from(first: int, seeds: int | Sequence[int]) -> list[int]:
    """Return so many seeds from ``first`` on, or those that are named."""
    return list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)


def base_of(
    experiment: Experiment,
    variants: Sequence[Variant],
    overrides: Mapping[str, Any],
    data_dir: str | Path | None,
    more: Sequence[Value] = (),
) -> ExperimentConfig:
    """Load the user's code of an experiment and return what all cells share.

    Ranks and widths are matched when both occur and nobody decided otherwise.

    Args:
        experiment: its file or configuration.
        variants: the rows; their words may name code of the user's.
        overrides: dotted settings for all cells.
        data_dir: folder of local data.
        more: values that rows may be given and that may name code of the user's.
    """
    words = [word for variant in variants for word in (variant.strategy, *variant.changes.values())]
    base = resolve(ExperimentConfig, experiment, overrides, data_dir, None, False)
    activate(code_of(base, more=" ".join(map(str, [*words, *more]))))
    changes = dict(overrides)
    forms = {method_of(_with(base, variant)).submodel.form for variant in variants}
    if len(forms) > 1 and "fleet.match-macs" not in changes:
        changes["fleet.match-macs"] = True
    # The strategy of the file is one of the variants or none.
    changes["train.strategy"] = variants[0].strategy
    return resolve(ExperimentConfig, experiment, changes, data_dir, None, False)


def plan_of(
    name: str,
    base: ExperimentConfig,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    tuning: Tuned | None = None,
) -> Plan:
    """Return the plan of a comparison; nothing is written.

    Raises:
        UserError: no seed, a row twice, a switch that a row does not have.
    """
    check_rows(variants, seeds)
    more = {"train.record-bias": True}
    return Plan(
        name=name,
        base=base,
        variants=variants,
        seeds=seeds,
        folder=folder,
        cells=[cell_of(base, variant, seed, folder, more) for seed in seeds for variant in variants],
        facts={variant.label: _facts(base, variant) for variant in variants},
        tuning=tuning,
    )


def cell_of(
    base: ExperimentConfig, variant: Variant, seed: int, folder: Path, more: Mapping[str, Value] | None = None
) -> Cell:
    """Return the run of a variant with a seed, ``more`` settings laid over it, below ``folder``."""
    own = folder / "cells" / f"{variant.folder_name}-seed{seed}"
    config = _with(base, variant, {"seed": seed, "out": str(own), **(more or {})})
    return Cell(variant=variant, seed=seed, config=config, folder=RunFolder(own))


def check_place(folder: Path, marker: str, resume: bool, *, new: bool = False) -> None:
    """Check that cells may lie below ``folder``; their own folders are checked one by one.

    Args:
        folder: of the comparison, or of the tuning.
        marker: the file that says that there is one.
        resume: whether to go on.
        new: whether there need not be one to go on with.

    Raises:
        UserError: there is something else, or nothing to go on with.
    """
    RunFolder(folder).check_usable()
    held = [name for name in _KINDS if (folder / name).exists()]
    if resume and marker not in held and (held or not new):
        raise UserError(f"{folder} holds no {_KINDS[marker]} to resume: leave --resume out")
    if not resume and (held or RunFolder(folder).holds_run()):
        raise UserError(f"{folder} already holds a {_KINDS[marker]} or a run: add --resume, or choose another --out")


def check_kept(cell: Cell) -> None:
    """Raise UserError where a cell's folder holds another run, or results that were changed."""
    if cell.folder.holds_run():
        check_folder(cell.folder, cell.config, resume=True, free=FREE_ON_RESUME)
        if cell.folder.summary.exists():
            check_seal(cell.folder)


def run_cell(cell: Cell, grid: Grid, stop: threading.Event, observers: Sequence[ComparisonObserver], name: str) -> None:
    """Run a cell to its end, from its checkpoint if it has one.

    Args:
        cell: one that is not finished.
        grid: the hosts.
        stop: is set by Ctrl-C.
        observers: are told about the run.
        name: of the experiment.

    Raises:
        InterruptedRunError: Ctrl-C.
    """
    resume = cell.folder.holds_run()
    folder, env = prepare(cell.config, name, resume=resume)
    if Federation(grid, env, folder, stop, observers, resume=resume).run().interrupted:
        raise InterruptedRunError(f"stopped in {folder.path}")


def was_interrupted(start: Callable[[], None], written: Sequence[Path], *, resume: bool) -> bool:
    """Start the cells and return whether Ctrl-C ended them; a start that is refused leaves nothing behind.

    Args:
        start: runs the cells.
        written: the files that were written for this, each in the folder that it describes.
        resume: whether they were there before.
    """
    try:
        start()
    except InterruptedRunError:
        return True
    except UserError:
        if not resume and not any(any((path.parent / "cells").glob("*")) for path in written):
            _withdraw(written)
        raise
    return False


def _withdraw(files: Sequence[Path]) -> None:
    """Remove what was written of something that could not start."""
    for path in files:
        path.unlink()
        with suppress(OSError):
            path.parent.rmdir()


def _with(base: ExperimentConfig, variant: Variant, more: Mapping[str, Value] | None = None) -> ExperimentConfig:
    changes = {"train.strategy": variant.strategy, **variant.changes, **(more or {})}
    return base.changed(changes, f"strategy {variant.label!r}")


def _facts(base: ExperimentConfig, variant: Variant) -> dict[str, str]:
    method = method_of(_with(base, variant))
    changed = ", ".join(f"{key}={value}" for key, value in variant.changes.items())
    return {
        "name": variant.label,
        "summary": method.summary + (f" (with {changed})" if changed else ""),
        "source": method.source,
        "form": method.submodel.form,
        "submodel": method.submodel.describe(),
        "objective": method.objective.name,
        "aggregation": method.aggregation.name,
        "server": method.describe_server(),
    }
