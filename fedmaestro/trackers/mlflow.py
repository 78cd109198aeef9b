"""MLflow: a run with the settings as parameters and the figures as metrics, step by round."""

import os
from typing import Any

from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import Summary
from fedmaestro.trackers.base import Tracker

_ID = "mlflow-run-id"


class MLflow(Tracker):
    """Writes to the store that ``MLFLOW_TRACKING_URI`` names, or to ``RUN/mlflow.db`` (SQLite).

    A resumed run goes on in the same MLflow run, whose id lies in ``RUN/mlflow-run-id``; its earlier rounds are written
    once only.
    """

    name = package = "mlflow"
    _client: Any
    _run: str
    _last: int

    def open(self, env: Environment, folder: RunFolder, resumed: bool) -> None:
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.place(folder, '') / 'mlflow.db'}"
        self.place(folder, "").mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=store)
        known = folder.path / _ID
        if resumed and known.is_file():
            self._run = known.read_text(encoding="utf-8")
            history = self._client.get_metric_history(self._run, "round/devices")
            self._last = max((metric.step for metric in history), default=-1)
            return
        experiment = self._client.get_experiment_by_name("fedmaestro")
        number = experiment.experiment_id if experiment else self._client.create_experiment("fedmaestro")
        tags = {"strategy": env.method.name, "seed": str(env.config.seed), "dataset": env.task.name}
        name = self.label or folder.path.name
        self._run = self._client.create_run(number, run_name=name, tags=tags).info.run_id
        self._last = -1
        for key, value in env.config.flat().items():
            self._client.log_param(self._run, key, value)
        known.write_text(self._run, encoding="utf-8")

    def write(self, number: int, figures: dict[str, float]) -> None:
        if number > self._last:
            for name, value in figures.items():
                self._client.log_metric(self._run, name, value, step=number)

    def close(self, folder: RunFolder, summary: Summary | None) -> None:  # noqa: ARG002
        self._client.set_terminated(self._run, "FINISHED" if summary and not summary.interrupted else "KILLED")
