"""Compare strategies over seeds on one running Ray: the function behind ``fedmaestro compare``.

A cell is one strategy with one seed: an ordinary run folder under ``cells/``. Cells of a seed share the initial model,
the partition and the sampled devices, which depend on the seed only. A comparison that was interrupted anywhere goes on
with ``resume``: finished cells are kept, the one in work continues from its checkpoint, and the tables come out the
same.
"""

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmaestro.config.base import Value, parse_assignment
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UntrainedError, UserError
from fedmaestro.extend import given
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.federation import FREE_ON_RESUME, Federation
from fedmaestro.flower.run import check_trained, prepare, to_all
from fedmaestro.flower.simulation import checked_actors, simulate
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.places import absolute, file_name, new_folder
from fedmaestro.report.compare_page import write_comparison
from fedmaestro.rounds.method import method_of
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.code import activate
from fedmaestro.runs.folder import RunFolder, write_atomically, write_record
from fedmaestro.runs.frames import rounds_frame
from fedmaestro.runs.history import check_seal
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import ACCURACY, Results, StrategyResults, Summary, Tuned
from fedmaestro.runs.results import FinishedCell, strategy_results
from fedmaestro.runs.start import check_folder, code_of, name_of, resolve
from fedmaestro.runs.trust import honoured
from fedmaestro.runs.tuned import check_comparable, chosen_for, read_tuned, to_toml

if TYPE_CHECKING:
    import pandas as pd

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


