"""Observers that write a run to experiment trackers: TensorBoard, MLflow, Weights & Biases, JSON lines.

Each takes the folder that it writes to; by default one below the run's. Figures of single devices are written with
``devices=True``. Names are those of ``scalars``::

    fedmaestro.run(…, observers=[TensorBoard(), JsonLines(devices=True)])
"""

from collections.abc import Callable

from fedmaestro.errors import UserError, check_name
from fedmaestro.trackers.base import Tracker, scalars
from fedmaestro.trackers.jsonl import JsonLines
from fedmaestro.trackers.mlflow import MLflow
from fedmaestro.trackers.tensorboard import TensorBoard
from fedmaestro.trackers.wandb import WandB

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "jsonl": JsonLines,
}
"""By name, as ``--track`` takes them."""

SUMMARIES = {
    "tensorboard": "event files in RUN/tensorboard (extra: tensorboard)",
    "mlflow": "a run in the store of MLFLOW_TRACKING_URI, or in RUN/mlflow.db (extra: mlflow)",
    "wandb": "a run of Weights & Biases, files in RUN/wandb (extra: wandb)",
    "jsonl": "one flat JSON object per round in RUN/metrics.jsonl",
}


def trackers_of(names: list[str]) -> list[Tracker]:
    """Return the trackers of these names; UserError for an unknown one, one twice, or one whose package is missing."""
    for name in names:
        check_name("--track", name, TRACKERS)
        if names.count(name) > 1:
            raise UserError(f"--track {name} is given twice: name each tracker once")
    return [TRACKERS[name]() for name in names]


__all__ = ["TRACKERS", "JsonLines", "MLflow", "TensorBoard", "Tracker", "WandB", "scalars", "trackers_of"]
