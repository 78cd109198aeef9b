"""Compare strategies over seeds on one running Ray: the function behind ``fedmaestro compare``.

A cell is one strategy with one seed: an ordinary run folder under ``cells/``. Cells of a seed share the initial model,
the partition and the sampled devices, which depend on the seed only. Several experiments are as many comparisons side
by side, with the ranks of the strategies over them on top. A comparison that was interrupted anywhere goes on with
``resume``: finished cells are kept, the one in work continues from its checkpoint, and the tables come out the same.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UntrainedError, UserError
from fedmaestro.extend import given
from fedmaestro.flower.cells import (
    COMPARISON,
    Cell,
    Experiment,
    Plan,
    Variant,
    base_of,
    check_kept,
    check_place,
    parse_variant,
    plan_of,
    run_cell,
    seeds_from,
    was_interrupted,
)
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.run import check_trained, prepare, to_all
from fedmaestro.flower.simulation import checked_actors, simulate
from fedmaestro.places import absolute, file_name, new_folder
from fedmaestro.report.compare_files import EXPERIMENTS, RANKS, RESULTS, parts_of, write_files, write_parts
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.analysis import Asked
from fedmaestro.runs.folder import write_atomically, write_record
from fedmaestro.runs.frames import rounds_frame
from fedmaestro.runs.ranking import Ranking
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import Results, Tuned
from fedmaestro.runs.start import name_of
from fedmaestro.runs.trust import honoured
from fedmaestro.runs.tuned import check_comparable, chosen_for, read_tuned
from fedmaestro.tasks.task import metric_facts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Experiment", "Variant", "compare", "parse_variant"]


@dataclass(frozen=True)
class Comparison:
    """A finished (or interrupted) comparison and its folder."""

    path: Path

    @property
    def results(self) -> dict[str, Any]:
        """The content of ``results.json``; of several experiments, each of ``parts`` has its own."""
        return read_json(self.path / RESULTS, Results).to_dict()

    @property
    def parts(self) -> dict[str, "Comparison"]:
        """The comparisons of several experiments, by name; none of one."""
        return {name: Comparison(self.path / name) for name in parts_of(self.path)}

    @property
    def ranks(self) -> dict[str, Any]:
        """The content of ``ranks.json``, of several experiments."""
        return read_json(self.path / RANKS, Ranking).to_dict()

    def to_pandas(self) -> "pd.DataFrame":
        """Return the tables of all cells that have rounds, one below the other (``runs.frames.rounds_frame``).

        ``variant`` is the label of a row of the comparison; with several experiments, ``experiment`` is before it.
        """
        import pandas as pd

        frames = []
        for name, part in self.parts.items():
            frames.append(part.to_pandas())
            frames[-1].insert(0, "experiment", name)
        for rounds in sorted((self.path / "cells").glob("*/rounds.jsonl")):
            frame = rounds_frame(rounds.parent)
            frame.insert(0, "variant", rounds.parent.name.rpartition("-seed")[0])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@honoured
def compare(
    experiment: Experiment | Sequence[Experiment] | Mapping[str, Experiment],
    strategies: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    baseline: str | None = None,
    margin: float | None = None,
    last: int = 1,
    target: float | None = None,
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
        experiment: TOML file or configuration; None: the demo on embedded data. Several, in a sequence (called by their
            files) or by name: a comparison each below ``out``, and the ranks of the strategies over all of them.
        strategies: ``[LABEL:]NAME[+KEY=VALUE…]``: rows of ``STRATEGIES``, switches changed, names to print.
        seeds: how many (counted from the experiment's own), or which.
        baseline: label of the strategy that the others are tested against; the first by default.
        margin: differences below it count as none, in points for shares; half a point by default, for other metrics
            none, so that nothing is called level.
        last: rows are compared by the mean of so many evaluated rounds at the end; 1: the final round.
        target: of the mean over tiers, in percent for shares: when and at what cost each seed reaches it.
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
        resume: go on with the comparison in ``out``; strategies, seeds and experiments may be added.
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
    asked = Asked(baseline=baseline, margin=margin, last=last, target=target)
    actors = checked_actors(actors)
    sources, several = _sources(experiment)
    root = _root(out, overrides, several)
    plans = []
    for name, source in sources:
        base = base_of(source, variants, overrides, data_dir)
        name = name or name_of(source, base)
        folder = root / name if several and root else root or absolute(base.out or new_folder(f"{name}-compare"))
        plan = plan_of(name, base, variants, seeds_from(base.seed, seeds), folder, tuning)
        _check_tuned(plan, several)
        asked.check([variant.label for variant in variants], plan.evaluated_rounds)
        # Everything that can be wrong with a strategy shows here, before anything is written or started.
        plans.append(_checked(plan, asked, resume, observers, part=several))
    top = root if several and root else plans[0].folder
    if several:
        check_place(top, EXPERIMENTS, resume)
    work = _Work(plans=plans, folder=top, observers=observers)
    interrupted = was_interrupted(
        lambda: work.carry_out(client_app, actors, gpus_per_actor, ray_address),
        work.describe(several=several),
        resume=resume,
    )
    comparisons = {plan.name: _written(plan) for plan in plans}
    if interrupted and not any(row.seeds for results in comparisons.values() for row in results.strategies):
        raise KeyboardInterrupt
    work.tell_cells()
    if several:
        write_parts(comparisons, top)
    else:
        write_files(comparisons[plans[0].name], top)
    for plan in plans:
        check_all_trained(plan.cells, plan.folder)
    return Comparison(top)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The cells of all plans, one after the other on one set of hosts."""

    plans: Sequence[Plan]
    folder: Path
    observers: Sequence[ComparisonObserver]

    def describe(self, *, several: bool) -> list[Path]:
        """Write what is compared; return the files."""
        texts = {plan.folder / COMPARISON: plan.description for plan in self.plans}
        if several:
            names = [plan.name for plan in self.plans]
            texts[self.folder / EXPERIMENTS] = tomli_w.dumps({"experiments": names})
        for path, text in texts.items():
            write_atomically(path, text)
        return list(texts)

    def tell_cells(self) -> None:
        """Tell how many cells are finished."""
        cells = [cell for plan in self.plans for cell in plan.cells]
        done = sum(cell.finished() is not None for cell in cells)
        for observer in self.observers:
            observer.on_cells(self.folder, done, len(cells))

    def carry_out(
        self, client_app: ClientApp, actors: int | None, gpus_per_actor: float, ray_address: str | None
    ) -> None:
        """Run the cells that are not finished; InterruptedRunError where Ctrl-C ends them."""
        todo = [(plan, cell) for plan in self.plans for cell in plan.cells if cell.finished() is None]
        stop = threading.Event()

        def server(grid: Grid) -> None:
            for plan, cell in todo:
                self.tell_cells()
                for observer in self.observers:
                    observer.on_cell(self._label(plan, cell), cell.seed)
                run_cell(cell, grid, stop, self.observers, plan.name)
                _written(plan)

        if todo:
            simulate(
                server, client_app, actors=actors, gpus_per_actor=gpus_per_actor, stop=stop, ray_address=ray_address
            )

    def _label(self, plan: Plan, cell: Cell) -> str:
        return cell.variant.label if len(self.plans) == 1 else f"{plan.name}: {cell.variant.label}"


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


