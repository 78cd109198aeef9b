"""Choose settings per row on validation splits: the function behind ``fedmaestro tune``.

A trial runs one row of a comparison with settings of its own, once with every tuning seed; its runs are ordinary run
folders under ``cells/``. Values are those of the validation split (``data.validation``), which is taken out of the
training examples before devices get theirs: nothing of a tuning reads the test set. Every row gets the same number of
trials. A tuning that was interrupted goes on with ``resume``: samplers are asked the same again, and what is finished
is not run anew.
"""

import logging
import platform
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmaestro.config.base import Value, flatten
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.config.search import Choices, Dimension, corners, settings_text, spaces_of
from fedmaestro.errors import UntrainedError, UserError, one_line
from fedmaestro.extend import given
from fedmaestro.flower.cells import (
    TUNING,
    Cell,
    Experiment,
    Variant,
    base_of,
    cell_of,
    check_free,
    check_kept,
    check_place,
    check_rows,
    parse_variant,
    run_cell,
    seeds_from,
    was_interrupted,
)
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.run import prepare, to_all, why_untrained
from fedmaestro.flower.samplers import Sampler, budget, check_sampler, points_of, sampler_of
from fedmaestro.flower.simulation import checked_actors, simulate
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.places import absolute, new_folder
from fedmaestro.report.tuning import tuning_markdown
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.code import located
from fedmaestro.runs.folder import write_atomically
from fedmaestro.runs.reader import parse, read_toml
from fedmaestro.runs.records import MetricFacts, Trial, Tuned, TunedRow, TuningCost
from fedmaestro.runs.results import FinishedCell
from fedmaestro.runs.start import name_of
from fedmaestro.runs.trust import honoured
from fedmaestro.runs.tuned import FILE, best_of, row_of, to_toml
from fedmaestro.tasks.task import metric_facts

log = logging.getLogger("fedmaestro")

FIRST_SEED = 1000
"""Tuning seeds that are only counted start so far above the experiment's own, where no table counts to."""

VALIDATION = 0.1
"""``data.validation`` of an experiment that has none."""

_COST = "train.rounds", "train.devices-per-round"
"""Settings that would give a trial more of the budget than others."""

_PRIVATE = "out", "use", "data.dir", "train.strategy"
"""Settings that ``tuned.toml`` does not say: places of this machine, and what each row has its own of."""


@dataclass(frozen=True)
class Tuning:
    """A finished (or interrupted) tuning and its folder; ``compare`` takes it as ``tuned``."""

    path: Path

    @property
    def file(self) -> Path:
        """``tuned.toml``."""
        return self.path / FILE

    def __fspath__(self) -> str:
        """Return the path of the file."""
        return str(self.file)

    @property
    def results(self) -> dict[str, Any]:
        """The content of ``tuned.toml``."""
        return parse(read_toml(self.file), Tuned, str(self.file)).to_dict()

    def chosen(self, row: str) -> dict[str, Value]:
        """Return the settings that were chosen for a row, as ``overrides`` of a run."""
        return {str(of["name"]): dict(of["chosen"]) for of in self.results["rows"]}[row]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row and what is searched for it."""

    variant: Variant
    space: dict[str, Dimension]

    def of(self, number: int, settings: Mapping[str, Value]) -> Variant:
        """Return the variant of a trial."""
        changes = {**self.variant.changes, **settings}
        return replace(self.variant, label=f"{self.variant.label}-trial{number}", changes=changes)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a tuning does."""

    name: str
    """Of the experiment."""
    base: ExperimentConfig
    """What all trials share."""
    rows: list[_Row]
    seeds: list[int]
    sampler: str
    trials: int
    """Of every row."""
    folder: Path

    def cells(self, row: _Row, number: int, settings: Mapping[str, Value]) -> list[Cell]:
        """Return the runs of a trial."""
        return [cell_of(self.base, row.of(number, settings), seed, self.folder) for seed in self.seeds]

    def sampler_of(self, row: _Row, metric: MetricFacts) -> Sampler:
        """Return the sampler of a row at its start."""
        better = metric.higher_is_better
        return sampler_of(row.space, self.sampler, self.trials, self.base.seed, higher_is_better=better)

    def probes(self, row: _Row) -> list[dict[str, Value]]:
        """Return settings that show whether the row can be tried as it is declared."""
        known = points_of(row.space, self.trials, self.base.seed) if self.sampler == "grid" else []
        return [*corners(row.space), *known]

    @property
    def total(self) -> int:
        """How many runs there will be."""
        return len(self.rows) * self.trials * len(self.seeds)

    @cached_property
    def description(self) -> dict[str, Any]:
        """``tune.toml``: what is searched, and the settings that all trials share."""
        settings = self.base.model_dump(by_alias=True)
        settings["train"].pop("strategy")
        rows = [
            {
                "label": row.variant.label,
                "strategy": row.variant.strategy,
                "set": dict(row.variant.changes),
                "search": {key: str(dimension) for key, dimension in row.space.items()},
            }
            for row in self.rows
        ]
        about = {"experiment": self.name, "seeds": self.seeds, "sampler": self.sampler, "trials": self.trials}
        return {**about, "rows": rows, "settings": settings}


