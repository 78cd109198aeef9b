"""Run an experiment in this process: the function behind ``fedmaestro run`` and ``fedmaestro.run``."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UntrainedError
from fedmaestro.extend import given
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.direct_grid import DirectGrid
from fedmaestro.flower.federation import FREE_ON_RESUME, Federation
from fedmaestro.flower.simulation import checked_actors, simulate
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.report.observer import RunReporter
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.frames import devices_frame, rounds_frame
from fedmaestro.runs.model import load_model
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import RoundRecord, Summary
from fedmaestro.runs.start import check_folder, code_of, folder_of, name_of, resolve
from fedmaestro.runs.trust import honoured

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """A finished (or interrupted) run and its folder."""

    path: Path

    @property
    def rounds(self) -> list[RoundRecord]:
        """The history, round 0 first."""
        return RunFolder(self.path).read_rounds()

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return read_json(RunFolder(self.path).summary, Summary).to_dict()

    def to_pandas(self) -> "pd.DataFrame":
        """Return a row for every evaluated round and tier (``runs.frames.rounds_frame``)."""
        return rounds_frame(self.path)

    def devices_to_pandas(self) -> "pd.DataFrame":
        """Return a row for every round and device that trained or was tested (``runs.frames.devices_frame``)."""
        return devices_frame(self.path)

    def model(self, tier: str | None = None) -> nn.Module:
        """Return the trained model that serves ``tier`` (None: the whole one), in evaluation mode.

        Raises:
            UserError: an unknown tier, or a folder without a readable model.
        """
        return load_model(self.path, tier)


@honoured
def run(
    experiment: str | Path | ExperimentConfig | None = None,
    *,
    model: Any = None,
    data: Any = None,
    task: Any = None,
    objective: Any = None,
    optimizer: Any = None,
    aggregation: Any = None,
    selection: Any = None,
    strategy: Any = None,
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
    observers: Sequence[Observer] = (),
    client_app: ClientApp = default_client_app,
) -> Run:
    """Simulate a federation and return its run.

    Args:
        experiment: TOML file or configuration; None: the demo on embedded data.
        model: a ``torch.nn.Module`` class, a function ``(input_shape, num_classes)`` or a module, as for
            ``extend.model``; here and for the others, a string is the name of a row.
        data: what ``extend.dataset`` takes: data, or a function that returns them (``data.own.FORM``).
        task: what ``extend.task`` takes.
        objective: what ``extend.objective`` takes.
        optimizer: what ``extend.optimizer`` takes.
        aggregation: what ``extend.aggregation`` takes.
        selection: what ``extend.selection`` takes.
        strategy: settings by their dotted keys, or the name of a row.
        partition: what ``extend.partition`` takes.
        fleet: what ``extend.fleet`` takes.
        use: files or modules of user code (``use``).
        overrides: dotted settings, for example ``{"train.rounds": 5}``.
        data_dir: folder of local data (``data.dir``).
        out: run folder (``out``); a new one under ``runs/`` by default.
        actors: Ray actors that work in parallel, one per free CPU by default; 0: all work is done in this process. They
            change the speed, not the result.
        gpus_per_actor: GPUs of each actor, also parts of one; with ``actors=0``, of this process; 0: the CPU.
        resume: go on with the run in ``out`` from its checkpoint; without ``experiment`` its own configuration is used.
        trust: run the code that a run folder holds (``out``, or that of ``experiment``), also where somebody else has
            written it.
        ray_address: a running Ray cluster; by default the Ray that this process is in, or one of our own.
        observers: are told about the progress.
        client_app: the hosts' app.

    Raises:
        UserError: anything wrong with the input; nothing was written then.
        UntrainedError: no update counted, in the whole run or for ``train.max-idle-rounds``; what was reached is in the
            run folder.
        KeyboardInterrupt: Ctrl-C before the first round (later, the run ends with what it has).
    """
    objects = {
        "model": model,
        "dataset": data,
        "task": task,
        "objective": objective,
        "optimizer": optimizer,
        "aggregation": aggregation,
        "selection": selection,
        "strategy": strategy,
        "partition": partition,
        "fleet": fleet,
    }
    overrides = given(objects, use, overrides)
    config = resolve(ExperimentConfig, experiment, overrides, data_dir, out, resume)
    actors = checked_actors(actors)
    told = [RunReporter(), *observers]
    folder, env = prepare(config, name_of(experiment, config), resume=resume, on_data=to_all(told))
    stop = threading.Event()

    def server(grid: Grid) -> None:
        Federation(grid, env, folder, stop, [_Retiring(grid), *told], resume=resume).run()

    try:
        simulate(server, client_app, actors=actors, gpus_per_actor=gpus_per_actor, stop=stop, ray_address=ray_address)
    except InterruptedRunError:
        # Before the first round: there is nothing to keep.
        raise KeyboardInterrupt from None
    finished = Run(folder.path)
    check_trained(read_json(folder.summary, Summary), folder)
    return finished


def check_trained(summary: Summary, folder: RunFolder) -> None:
    """Raise UntrainedError unless a run that was not interrupted has learnt something."""
    if (why := why_untrained(summary)) is not None:
        raise UntrainedError(f"{why}: {folder.log} says more, what was reached is in {folder.path}", folder.path)


def why_untrained(summary: Summary) -> str | None:
    """Return why a run that was not interrupted has learnt nothing; None: it has."""
    if summary.interrupted or summary.stopped is not None:
        return None if summary.interrupted else summary.stopped
    if not summary.rounds or summary.updates.trained:
        return None
    lost = [f"{count} {kind}" for kind, count in summary.failed_by.items()]
    lost += [f"{summary.updates.dropped} dropped"] if summary.updates.dropped else []
    return f"no update counted in {summary.rounds} rounds ({', '.join(lost) or 'no device was sampled'})"


class _Retiring(Observer):
    """Lets the hosts end while the report is written."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def on_finish(self, folder: RunFolder, summary: Summary) -> None:  # noqa: ARG002
        if isinstance(self.grid, DirectGrid):
            self.grid.retire()


def to_all(observers: Sequence[Observer]) -> Callable[[int, int], None]:
    """Return what tells every observer about the decoding of data."""

    def on_data(done: int, total: int) -> None:
        for observer in observers:
            observer.on_data(done, total)

    return on_data


def prepare(
    config: ExperimentConfig,
    name: str,
    *,
    resume: bool = False,
    on_data: Callable[[int, int], None] | None = None,
) -> tuple[RunFolder, Environment]:
    """Check everything that a run needs and return its folder and environment; nothing is written there yet.

    Args:
        config: the experiment.
        name: first part of the default folder's name.
        resume: whether the folder must hold this very run, or none.
        on_data: is told (done, total) while the data are decoded for the first time.

    Raises:
        UserError: whatever is wrong.
    """
    folder = folder_of(config, name, f"{config.train.strategy}-seed{config.seed}")
    check_folder(folder, config, resume, FREE_ON_RESUME)
    code = code_of(config, folder.path if resume else None)
    return folder, open_environment(config, on_data, code=code)
