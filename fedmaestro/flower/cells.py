"""What a comparison runs: variants × seeds of one experiment, each cell an ordinary run folder under ``cells/``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedmaestro.config.base import Value, parse_assignment
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UserError
from fedmaestro.places import file_name
from fedmaestro.rounds.method import method_of
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import ACCURACY, AS_IT_IS, Analysis, Results, Summary
from fedmaestro.runs.results import FinishedCell, strategy_results
from fedmaestro.runs.start import resolve

_FIXED = (
    "seed",
    "out",
    "use",
    "data.",
    "train.strategy",
    "fleet.preset",
    "fleet.file",
    "fleet.match-macs",
    "model.name",
)
"""What all variants of a comparison share: settings, or tables with a dot at the end."""


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
    """

    name: str
    base: ExperimentConfig
    variants: Sequence[Variant]
    seeds: Sequence[int]
    folder: Path
    cells: Sequence[Cell]
    facts: Mapping[str, Mapping[str, str]]
    analysis: Analysis = AS_IT_IS

    @property
    def description(self) -> str:
        """``compare.toml``: what is compared, and the settings that all cells share."""
        shared = self.base.model_dump(by_alias=True)
        shared["train"].pop("strategy")
        rows = [{"label": v.label, "strategy": v.strategy, "set": dict(v.changes)} for v in self.variants]
        return tomli_w.dumps(
            {"experiment": self.name, "seeds": list(self.seeds), "strategies": rows, "settings": shared}
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
        private = ("seed", "out", "use", "data.dir", "train.strategy")
        return Results(
            experiment=self.name,
            complete=all(len(row.seeds) == len(self.seeds) for row in rows),
            seeds=list(self.seeds),
            tiers=next((list(row.tiers) for row in rows if row.tiers), []),
            metric=next((finished.summary.metric for _, finished in done), ACCURACY),
            matched_macs=self.base.fleet.match_macs,
            protocol={key: value for key, value in self.base.flat().items() if key not in private},
            analysis=self.analysis,
            strategies=rows,
        )


def parse_variant(text: str) -> Variant:
    """Parse ``[LABEL:]NAME[+KEY=VALUE…]``, for example ``both:nested+train.objective=paired-prefixes``."""
    parts = re.fullmatch(r"(?:(?P<label>[^:=]+):)?(?P<name>[A-Za-z0-9_-]+)(?P<set>(?:\+[^+=]+=[^+]*)*)", text.strip())
    if parts is None:
        raise UserError(f"strategy {text!r}: write NAME, or LABEL:NAME+KEY=VALUE")
    changes = dict(parse_assignment(assignment) for assignment in parts["set"].split("+")[1:])
    for key in changes:
        if any(key == fixed or (fixed.endswith(".") and key.startswith(fixed)) for fixed in _FIXED):
            raise UserError(f"strategy {text!r}: {key} is the same for all of a comparison: give it with --set")
    return Variant(label=parts["label"] or text.strip(), strategy=parts["name"], changes=changes)


def shared_settings(
    experiment: str | Path | ExperimentConfig | None,
    overrides: Mapping[str, Any] | None,
    data_dir: str | Path | None,
    variants: Sequence[Variant],
) -> ExperimentConfig:
    """Return what all cells share; ranks and widths are matched when both occur and nobody decided otherwise."""
    changes = dict(overrides or {})
    base = resolve(ExperimentConfig, experiment, changes, data_dir, None, False)
    forms = {method_of(_with(base, variant)).submodel.form for variant in variants}
    if len(forms) > 1 and "fleet.match-macs" not in changes:
        changes["fleet.match-macs"] = True
    # The strategy of the file is one of the variants or none.
    changes["train.strategy"] = variants[0].strategy
    return resolve(ExperimentConfig, experiment, changes, data_dir, None, False)


def plan_of(name: str, base: ExperimentConfig, variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> Plan:
    """Return the plan of a comparison; nothing is written.

    Raises:
        UserError: no seed, a row twice, a switch that a row does not have.
    """
    if not seeds:
        raise UserError("--seeds 0: at least one is needed")
    labels = [variant.folder_name for variant in variants]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"strategy {repeated[0]!r} is given twice: name each once, or give one a label (LABEL:NAME)")
    return Plan(
        name=name,
        base=base,
        variants=variants,
        seeds=seeds,
        folder=folder,
        cells=[_cell(base, variant, seed, folder) for seed in seeds for variant in variants],
        facts={variant.label: _facts(base, variant) for variant in variants},
    )


def _with(base: ExperimentConfig, variant: Variant, more: Mapping[str, Value] | None = None) -> ExperimentConfig:
    changes = {"train.strategy": variant.strategy, **variant.changes, **(more or {})}
    return base.changed(changes, f"strategy {variant.label!r}")


def _cell(base: ExperimentConfig, variant: Variant, seed: int, folder: Path) -> Cell:
    own = folder / "cells" / f"{variant.folder_name}-seed{seed}"
    config = _with(base, variant, {"seed": seed, "out": str(own), "train.record-bias": True})
    return Cell(variant=variant, seed=seed, config=config, folder=RunFolder(own))


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