@honoured
def tune(
    experiment: Experiment,
    strategies: Sequence[str],
    search: Mapping[str, Any] | Sequence[str],
    seeds: int | Sequence[int] = 1,
    *,
    trials: int | None = None,
    sampler: str = "grid",
    validation: float | None = None,
    model: Any = None,
    data: Any = None,
    task: Any = None,
    partition: Any = None,
    fleet: Any = None,
    use: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    out: str | Path | None = None,
    actors: int | None = None,
    gpus_per_actor: float = 0.0,
    resume: bool = False,
    trust: bool = False,  # noqa: ARG001 - ``honoured`` reads it
    ray_address: str | None = None,
    observers: Sequence[ComparisonObserver] = (),
    client_app: ClientApp = default_client_app,
) -> Tuning:
    """Try settings for every row of a comparison on a validation split and choose the best.

    The best trial has the best main metric on the validation split in the last round, mean over tiers, then over the
    tuning seeds; of equal ones it is the first. A trial fails where a run trains nothing, ends without a number for
    a tier, or with an error: it is worse than all others, and the search goes on.

    Args:
        experiment: TOML file or configuration; None: the demo on embedded data.
        strategies: ``[LABEL:]NAME[+KEY=VALUE…]``, as for ``compare``.
        search: what is tried: ``{"train.lr": [0.05, 0.1], "train.momentum": "0.5..0.9"}``, and under the name of a row
            what that row tries in place of it; or texts (``config.search.FORM``).
        seeds: how many (counted from the experiment's own + 1000), or which; ``compare`` refuses them.
        trials: of every row; None: all points of the grids, which have to be of one size then.
        sampler: ``grid``, of which ``trials`` points are drawn by the experiment's seed if there are more; or
            ``optuna``, its TPE, which takes ranges too.
        validation: ``data.validation`` of the trials; None: the experiment's, or 0.1.
        model: see ``run``, as for the next four.
        data: see there.
        task: see there.
        partition: see there.
        fleet: see there.
        use: files or modules of user code.
        overrides: dotted settings for all trials.
        data_dir: folder of local data.
        out: the tuning's folder; a new one under ``runs/`` by default.
        actors: Ray actors, one per free CPU by default; 0: all work is done in this process.
        gpus_per_actor: GPUs of each actor, also parts of one; with ``actors=0``, of this process; 0: the CPU.
        resume: go on with the tuning in ``out``.
        trust: run the code that a run folder holds (``out``, or that of ``experiment``), also where somebody else has
            written it.
        ray_address: a running Ray cluster.
        observers: are told about the progress.
        client_app: the hosts' app.

    Raises:
        UserError: anything wrong with the input; nothing was written then.
        UntrainedError: all trials of a row failed; everything was written then.
        KeyboardInterrupt: Ctrl-C before a trial was finished.
    """
    variants = [parse_variant(text) for text in strategies]
    if not variants:
        raise UserError("no strategy is named: give some, for example nested,zero-pad")
    spaces = spaces_of(search, [variant.label for variant in variants])
    rows = [_Row(variant=variant, space=spaces[variant.label]) for variant in variants]
    objects = {"model": model, "dataset": data, "task": task, "partition": partition, "fleet": fleet}
    overrides = {**given(objects, use, overrides), **_given_split(validation)}
    base = _validated(base_of(experiment, variants, overrides, data_dir, _values(rows)))
    plan = _Plan(
        name=(name := name_of(experiment, base)),
        base=base,
        rows=rows,
        seeds=seeds_from(base.seed + FIRST_SEED, seeds),
        sampler=sampler,
        trials=_budget(rows, sampler, trials),
        folder=absolute(Path(out or base.out or new_folder(f"{name}-tune"))),
    )
    _check(plan, resume)
    actors = checked_actors(actors)
    work = _Search(plan, _metric(plan, observers), observers)
    write_atomically(plan.folder / TUNING, tomli_w.dumps(plan.description))

    def server(grid: Grid) -> None:
        work.run(grid)

    def start() -> None:
        if not work.run(None):
            simulate(
                server,
                client_app,
                actors=actors,
                gpus_per_actor=gpus_per_actor,
                stop=work.stop,
                ray_address=ray_address,
            )

    was_interrupted(start, [plan.folder / TUNING], resume=resume)
    tuned = work.tuned()
    if not any(row.trials for row in tuned.rows):
        raise KeyboardInterrupt
    work.write()
    _check_all_chosen(tuned, plan.folder)
    return Tuning(plan.folder)


