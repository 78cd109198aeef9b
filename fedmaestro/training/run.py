"""Train on one machine: the function behind ``fedmaestro train``, its folder, its checkpoints."""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmaestro.config.training import TrainingConfig
from fedmaestro.deploy.curve import accuracy_cost_curve, budget_fractions
from fedmaestro.deploy.rank_search import deployed_cost
from fedmaestro.errors import DivergedError, UserError, check_name
from fedmaestro.extend import given
from fedmaestro.fleet.cost import Trace
from fedmaestro.fleet.traces import trace_of
from fedmaestro.interrupt import interrupt_sets
from fedmaestro.memory import keep_freed_memory
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.static_norm import calibrate, statistics
from fedmaestro.report import cost_figure, rank_figure, save_figure
from fedmaestro.runs.checkpoint import Checkpoint, load_checkpoint, remove_unused, save_checkpoint
from fedmaestro.runs.code import Code, activate, write_code
from fedmaestro.runs.folder import RunFolder, append_record, write_atomically, write_record, write_records
from fedmaestro.runs.model import ModelCard, load_model, write_model
from fedmaestro.runs.reader import read_json, read_lines
from fedmaestro.runs.records import CostCurve, EpochRecord, TrainingSummary
from fedmaestro.runs.start import check_folder, code_of, folder_of, name_of, resolve
from fedmaestro.runs.trust import honoured
from fedmaestro.submodel import State
from fedmaestro.tasks.fitting import fitted
from fedmaestro.tasks.opening import open_task
from fedmaestro.tasks.task import CALIBRATION, Split, Task, evaluate
from fedmaestro.training.trainer import ADVICE, Trainer

CHECKPOINT_SECONDS = 300.0
"""Longest time between two checkpoints; there is one after every epoch too."""

_FREE_ON_RESUME = ("out", "data.dir", "curve.")
"""Settings that may differ in a continuation: they name places, or what is measured after the training."""


class TrainingObserver:
    """Is told about a training; the methods do nothing until a subclass says what."""

    def on_start(self, config: TrainingConfig, task: Task, folder: Path, steps: int) -> None:
        """Data and model are there; an epoch has ``steps`` steps."""

    def on_step(self, epoch: int, step: int, loss: float) -> None:
        """Step ``step`` of epoch ``epoch`` is done (both from 1)."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch is complete and written."""

    def on_note(self, text: str) -> None:
        """Something else goes on."""


