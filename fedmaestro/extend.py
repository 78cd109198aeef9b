"""Rows of your own: decorators that put models, data, tasks, objectives and the rest into the tables.

An experiment names the file (``use = "my_paper.py"``), which server and hosts load before any name is looked up::

    from fedmaestro import extend

    @extend.model("gru")
    class Gru(nn.Module):
        def __init__(self, input_shape, num_classes): ...

In a script or a notebook the same decorators work on what is defined there: rows that the experiment names are shipped
to the hosts. A row of the same kind and name replaces the one before it; names of built-in rows cannot be taken.

Every decorator takes ``summary``, what ``fedmaestro list`` shows; by default the first line of the docstring.
"""

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, is_dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

from fedmaestro.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a decorator adds to."""

    name: str
    table: tuple[str, str]
    """Module and name of the table."""
    setting: str
    """What chooses a row."""
    expects: str
    """What is decorated, in words."""
    make: Callable[[str, Any, Mapping[str, Any]], Any]
    """``(name, what is decorated, options) -> row``."""

    @property
    def rows(self) -> MutableMapping[str, Any]:
        """The table itself."""
        module, name = self.table
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Registered:
    """One row as it was given."""

    kind: str
    name: str
    value: Any
    options: Mapping[str, Any] = field(default_factory=dict)


_session: dict[tuple[str, str], Registered] = {}
"""Rows of this process's script or notebook."""
_loaded: dict[tuple[str, str], Registered] = {}
"""Rows of the code that is loaded (``runs.code``)."""
_loading = False


def register(kind: str, name: str, value: T, **options: Any) -> T:
    """Put a row into the table of ``kind`` and return ``value``.

    Raises:
        UserError: a built-in row's name, or something that cannot be a row of this kind.
    """
    row = Registered(kind=kind, name=name, value=value, options=options)
    _put(row)
    (_loaded if _loading else _session)[kind, name] = row
    return value


def _put(row: Registered) -> None:
    kind = KINDS[row.kind]
    if not isinstance(row.name, str) or not row.name.strip() or any(c.isspace() or c in ",+=:/" for c in row.name):
        raise UserError(f"extend.{row.kind}({row.name!r}): a name is a word without spaces and without , + = : /")
    if row.name in kind.rows and (row.kind, row.name) not in {**_session, **_loaded}:
        raise UserError(f"extend.{row.kind}({row.name!r}): this is a built-in {row.kind}: choose another name")
    kind.rows[row.name] = kind.make(row.name, row.value, row.options)


def register_loaded(rows: list[Registered], run: Callable[[], object]) -> None:
    """Put the rows of code that is loaded into the tables: those given, and what ``run`` registers."""
    global _loading
    _loading = True
    try:
        for row in rows:
            register(row.kind, row.name, row.value, **row.options)
        run()
    finally:
        _loading = False


def forget_loaded() -> None:
    """Take the rows of the code that was loaded out of the tables; the session's come back."""
    for kind, name in list(_loaded):
        del _loaded[kind, name]
        KINDS[kind].rows.pop(name, None)
        if (kind, name) in _session:
            _put(_session[kind, name])


def session() -> Mapping[tuple[str, str], Registered]:
    """Return the rows of this process's script or notebook, by kind and name."""
    return _session


def session_rows(words: set[str]) -> list[Registered]:
    """Return the rows of this process's script or notebook that are named by ``words``, or by what these name."""
    chosen: dict[tuple[str, str], Registered] = {}
    todo = [row for (_, name), row in _session.items() if name in words]
    while todo:
        row = todo.pop()
        if (row.kind, row.name) in chosen:
            continue
        chosen[row.kind, row.name] = row
        more = {word for value in _named_by(row) for word in str(value).split()}
        todo += [other for (_, name), other in _session.items() if name in more]
    return [row for key, row in _session.items() if key in chosen]


def _named_by(row: Registered) -> list[Any]:
    """Return what a row says of others: the settings of a strategy, the metrics of a task, the task of a dataset."""
    settings = row.value if isinstance(row.value, Mapping) and row.kind == "strategy" else {}
    return [*settings.values(), *row.options.get("metrics", ()), row.options.get("task", "")]


def is_own(kind: str, name: str) -> bool:
    """Return whether a row is the user's."""
    return (kind, name) in _session or (kind, name) in _loaded