def _values(rows: Sequence[_Row]) -> list[Value]:
    """Return the values that rows choose from."""
    return [x for row in rows for d in row.space.values() if isinstance(d, Choices) for x in d.values]


def _given_split(validation: float | None) -> dict[str, float]:
    """Return the setting of ``--validation``."""
    if validation is not None and not validation:
        raise UserError("--validation 0: settings are chosen on a validation split: hold some examples out, 0.1 say")
    return {} if validation is None else {"data.validation": validation}


def _validated(base: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment with a validation split."""
    return base if base.data.validation else base.changed({"data.validation": VALIDATION})


def _budget(rows: Sequence[_Row], sampler: str, trials: int | None) -> int:
    check_sampler(sampler)
    return budget({row.variant.label: row.space for row in rows}, sampler, trials)


def _check(plan: _Plan, resume: bool) -> None:
    """Refuse what cannot be tried before anything is written or started."""
    if repeated := [seed for seed in plan.seeds if plan.seeds.count(seed) > 1]:
        raise UserError(f"--seeds: {repeated[0]} is given twice")
    check_rows([row.variant for row in plan.rows], plan.seeds)
    for row in plan.rows:
        label = row.variant.label
        for key in row.space:
            check_free(key, f"--search {key}")
            if key in row.variant.changes:
                raise UserError(f"--search {key}: row {label!r} sets it to {row.variant.changes[key]!r}: leave one out")
            if key in _COST:
                raise UserError(f"--search {key}: trials would differ in what they may spend: give it with --set")
        for settings in plan.probes(row):
            plan.cells(row, 1, settings)
    check_place(plan.folder, TUNING, resume)
    if resume:
        _check_same(plan)


def _check_same(plan: _Plan) -> None:
    """Refuse to go on with a tuning of something else."""
    before, now = (_flat(tables) for tables in (read_toml(plan.folder / TUNING), plan.description))
    if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        key = changed[0]
        raise UserError(
            f"{plan.folder} was tuned with {key.removeprefix('settings.')}={before.get(key)!r}, not {now.get(key)!r}: "
            "resume with the same, or choose another --out"
        )


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a continuation must share."""
    flat = flatten(description)
    return {key: value for key, value in flat.items() if key not in ("settings.out", "settings.data.dir")}


def _metric(plan: _Plan, observers: Sequence[ComparisonObserver]) -> MetricFacts:
    """Return the metric, after every declared value was tried for whether it can start."""
    found: MetricFacts | None = None
    for row in plan.rows:
        for settings in corners(row.space):
            cell = plan.cells(row, 0, settings)[0]
            try:
                _, env = prepare(cell.config, plan.name, on_data=to_all(observers))
            except UserError as error:
                raise UserError(f"row {row.variant.label!r} with {settings_text(settings)}: {error}") from None
            found = found or metric_facts(env.task)
    assert found is not None
    return found


def _check_all_chosen(tuned: Tuned, folder: Path) -> None:
    """Raise UntrainedError where all trials of a row failed."""
    for row in tuned.rows:
        if tuned.complete and row.trial is None:
            why = row.trials[0].failed
            raise UntrainedError(f"all trials of row {row.name!r} failed, the first because {why}: {folder}", folder)


class _Search:
    """Runs the trials of a plan and keeps what came of them.

    Args:
        plan: what is done.
        metric: the main one.
        observers: are told about the progress.
    """

    def __init__(self, plan: _Plan, metric: MetricFacts, observers: Sequence[ComparisonObserver]) -> None:
        self.plan, self.metric, self.observers = plan, metric, observers
        self.stop = threading.Event()
        self._trials: dict[str, list[Trial]] = {row.variant.label: [] for row in plan.rows}
        self._samplers = {row.variant.label: plan.sampler_of(row, metric) for row in plan.rows}
        self._todo = [(number, row) for number in range(1, plan.trials + 1) for row in plan.rows]
        self._asked: dict[str, Value] | None = None
        self._runs = 0

    def run(self, grid: Grid | None) -> bool:
        """Run the trials that are left, one of every row after the other, and return whether all are done.

        Args:
            grid: the hosts; None: take what is finished up to the first trial that needs some.

        Raises:
            InterruptedRunError: Ctrl-C.
        """
        while self._todo:
            number, row = self._todo[0]
            label = row.variant.label
            self._asked = self._asked or self._samplers[label].ask()
            cells = self.plan.cells(row, number, self._asked)
            for cell in cells:
                check_kept(cell)
            if grid is None and any(cell.finished() is None for cell in cells):
                return False
            self._keep(label, self._tried(cells, number, self._asked, grid), write=grid is not None)
            del self._todo[0]
        self._tell_cells()
        return True

    def _keep(self, label: str, trial: Trial, *, write: bool) -> None:
        self._samplers[label].tell(trial.value)
        self._asked = None
        self._trials[label].append(trial)
        if write:
            self.write()
        for observer in self.observers:
            observer.on_trial(label, trial)

    def _tried(self, cells: Sequence[Cell], number: int, settings: dict[str, Value], grid: Grid | None) -> Trial:
        """Return a trial, after what is not finished of it was run."""
        values, failures, cost = [], [], TuningCost()
        for cell in cells:
            why = "" if grid is None or cell.finished() is not None else self._run(cell, grid)
            self._runs += 1
            done = cell.finished()
            value = None if done is None else final_value(done)
            cost += TuningCost() if done is None else _cost(done)
            if why := why or _failure(done, value):
                failures.append(f"seed {cell.seed}: {why}")
            elif value is not None:
                values.append(value)
        return Trial(
            number=number,
            settings=settings,
            values=values,
            value=None if failures else statistics.fmean(values),
            failed="; ".join(failures),
            cost=cost,
        )

    def _run(self, cell: Cell, grid: Grid) -> str:
        """Run a cell; return why that failed, or nothing."""
        self._tell_cells()
        for observer in self.observers:
            observer.on_cell(cell.variant.label, cell.seed)
        try:
            run_cell(cell, grid, self.stop, self.observers, self.plan.name)
        except InterruptedRunError:
            raise
        except Exception as error:
            if not list(grid.get_node_ids()):  # not the settings: all trials would fail like this
                raise
            why = one_line(error if isinstance(error, UserError) else located(error))
            log.warning("%s, seed %d failed: %s", cell.variant.label, cell.seed, why)
            return why
        return ""

    def _tell_cells(self) -> None:
        for observer in self.observers:
            observer.on_cells(self.plan.folder, self._runs, self.plan.total)

    def tuned(self) -> Tuned:
        """Return what came of the trials so far."""
        plan = self.plan
        rows = [_tuned_row(plan, row, self._trials[row.variant.label], self.metric) for row in plan.rows]
        settings = {key: value for key, value in plan.base.flat().items() if key not in _PRIVATE}
        return Tuned(
            experiment=plan.name,
            complete=all(len(row.trials) == plan.trials for row in rows),
            seeds=plan.seeds,
            validation=plan.base.data.validation,
            sampler=plan.sampler,
            trials=plan.trials,
            metric=self.metric,
            versions=_versions(plan.sampler),
            settings=settings,
            rows=rows,
        )

    def write(self) -> None:
        """Write ``tuned.toml`` and ``tuning.md``."""
        tuned = self.tuned()
        write_atomically(self.plan.folder / FILE, _HEAD + tomli_w.dumps(to_toml(tuned)))
        write_atomically(self.plan.folder / "tuning.md", tuning_markdown(tuned))


_HEAD = """# Written by `fedmaestro tune`; `fedmaestro compare … --tuned FILE` runs rows with what was chosen for them.
# tuning.md says the same for people.
"""


def final_value(done: FinishedCell) -> float | None:
    """Return the mean over tiers of the main metric in the last round; None where a tier has no number there."""
    name = done.summary.metric.name
    values = [tier.get(name) for tier in done.records[-1].tiers.values()] if done.records else []
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _failure(done: FinishedCell | None, value: float | None) -> str:
    """Return why a run that has ended counts as failed, or nothing."""
    if done is None:
        return "it did not end"
    diverged = f"no {done.summary.metric.name} of every tier in the last round: it has diverged"
    return why_untrained(done.summary) or (diverged if value is None else "")


def _cost(done: FinishedCell) -> TuningCost:
    summary = done.summary
    return TuningCost(
        runs=1,
        updates=summary.updates.trained,
        download_bytes=summary.download_bytes,
        upload_bytes=summary.upload_bytes,
        virtual_seconds=summary.virtual_seconds,
        wall_seconds=summary.wall_seconds,
    )


def _tuned_row(plan: _Plan, row: _Row, trials: Sequence[Trial], metric: MetricFacts) -> TunedRow:
    variant, best = row.variant, best_of(trials, metric)
    facts = TunedRow(
        name=variant.label,
        strategy=variant.strategy,
        set=dict(variant.changes),
        searched={key: str(dimension) for key, dimension in row.space.items()},
        edges=_edges(plan, row, best.settings) if best is not None and len(trials) == plan.trials else {},
    )
    return row_of(facts, trials, metric)


def _edges(plan: _Plan, row: _Row, chosen: Mapping[str, Value]) -> dict[str, str]:
    """Return the chosen settings at an end of what was declared, beyond which there are other values."""
    found = {key: row.space[key].edge(value) for key, value in chosen.items()}
    return {key: end for key, end in found.items() if end is not None and _goes_on(plan, row, key, chosen, end)}


def _goes_on(plan: _Plan, row: _Row, key: str, chosen: Mapping[str, Value], end: str) -> bool:
    """Return whether a setting may have a value beyond ``end``."""
    value, sign = chosen[key], -1 if end in ("smallest", "lowest") else 1
    assert isinstance(value, int | float)
    further = value + sign * (1 if isinstance(value, int) else 0.01 * abs(value) or 0.01)
    try:
        plan.cells(row, 0, {**chosen, key: further})
    except UserError:
        return False
    return True


def _versions(sampler: str) -> dict[str, str]:
    from fedmaestro import __version__

    names = ("flwr", "ray", "torch", *(["optuna"] if sampler == "optuna" else []))
    return {"fedmaestro": __version__, "python": platform.python_version(), **{x: metadata.version(x) for x in names}}