@dataclass(frozen=True)
class TrainingRun:
    """A finished (or interrupted) training and its folder."""

    path: Path

    @property
    def epochs(self) -> list[EpochRecord]:
        """The history, epoch 0 first."""
        return read_epochs(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return read_json(RunFolder(self.path).summary, TrainingSummary).to_dict()

    @property
    def curve(self) -> dict[str, Any]:
        """The content of ``curve.json``: models per budget with their figures."""
        return read_json(_curve(self.path), CostCurve).to_dict()

    def model(self) -> nn.Module:
        """Return the trained model in evaluation mode."""
        return load_model(self.path)


@honoured
def train(
    config: str | Path | TrainingConfig | None = None,
    *,
    model: Any = None,
    data: Any = None,
    task: Any = None,
    use: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    trust: bool = False,  # noqa: ARG001 - ``honoured`` reads it
    compare: str | Path | None = None,
    observers: Sequence[TrainingObserver] = (),
) -> TrainingRun:
    """Train one model on this machine and draw its accuracy–cost curve.

    Args:
        config: TOML file or configuration; None: the defaults (embedded digits).
        model: what ``extend.model`` takes, or the name of a row.
        data: what ``extend.dataset`` takes.
        task: what ``extend.task`` takes.
        use: files or modules of user code (``use``).
        overrides: dotted settings, for example ``{"train.epochs": 5}``.
        data_dir: folder of local data (``data.dir``).
        out: run folder; a new one under ``runs/`` by default.
        resume: go on with the run in ``out``; without ``config`` its own configuration is used.
        trust: run the code that a run folder holds (``out``, or that of ``config``), also where somebody else has
            written it.
        compare: folder of another training (of the dense model, say), whose curve is drawn along.
        observers: are told about the progress.

    Raises:
        UserError: anything wrong with the input; nothing was written then.
        DivergedError: the loss is not finite; the last checkpoint stays.
    """
    objects = {"model": model, "dataset": data, "task": task}
    resolved = resolve(TrainingConfig, config, given(objects, use, overrides), data_dir, out, resume)
    folder = folder_of(resolved, name_of(config, resolved), f"{resolved.model.form}-seed{resolved.seed}")
    code = code_of(resolved, folder.path if resume else None)
    activate(code)
    _check(resolved, folder, resume)
    other = None if compare is None else _read_curve(Path(compare))
    session = _Session(resolved, open_task(resolved, _decoding(observers)), folder, observers, code)
    stop = threading.Event()
    keep_freed_memory()
    # Dropout needs PyTorch's global generator seeded; the caller's stays as it was.
    with folder.claim(resume), torch.random.fork_rng():
        with interrupt_sets(stop):
            complete = session.run(stop)
        if complete:
            session.finish(other)
    return TrainingRun(folder.path)


def _decoding(observers: Sequence[TrainingObserver]) -> Callable[[int, int], None]:
    """Return what tells the observers about decoding, at every tenth of the images."""
    tenths: set[int] = set()

    def progress(done: int, total: int) -> None:
        if (tenth := 10 * done // total) not in tenths:
            tenths.add(tenth)
            for observer in observers:
                observer.on_note(f"decoding the images (once): {10 * tenth} %")

    return progress


class _Session:
    """One process's part of a training."""

    def __init__(
        self, config: TrainingConfig, task: Task, folder: RunFolder, observers: Sequence[TrainingObserver], code: Code
    ) -> None:
        self.config, self.folder, self.observers, self.code = config, folder, observers, code
        self.architecture, self.task = fitted(
            task,
            lambda shaped: Architecture(
                name=config.model.name,
                input_shape=shaped.input_shape,
                num_classes=shaped.num_classes,
                inputs=shaped.inputs,
                form=config.model.form,
                keep_dense=config.model.keep_dense,
            ),
        )
        self.traced: Trace = trace_of(replace(self.architecture, form="lod"))
        self.trainer = Trainer(config, self.task, self.architecture)
        self.records: list[EpochRecord] = []

    def run(self, stop: threading.Event) -> bool:
        """Train to the last epoch; return False when ``stop`` ended it (everything is kept then)."""
        self._begin()
        trainer, train = self.trainer, self.config.train
        while trainer.epoch < train.epochs:
            started = saved = time.monotonic()
            epoch, first = trainer.epoch, trainer.step % trainer.steps_per_epoch
            for batch in self.task.epoch(self.config.seed, epoch, train.batch_size, first):
                loss = trainer.train_step(batch)
                for observer in self.observers:
                    observer.on_step(epoch + 1, trainer.step - epoch * trainer.steps_per_epoch, loss)
                if stop.is_set() and trainer.epoch == epoch:
                    self._save()
                    self._summarize(interrupted=True)
                    return False
                if time.monotonic() - saved > CHECKPOINT_SECONDS and trainer.epoch == epoch:
                    saved = time.monotonic()
                    self._save()
            self._record(trainer.end_epoch(), time.monotonic() - started)
            self._save()
            if stop.is_set() and trainer.epoch < train.epochs:
                self._summarize(interrupted=True)
                return False
        self._summarize()
        return True

    def _begin(self) -> None:
        checkpoint = load_checkpoint(self.folder.checkpoint)
        if checkpoint is not None:
            self._resume(checkpoint)
        write_code(self.folder.path, self.code)
        write_atomically(self.folder.config, self.config.to_toml())
        for observer in self.observers:
            observer.on_start(self.config, self.task, self.folder.path, self.trainer.steps_per_epoch)
            for record in self.records:
                observer.on_epoch(record)
        if checkpoint is None:
            _epochs(self.folder.path).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            self._record(None, 0.0)

    def _resume(self, checkpoint: Checkpoint) -> None:
        if checkpoint.fingerprint != self._fingerprint():
            raise UserError(f"{self.folder.path} was trained on other data or another model: start a new run")
        self.trainer.restore(checkpoint.tensors)
        self.records = [record for record in read_epochs(self.folder.path) if record.epoch <= self.trainer.epoch]
        if len(self.records) != self.trainer.epoch + 1:
            raise UserError(f"{_epochs(self.folder.path)} lacks epochs of its checkpoint: start a new run")
        write_records(_epochs(self.folder.path), self.records)
        remove_unused(self.folder.checkpoint)

    def _record(self, train_loss: float | None, seconds: float) -> None:
        trainer = self.trainer
        split: Split = "validation" if self.task.has_validation else "test"
        score = evaluate(trainer.model, self.task, self.task.split(split), trainer.device)
        if not math.isfinite(score.loss):
            where = f"on the {split} set after epoch {trainer.epoch}"
            raise DivergedError(f"the loss is {score.loss} {where}: {ADVICE}")
        params, macs = deployed_cost(self.traced, self._ranks())
        record = EpochRecord(
            epoch=trainer.epoch,
            train_loss=train_loss,
            loss=score.loss,
            value=self.task.value(score),
            ranks=trainer.ranks,
            params=params,
            macs_per_example=macs,
            seconds=round(seconds, 3),
        )
        append_record(_epochs(self.folder.path), record)
        self.records.append(record)
        for observer in self.observers:
            observer.on_epoch(record)

    def _ranks(self) -> dict[str, int]:
        """Return the model's ranks; a dense model has all of them."""
        return self.trainer.ranks or {x.name: x.max_rank for x in self.traced.layers if x.max_rank is not None}

    def _save(self) -> None:
        checkpoint = Checkpoint(number=self.trainer.step, tensors=self.trainer.state(), fingerprint=self._fingerprint())
        save_checkpoint(self.folder.checkpoint, checkpoint)

    def _fingerprint(self) -> str:
        data, model = self.config.data, self.config.model
        facts = [self.task.fingerprint, self.config.seed, data.limit, data.validation, model.model_dump()]
        facts += [self.code.fingerprint] if self.code else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _summarize(self, *, interrupted: bool = False) -> None:
        best = max if self.task.main.higher_is_better else min
        values = [record.value for record in self.records]
        state = self.trainer.model_state()
        card = ModelCard(
            model=self.config.model.name,
            form=self.architecture.form,
            keep_dense=self.architecture.keep_dense,
            input_shape=list(self.task.input_shape),
            num_classes=self.task.num_classes,
            inputs=self.task.inputs,
            size=self.architecture.size_of(state),
            task=self.task.name,
            epoch=self.trainer.epoch,
            **self.task.facts,
        )
        sha256 = write_model(self.folder.path, {None: state}, card, {None: self._statistics(state)})
        last = self.records[-1]
        summary = TrainingSummary(
            task=self.task.name,
            model=self.config.model.name,
            form=self.architecture.form,
            seed=self.config.seed,
            metric=self.task.metric,
            split="validation" if self.task.has_validation else "test",
            interrupted=interrupted,
            epochs=last.epoch,
            final_value=last.value,
            final_loss=last.loss,
            best_value=best(values),
            params=last.params,
            macs_per_example=last.macs_per_example,
            ranks=last.ranks,
            dense_params=self.records[0].params,
            dense_macs_per_example=self.records[0].macs_per_example,
            wall_seconds=round(sum(record.seconds for record in self.records), 3),
            model_sha256=sha256,
        )
        write_record(self.folder.summary, summary)
        if self.architecture.form == "lod":
            history = [(record.epoch, {"": record.ranks}) for record in self.records]
            figure = rank_figure(history, full=self.records[0].ranks, x_label="Epoch", title=self._title())
            save_figure(figure, self.folder.plots / "ranks")

    def _statistics(self, state: State) -> State:
        """Return what static norms evaluate by, so that the model that is loaded needs no data; often nothing."""
        if not self.architecture.needs_calibration:
            return {}
        model = self.architecture.with_state(state)
        calibrate(model, *self.task.calibration(self.config.seed, CALIBRATION)[0].inputs)
        return statistics(model)

    def finish(self, other: tuple[str, CostCurve] | None) -> None:
        """Write ``curve.json`` and the plot of the accuracy–cost curve."""

        def note(text: str) -> None:
            for observer in self.observers:
                observer.on_note(text)

        curve = accuracy_cost_curve(self.config, self.task, self.architecture, self.trainer.model, note)
        write_record(_curve(self.folder.path), curve)
        if other is not None:
            name, its = other
            series = {f"{x} ({name})" if x in curve.series else x: points for x, points in its.series.items()}
            both = {"series": {**curve.series, **series}, "dense": curve.dense or its.dense}
            curve = curve.model_copy(update=both)
        save_figure(cost_figure(curve, self._title()), self.folder.plots / "accuracy_cost")

    def _title(self) -> str:
        return f"{self.task.name} · {self.config.model.name} · {self.architecture.form} · seed {self.config.seed}"


def read_epochs(path: Path) -> list[EpochRecord]:
    """Return the epochs of a folder; a last line that a crash cut short is ignored."""
    return read_lines(_epochs(path), EpochRecord)


def _epochs(path: Path) -> Path:
    return path / "epochs.jsonl"


def _curve(path: Path) -> Path:
    return path / "curve.json"


def _read_curve(folder: Path) -> tuple[str, CostCurve]:
    """Return the name and the curve of another training."""
    try:
        return folder.resolve().name, read_json(_curve(folder), CostCurve)
    except UserError as error:
        raise UserError(f"--compare {folder}: {error}: give the folder of a finished training") from None


def _check(config: TrainingConfig, folder: RunFolder, resume: bool) -> None:
    """Check what can be checked before data are read and anything is written."""
    check_name("model.name", config.model.name, MODELS)
    budget_fractions(config.curve)
    _check_device(config.train.device)
    check_folder(folder, config, resume, _FREE_ON_RESUME)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device={name!r} is no PyTorch device: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device={name!r} is not supported: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train.device={name!r}: this PyTorch sees no such device: use cpu")