def _sources(
    experiment: Experiment | Sequence[Experiment] | Mapping[str, Experiment],
) -> tuple[list[tuple[str | None, Experiment]], bool]:
    """Return experiments with their names (None: that of its data), and whether they are several.

    Raises:
        UserError: there are none, or two of one name.
    """
    if experiment is None or isinstance(experiment, str | Path | ExperimentConfig):
        return [(None, experiment)], False
    if isinstance(experiment, Mapping):
        named = [(file_name(name), source) for name, source in experiment.items()]
    else:
        named = [(file_name(_name(source)), source) for source in experiment]
        if len(named) == 1:
            return [(None, named[0][1])], False
    if not named:
        raise UserError("there is no experiment to compare on: give one, or None for the demo")
    names = [name for name, _ in named]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two experiments are called {repeated[0]!r}: rename one (in Python, give them by name)")
    return [*named], True


def _name(source: Experiment) -> str:
    if source is None:
        return "digits"
    return Path(source).stem if isinstance(source, str | Path) else source.data.name


def _root(out: str | Path | None, overrides: Mapping[str, Any], several: bool) -> Path | None:
    """Return the folder that was named; a new one for several experiments; None: the experiment may name one."""
    if named := out or (several and overrides.get("out")):
        return absolute(named)
    return new_folder("comparison") if several else None


def _as_tuned(variant: Variant, tuning: Tuned | None) -> Variant:
    """Return the variant with the settings that were chosen for it."""
    if tuning is None:
        return variant
    chosen = chosen_for(tuning, variant.label, variant.strategy, variant.changes)
    return replace(variant, changes={**variant.changes, **chosen})


def _check_tuned(plan: Plan, several: bool) -> None:
    """Raise UserError where the rows were tuned for another experiment, or with one of the plan's seeds."""
    if plan.tuning is None:
        return
    try:
        check_comparable(plan.tuning, plan.base.flat(), plan.seeds, [variant.label for variant in plan.variants])
    except UserError as error:
        raise UserError(f"experiment {plan.name!r}: {error}" if several else str(error)) from None


def _checked(plan: Plan, asked: Asked, resume: bool, observers: Sequence[ComparisonObserver], *, part: bool) -> Plan:
    """Check all that the cells need and return the plan with how it is judged; nothing is written.

    Args:
        plan: of one experiment.
        asked: how its rows are to be judged.
        resume: whether to go on.
        observers: are told about the decoding of data.
        part: whether it is one of several, which may be added to others.
    """
    check_place(plan.folder, COMPARISON, resume, new=part)
    for cell in plan.cells:
        check_kept(cell)
    for cell in plan.cells[: len(plan.variants)]:
        _, env = prepare(cell.config, plan.name, resume=cell.folder.holds_run(), on_data=to_all(observers))
    return replace(plan, analysis=asked.analysis(metric_facts(env.task)))


def _written(plan: Plan) -> Results:
    results = plan.results()
    write_record(plan.folder / RESULTS, results)
    return results