def name_of(kind: str, value: Any) -> str:
    """Return a name for an object that has none: what it is called in Python, unless a built-in row has that name."""
    known = getattr(value, "__name__", None) or (kind if isinstance(value, Mapping) else type(value).__name__)
    name = "".join(c if c.isalnum() or c in "_-." else "-" for c in known).strip("-") or kind
    taken = name in KINDS[kind].rows and not is_own(kind, name)
    return f"own-{name}" if taken else name


def given(objects: Mapping[str, Any], use: object = None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Register what a caller gave as objects; return the overrides with the settings that choose it.

    Args:
        objects: by kind; None: nothing was given. A string is the name of a row.
        use: files or modules; None: nothing was given.
        overrides: dotted settings.

    Raises:
        UserError: something that cannot be a row of its kind, or is also in the overrides.
    """
    settings: dict[str, Any] = {} if use is None else {"use": str(use)}
    for kind, value in objects.items():
        if value is None:
            continue
        name = value
        if not isinstance(value, str):
            name = name_of(kind, value)
            register(kind, name, value)
        settings[KINDS[kind].setting] = name
    if twice := settings.keys() & (overrides or {}).keys():
        key = sorted(twice)[0]
        raise UserError(f"{key} is given as an object ({settings[key]}) and in the overrides: leave one of them out")
    return {**settings, **(overrides or {})}


# --- rows --------------------------------------------------------------------------------------------------------


def _summary(value: Any, options: Mapping[str, Any]) -> str:
    if options.get("summary"):
        return str(options["summary"])
    lines = (inspect.getdoc(value) or "").strip().splitlines() if hasattr(value, "__name__") else []
    return lines[0].rstrip(".") if lines else "own"


def _refuse(kind: str, name: str, value: Any) -> UserError:
    got = getattr(value, "__name__", None) or type(value).__name__
    return UserError(f"extend.{kind}({name!r}) got {got}: expected {KINDS[kind].expects}")


def _record(name: str, value: Any) -> Any:
    """Return a record that is a row already, under this name."""
    return replace(value, name=name) if is_dataclass(value) and not isinstance(value, type) else value


def _model(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from torch import nn

    from fedmaestro.models import ModelSpec, own_model

    if isinstance(value, ModelSpec):
        return value
    if not (callable(value) or isinstance(value, nn.Module)):
        raise _refuse("model", name, value)
    return own_model(value, _summary(value, options))


def _dataset(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.data.own import OwnRow

    data_only = not callable(value) or not hasattr(value, "__name__")
    load = (lambda: value) if data_only else value
    return OwnRow(name=name, load=load, task=options.get("task"), summary=_summary(value, options))


def _task(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.tasks.goal import Goal, own_goal

    if isinstance(value, Goal):
        return _record(name, value)
    value = value() if isinstance(value, type) else value
    if not callable(getattr(value, "loss", None)):
        raise _refuse("task", name, value)
    return own_goal(name, value, _summary(type(value), options))


def _metric(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.tasks.metrics import Metric, own_metric

    if isinstance(value, Metric):
        return _record(name, value)
    made = value() if isinstance(value, type) or inspect.isfunction(value) else value
    if not (callable(getattr(made, "update", None)) and callable(getattr(made, "compute", None))):
        raise _refuse("metric", name, value)
    return own_metric(name, made, _summary(value, options), **{k: v for k, v in options.items() if k != "summary"})


def _objective(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.clients.base import Objective
    from fedmaestro.fleet.rule import OWN_PASS

    if isinstance(value, Objective):
        return _record(name, value)
    if not callable(value):
        raise _refuse("objective", name, value)
    known = {"passes": OWN_PASS, **{key: x for key, x in options.items() if key != "summary"}}
    return Objective(name=name, loss=value, summary=_summary(value, options), source="user code", **known)


def _optimizer(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.clients.optimizers import LocalOptimizer

    if isinstance(value, LocalOptimizer):
        return _record(name, value)
    if not callable(value):
        raise _refuse("optimizer", name, value)
    slots = int(options.get("slots", 0))
    return LocalOptimizer(
        name=name,
        make=lambda parameters, lr, _momentum, _decay: value(parameters, lr),
        slots=lambda _: slots,
        summary=_summary(value, options),
    )


def _schedule(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.clients.optimizers import Schedule

    if isinstance(value, Schedule):
        return _record(name, value)
    if not callable(value):
        raise _refuse("schedule", name, value)
    factor = lambda server_round, rounds, _decay: float(value(server_round, rounds))  # noqa: E731
    return Schedule(name=name, factor=factor, summary=_summary(value, options))


def _aggregation(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.strategies.base import Aggregation

    if isinstance(value, Aggregation):
        return _record(name, value)
    if not callable(value):
        raise _refuse("aggregation", name, value)
    known = {key: x for key, x in options.items() if key != "summary"}
    return Aggregation(name=name, finish=value, summary=_summary(value, options), source="user code", **known)


def _server_step(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.strategies.server_step import ServerStep, StepRow

    if isinstance(value, StepRow):
        return _record(name, value)
    step = value() if isinstance(value, type) and not issubclass(value, ServerStep) else value
    parts = {
        key: getattr(step, key) for key in ("apply", "init", "start", "rebases") if callable(getattr(step, key, None))
    }
    if "apply" not in parts and inspect.isfunction(step):
        parts = {"apply": step}
    if "apply" not in parts:
        raise _refuse("server_step", name, value)
    made = ServerStep(name=name, **parts)
    return StepRow(name=name, make=lambda: made, settings={}, summary=_summary(value, options), source="user code")


def _selection(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.fleet.selection import Selection

    if isinstance(value, Selection):
        return _record(name, value)
    if not callable(value):
        raise _refuse("selection", name, value)
    return Selection(name=name, select=value, summary=_summary(value, options), source="user code")


def _augmentation(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.tasks.augment import Augmentation

    if isinstance(value, Augmentation):
        return _record(name, value)
    if not callable(value):
        raise _refuse("augmentation", name, value)
    return Augmentation(name=name, apply=value, summary=_summary(value, options))


def _strategy(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.strategies.rows import Strategy, own_strategy

    if isinstance(value, Strategy):
        return _record(name, value)
    if not isinstance(value, Mapping):
        raise _refuse("strategy", name, value)
    return own_strategy(name, value, str(options.get("summary") or "own"))


def _fleet(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.fleet.tiers import FleetPreset, own_fleet

    if isinstance(value, FleetPreset):
        return value
    return own_fleet(name, value() if callable(value) else value, _summary(value, options))


def _attack(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.fleet.attacks import Attack

    if isinstance(value, Attack):
        return _record(name, value)
    if not callable(value):
        raise _refuse("attack", name, value)
    return Attack(name=name, update=value, summary=_summary(value, options), source="user code")


def _partition(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    from fedmaestro.data.partition import Partition

    if isinstance(value, Partition):
        return _record(name, value)
    if not callable(value):
        raise _refuse("partition", name, value)
    return Partition(name=name, deal=value, summary=_summary(value, options))


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="dataset",
            table=("fedmaestro.data.sources", "DATASETS"),
            setting="data.name",
            expects="a function without parameters that returns the data, or the data",
            make=_dataset,
        ),
        Kind(
            name="model",
            table=("fedmaestro.models", "MODELS"),
            setting="model.name",
            expects="a torch.nn.Module class or a function (input_shape, num_classes), or a module",
            make=_model,
        ),
        Kind(
            name="task",
            table=("fedmaestro.tasks.goal", "TASKS"),
            setting="data.task",
            expects="a class with loss(outputs, targets)",
            make=_task,
        ),
        Kind(
            name="metric",
            table=("fedmaestro.tasks.metrics", "METRICS"),
            setting="data.metrics",
            expects="a class with update(outputs, targets) and compute(sums)",
            make=_metric,
        ),
        Kind(
            name="objective",
            table=("fedmaestro.clients", "OBJECTIVES"),
            setting="train.objective",
            expects="a function (prefixes, x, targets, generator) -> loss",
            make=_objective,
        ),
        Kind(
            name="optimizer",
            table=("fedmaestro.clients.optimizers", "OPTIMIZERS"),
            setting="train.optimizer",
            expects="a function (parameters, lr) -> torch.optim.Optimizer",
            make=_optimizer,
        ),
        Kind(
            name="schedule",
            table=("fedmaestro.clients.optimizers", "SCHEDULES"),
            setting="train.schedule",
            expects="a function (round, rounds) -> factor of the learning rate",
            make=_schedule,
        ),
        Kind(
            name="aggregation",
            table=("fedmaestro.strategies.tables", "AGGREGATIONS"),
            setting="train.aggregation",
            expects="a function (partial, old state) -> new state, or an Aggregation",
            make=_aggregation,
        ),
        Kind(
            name="server_step",
            table=("fedmaestro.strategies.tables", "SERVER_STEPS"),
            setting="server.steps",
            expects="a function (state, memory, round) -> (state, memory), or a class with apply and init",
            make=_server_step,
        ),
        Kind(
            name="selection",
            table=("fedmaestro.fleet.selection", "SELECTIONS"),
            setting="train.selection",
            expects="a function (round, candidates, history, generator) -> device numbers",
            make=_selection,
        ),
        Kind(
            name="augmentation",
            table=("fedmaestro.tasks.augment", "AUGMENTATIONS"),
            setting="data.augment",
            expects="a function (x, generator) -> x",
            make=_augmentation,
        ),
        Kind(
            name="strategy",
            table=("fedmaestro.strategies.rows", "STRATEGIES"),
            setting="train.strategy",
            expects="settings by their dotted keys",
            make=_strategy,
        ),
        Kind(
            name="fleet",
            table=("fedmaestro.fleet.tiers", "FLEETS"),
            setting="fleet.preset",
            expects="tiers by name, or a function that returns them",
            make=_fleet,
        ),
        Kind(
            name="attack",
            table=("fedmaestro.fleet.attacks", "ATTACKS"),
            setting="fleet.attack",
            expects="a function (update, attacking) -> what is sent instead, or an Attack",
            make=_attack,
        ),
        Kind(
            name="partition",
            table=("fedmaestro.data.partition", "PARTITIONS"),
            setting="data.partition",
            expects="a function (examples, devices, generator) -> one index array per device",
            make=_partition,
        ),
    )
}
"""Everything that can be added."""


def _decorator(kind: str) -> Callable[..., Callable[[T], T]]:
    def decorate(name: str, **options: Any) -> Callable[[T], T]:
        return lambda value: register(kind, name, value, **options)

    decorate.__name__ = kind
    decorate.__doc__ = f"Add a {kind.replace('_', ' ')}: {KINDS[kind].expects}; chosen by ``{KINDS[kind].setting}``."
    return decorate


dataset = _decorator("dataset")
model = _decorator("model")
task = _decorator("task")
metric = _decorator("metric")
objective = _decorator("objective")
optimizer = _decorator("optimizer")
schedule = _decorator("schedule")
aggregation = _decorator("aggregation")
server_step = _decorator("server_step")
selection = _decorator("selection")
fleet = _decorator("fleet")
attack = _decorator("attack")
partition = _decorator("partition")
augmentation = _decorator("augmentation")


def csv(train: object, test: object = None, **columns: Any) -> dict[str, Any]:
    """Return the data of CSV files, for a dataset's function; see ``data.files.csv``."""
    return _files("csv", train, test, columns)


def parquet(train: object, test: object = None, **columns: Any) -> dict[str, Any]:
    """Return the data of parquet files, for a dataset's function; see ``data.files.parquet``."""
    return _files("parquet", train, test, columns)


def image_folder(train: object, test: object = None, **columns: Any) -> dict[str, Any]:
    """Return the images of a folder, for a dataset's function; see ``data.files.image_folder``."""
    return _files("image_folder", train, test, columns)


def hub(name: str, **columns: Any) -> dict[str, Any]:
    """Return a dataset of the Hugging Face hub, for a dataset's function; see ``data.files.hub``."""
    return import_module("fedmaestro.data.files").hub(name, **columns)  # type: ignore[no-any-return]


def _files(kind: str, train: object, test: object, columns: Mapping[str, Any]) -> dict[str, Any]:
    return getattr(import_module("fedmaestro.data.files"), kind)(train, test, **columns)  # type: ignore[no-any-return]


def strategy(name: str, settings: Mapping[str, Any], *, summary: str = "") -> None:
    """Add a strategy: the values of settings that it stands for, by their dotted keys.

    ``extend.strategy("mine", {"train.objective": "my-objective", "train.aggregation": "my-mean"})``
    """
    register("strategy", name, settings, summary=summary)
