"""Weights & Biases: a run with the settings as its configuration and the figures as history, step by round."""

import os
from typing import Any
from uuid import uuid4

from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import Summary
from fedmaestro.trackers.base import Tracker

_ID = "wandb-run-id"


class WandB(Tracker):
    """Writes to the project ``WANDB_PROJECT`` (by default ``fedmaestro``), files to ``RUN/wandb``.

    ``WANDB_MODE=offline`` keeps it on this machine. A resumed run goes on under the same id, which lies in
    ``RUN/wandb-run-id``; the server ignores the steps that it has.
    """

    name = package = "wandb"
    _run: Any

    def open(self, env: Environment, folder: RunFolder, resumed: bool) -> None:
        import wandb

        known = folder.path / _ID
        place = self.place(folder, "")
        place.mkdir(parents=True, exist_ok=True)
        number = known.read_text(encoding="utf-8") if resumed and known.is_file() else uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedmaestro"),
            dir=str(place),
            id=number,
            resume="allow",
            name=self.label or folder.path.name,
            group=env.method.name,
            config=env.config.flat(),
            reinit="create_new",
        )
        known.write_text(number, encoding="utf-8")

    def write(self, number: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=number)

    def close(self, folder: RunFolder, summary: Summary | None) -> None:  # noqa: ARG002
        if summary is not None:
            self._run.summary.update({"model_sha256": summary.model_sha256, "rounds": summary.rounds})
        self._run.finish()
