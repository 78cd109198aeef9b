"""What happens, as a line of JSON for each event: ``--log-format json``."""

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from fedmaestro.config.training import TrainingConfig
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import EpochRecord, RoundRecord, Summary, Trial
from fedmaestro.tasks.task import Task
from fedmaestro.terminal.console import drop_output
from fedmaestro.training.run import TrainingObserver


class JsonLines(logging.Handler):
    """Writes events, and the log, to standard output; every line has ``time`` (ISO 8601, UTC) and ``event``."""

    def __enter__(self) -> Self:
        logging.getLogger("fedmaestro").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fedmaestro").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message of the log."""
        self.event("log", level=record.levelname.lower(), message=record.getMessage())

    def event(self, name: str, **facts: Any) -> None:
        """Write an event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": name, **facts})
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read it has left; the work goes on.
            drop_output()


class RunLines(JsonLines, ComparisonObserver):
    """Of a run, of a comparison or of a tuning."""

    def on_data(self, done: int, total: int) -> None:
        """Tell that data are decoded, at the beginning and at the end."""
        if done in (0, total):
            self.event("data", done=done, total=total)

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:
        """Tell what runs and where its results go."""
        config = env.config
        self.event(
            "start",
            folder=str(folder.path),
            dataset=env.task.name,
            devices=len(env.parts),
            model=config.model.name,
            strategy=env.method.name,
            seed=config.seed,
            first_round=first_round,
            rounds=config.train.rounds,
        )

    def on_round(self, record: RoundRecord) -> None:
        """Tell of a complete round."""
        self.event("round", **record.to_dict())

    def on_finish(self, folder: RunFolder, summary: Summary) -> None:
        """Tell what came of a run."""
        self.event("finish", folder=str(folder.path), **summary.to_dict())

    def on_cells(self, path: Path, done: int, total: int) -> None:
        """Tell how many cells are finished."""
        self.event("cells", folder=str(path), done=done, total=total)

    def on_cell(self, label: str, seed: int) -> None:
        """Tell of a cell that starts."""
        self.event("cell", label=label, seed=seed)

    def on_trial(self, row: str, trial: Trial) -> None:
        """Tell what came of a trial."""
        self.event("trial", row=row, **trial.to_dict())


class TrainingLines(JsonLines, TrainingObserver):
    """Of a training on one machine."""

    def on_start(self, config: TrainingConfig, task: Task, folder: Path, steps: int) -> None:
        """Tell what is trained and where its results go."""
        self.event(
            "start",
            folder=str(folder),
            dataset=task.name,
            model=config.model.name,
            seed=config.seed,
            epochs=config.train.epochs,
            steps=steps,
        )

    def on_epoch(self, record: EpochRecord) -> None:
        """Tell of a complete epoch."""
        self.event("epoch", **record.to_dict())

    def on_note(self, text: str) -> None:
        """Tell what goes on besides."""
        self.event("note", text=text)