@dataclass(frozen=True)
class Comparison:
    """A finished (or interrupted) comparison and its folder."""

    path: Path

    @property
    def results(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return read_json(self.path / "results.json", Results).to_dict()

    def to_pandas(self) -> "pd.DataFrame":
        """Return the tables of all cells that have rounds, one below the other (``runs.frames.rounds_frame``).

        ``variant`` is the label of a row of the comparison.
        """
        import pandas as pd

        frames = []
        for rounds in sorted((self.path / "cells").glob("*/rounds.jsonl")):
            frame = rounds_frame(rounds.parent)
            frame.insert(0, "variant", rounds.parent.name.rpartition("-seed")[0])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@honoured
def compare(
    experiment: str | Path | ExperimentConfig | None,
    strategies: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    model: Any = None,
    data: Any = None,
    task: Any = None,
    partition: Any = None,
    fleet: Any = None,
    use: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    tuned: str | os.PathLike[str] | None = None,
    out: str | Path | None = None,
    actors: int | None = None,
    gpus_per_actor: float = 0.0,
    resume: bool = False,
    trust: bool = False,  # noqa: ARG001 - ``honoured`` reads it
    ray_address: str | None = None,
    observers: Sequence[ComparisonObserver] = (),
    client_app: ClientApp = default_client_app,
) -> Comparison:
    """Run every strategy with every seed and write tables, plots and a report.

    Rank and width submodels get the same MACs per tier (``fleet.match-macs``) when both kinds are compared, unless the
    experiment decides about it.

    Args:
        experiment: TOML file or configuration; None: the demo on embedded data.
        strategies: ``[LABEL:]NAME[+KEY=VALUE…]``: rows of ``STRATEGIES``, switches changed, names to print.
        seeds: how many (counted from the experiment's own), or which.
        model: see ``run``, as for the next four; strategies, objectives and aggregations of your own are registered
            (``fedmaestro.extend``) and named in ``strategies``.
        data: see there.
        task: see there.
        partition: see there.
        fleet: see there.
        use: files or modules of user code.
        overrides: dotted settings for all cells.
        data_dir: folder of local data.
        tuned: what ``tune`` has returned, or the file or folder that it has written: every row runs with the settings
            that were chosen for it, on other seeds than they were chosen on.
        out: the comparison's folder; a new one under ``runs/`` by default.
        actors: Ray actors, one per free CPU by default; 0: all work is done in this process.
        gpus_per_actor: GPUs of each actor, also parts of one; with ``actors=0``, of this process; 0: the CPU.
        resume: go on with the comparison in ``out``; strategies and seeds may be added.
        trust: run the code that a run folder holds (``out``, or that of ``experiment``), also where somebody else has
            written it.
        ray_address: a running Ray cluster.
        observers: are told about the progress.
        client_app: the hosts' app.

    Raises:
        UserError: anything wrong with the input; nothing was written then.
        UntrainedError: a cell in which no update counted; everything was written then.
        KeyboardInterrupt: Ctrl-C before anything was finished.
    """
    tuning = None if tuned is None else read_tuned(tuned)
    variants = [_as_tuned(parse_variant(text), tuning) for text in strategies]
    objects = {"model": model, "dataset": data, "task": task, "partition": partition, "fleet": fleet}
    overrides = given(objects, use, overrides)
    words = " ".join(f"{variant.strategy} {' '.join(map(str, variant.changes.values()))}" for variant in variants)
    activate(code_of(resolve(ExperimentConfig, experiment, overrides, data_dir, None, False), more=words))
    base = base_of(experiment, overrides, data_dir, variants)
    numbers = list(range(base.seed, base.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    check_rows(variants, numbers)
    if tuning is not None:
        check_comparable(tuning, base.flat(), numbers, [variant.label for variant in variants])
    name = name_of(experiment, base)
    folder = Path(out or base.out or new_folder(f"{name}-compare"))
    folder = absolute(folder)
    more = {"train.record-bias": True}
    cells = [cell_of(base, variant, seed, folder, more) for seed in numbers for variant in variants]
    check_place(folder, "compare.toml", resume)
    actors = checked_actors(actors)
    # Everything that can be wrong with a strategy shows here, before anything is written or started.
    for cell in cells:
        check_kept(cell)
    for cell in cells[: len(variants)]:
        prepare(cell.config, name, resume=cell.folder.holds_run(), on_data=to_all(observers))
    write_atomically(folder / "compare.toml", _description(base, name, variants, numbers, tuning))
    stop = threading.Event()
    todo = [cell for cell in cells if cell.finished() is None]

    def tell_cells() -> None:
        done = sum(cell.finished() is not None for cell in cells)
        for observer in observers:
            observer.on_cells(folder, done, len(cells))

    def write() -> Results:
        results = _results(name, base, variants, numbers, cells, tuning)
        write_record(folder / "results.json", results)
        return results

    def server(grid: Grid) -> None:
        for cell in todo:
            tell_cells()
            for observer in observers:
                observer.on_cell(cell.variant.label, cell.seed)
            run_cell(cell, grid, stop, observers, name)
            write()

    def start() -> None:
        simulate(server, client_app, actors=actors, gpus_per_actor=gpus_per_actor, stop=stop, ray_address=ray_address)

    interrupted = bool(todo) and was_interrupted(start, folder / "compare.toml", resume=resume)
    results = write()
    if interrupted and not any(row.seeds for row in results.strategies):
        raise KeyboardInterrupt
    tell_cells()
    write_comparison(results, folder)
    check_all_trained(cells, folder)
    return Comparison(folder)


def was_interrupted(start: Callable[[], None], description: Path, *, resume: bool) -> bool:
    """Start the cells and return whether Ctrl-C ended them; a start that is refused leaves nothing behind.

    Args:
        start: runs the cells.
        description: file in the folder of the comparison, or of the tuning, that was written for this.
        resume: whether it was there before.
    """
    try:
        start()
    except InterruptedRunError:
        return True
    except UserError:
        if not resume and not any((description.parent / "cells").glob("*")):
            description.unlink()
            with suppress(OSError):
                description.parent.rmdir()
        raise
    return False


def check_kept(cell: Cell) -> None:
    """Raise UserError where a cell's folder holds another run, or results that were changed."""
    if cell.folder.holds_run():
        check_folder(cell.folder, cell.config, resume=True, free=FREE_ON_RESUME)
        if cell.folder.summary.exists():
            check_seal(cell.folder)


def check_all_trained(cells: Sequence[Cell], folder: Path) -> None:
    """Raise UntrainedError where a finished cell has learnt nothing."""
    wrong = []
    for cell in cells:
        if (done := cell.finished()) is not None:
            try:
                check_trained(done.summary, cell.folder)
            except UntrainedError as error:
                wrong.append(f"{cell.variant.label}, seed {cell.seed}: {error}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UntrainedError(f"{wrong[0]}{more}; the comparison is in {folder}", folder)


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


def _as_tuned(variant: Variant, tuning: Tuned | None) -> Variant:
    """Return the variant with the settings that were chosen for it."""
    if tuning is None:
        return variant
    chosen = chosen_for(tuning, variant.label, variant.strategy, variant.changes)
    return replace(variant, changes={**variant.changes, **chosen})


def base_of(
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


def _with(base: ExperimentConfig, variant: Variant, more: Mapping[str, Value] | None = None) -> ExperimentConfig:
    changes = {"train.strategy": variant.strategy, **variant.changes, **(more or {})}
    return base.changed(changes, f"strategy {variant.label!r}")


def cell_of(
    base: ExperimentConfig, variant: Variant, seed: int, folder: Path, more: Mapping[str, Value] | None = None
) -> Cell:
    """Return the run of a variant with a seed in the folder of a comparison, ``more`` settings laid over it."""
    own = folder / "cells" / f"{variant.folder_name}-seed{seed}"
    config = _with(base, variant, {"seed": seed, "out": str(own), **(more or {})})
    return Cell(variant=variant, seed=seed, config=config, folder=RunFolder(own))


def check_rows(variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Raise UserError without a seed, or for two variants of one name."""
    if not seeds:
        raise UserError("--seeds 0: at least one is needed")
    labels = [variant.folder_name for variant in variants]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"strategy {repeated[0]!r} is given twice: name each once, or give one a label (LABEL:NAME)")


def check_place(folder: Path, description: str, resume: bool, what: str = "comparison") -> None:
    """Check that a comparison, or a tuning, may use ``folder``; the cells' own folders are checked one by one."""
    RunFolder(folder).check_usable()
    if resume and not (folder / description).exists():
        raise UserError(f"{folder} holds no {what} to resume: leave --resume out")
    taken = any((folder / name).exists() for name in ("compare.toml", "tune.toml"))
    if not resume and (taken or RunFolder(folder).holds_run()):
        raise UserError(f"{folder} already holds a {what} or a run: add --resume, or choose another --out")


def run_cell(cell: Cell, grid: Grid, stop: threading.Event, observers: Sequence[ComparisonObserver], name: str) -> None:
    """Run a cell to its end, from its checkpoint if it has one; InterruptedRunError where Ctrl-C ends it."""
    resume = cell.folder.holds_run()
    folder, env = prepare(cell.config, name, resume=resume)
    if Federation(grid, env, folder, stop, observers, resume=resume).run().interrupted:
        raise InterruptedRunError(f"stopped in {folder.path}")


def _description(
    base: ExperimentConfig, name: str, variants: Sequence[Variant], seeds: Sequence[int], tuning: Tuned | None
) -> str:
    """Return ``compare.toml``: what was compared, and the settings that all cells share."""
    shared = base.model_dump(by_alias=True)
    shared["train"].pop("strategy")
    rows = [{"label": v.label, "strategy": v.strategy, "set": dict(v.changes)} for v in variants]
    about: dict[str, Any] = {"experiment": name, "seeds": list(seeds), "strategies": rows, "settings": shared}
    if tuning is not None:
        about["tuned"] = to_toml(tuning)
    return tomli_w.dumps(about)


def _results(
    name: str,
    base: ExperimentConfig,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    cells: Sequence[Cell],
    tuning: Tuned | None,
) -> Results:
    rows = []
    for variant in variants:
        finished = [done for cell in cells if cell.variant is variant and (done := cell.finished()) is not None]
        rows.append(_row(base, variant, finished))
    private = {"seed", "out", "use", "data.dir", "train.strategy"}
    private |= set.intersection(*(set(variant.changes) for variant in variants))  # nothing that they share
    return Results(
        experiment=name,
        complete=all(len(row.seeds) == len(seeds) for row in rows),
        seeds=list(seeds),
        tiers=next((list(row.tiers) for row in rows if row.tiers), []),
        metric=next((done.summary.metric for cell in cells if (done := cell.finished()) is not None), ACCURACY),
        matched_macs=base.fleet.match_macs,
        protocol={key: value for key, value in base.flat().items() if key not in private},
        tuned=tuning,
        strategies=rows,
    )


def _row(base: ExperimentConfig, variant: Variant, finished: Sequence[FinishedCell]) -> StrategyResults:
    method = method_of(_with(base, variant))
    changed = ", ".join(f"{key}={value}" for key, value in variant.changes.items())
    return strategy_results(
        finished,
        name=variant.label,
        summary=method.summary + (f" (with {changed})" if changed else ""),
        source=method.source,
        form=method.submodel.form,
        submodel=method.submodel.describe(),
        objective=method.objective.name,
        aggregation=method.aggregation.name,
        server=method.describe_server(),
    )
