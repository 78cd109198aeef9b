"""Flower ServerApp: the same job through ``flwr run``, configured by Flower's run config."""

import logging
import sys
import threading

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmaestro.config.base import read
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.flower.federation import Federation
from fedmaestro.flower.run import prepare
from fedmaestro.report.format import Shown
from fedmaestro.report.observer import RunReporter
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import RoundRecord

app = ServerApp()

log = logging.getLogger("fedmaestro")


class LogObserver(Observer):
    """Writes one log line per evaluated round; there is no terminal behind a ServerApp."""

    def __init__(self) -> None:
        self._shown = Shown()

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:  # noqa: ARG002
        log.info("results go to %s", folder.path)

    def on_round(self, record: RoundRecord) -> None:
        if record.metric is not None:
            self._shown = Shown(record.metric)
        if record.tiers:
            show = self._shown
            scores = "  ".join(f"{name} {show.text(tier.get(show.name))}" for name, tier in record.tiers.items())
            log.info("round %d: %s", record.round, scores)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config (the schema of ``config.experiment``)."""
    # Only our own lines: at INFO, the HTTP library under Flower logs every heartbeat.
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    config = read(ExperimentConfig, None, context.run_config, "Flower's run config")
    folder, env = prepare(config, config.data.name)
    summary = Federation(grid, env, folder, threading.Event(), [RunReporter(), LogObserver()]).run()
    log.info("model_sha256 %s, results in %s", summary.model_sha256, folder.path)
