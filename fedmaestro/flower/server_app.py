"""Flower ServerApp: the same job through ``flwr run``, configured by Flower's run config."""

import logging
import sys
import threading
from collections.abc import Mapping

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmaestro.config.base import Value, read
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UntrainedError, UserError
from fedmaestro.flower.federation import Federation
from fedmaestro.flower.run import check_trained, prepare
from fedmaestro.report.format import Shown
from fedmaestro.report.observer import RunReporter
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import RoundRecord
from fedmaestro.runs.start import resolve

app = ServerApp()

log = logging.getLogger("fedmaestro")

RESUME = "resume"
"""Key of the run config that no experiment has: whether to go on with the run in ``out``."""

WHERE = "Flower's run config"


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
    """Run the experiment of the run config (the schema of ``config.experiment``, and ``resume``)."""
    # Only our own lines: at INFO, the HTTP library under Flower logs every heartbeat.
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        config, resume = read_run_config(context.run_config)
        folder, env = prepare(config, config.data.name, resume=resume)
        observers = [RunReporter(), LogObserver()]
        summary = Federation(grid, env, folder, threading.Event(), observers, resume=resume).run()
        check_trained(summary, folder)
    except (UserError, UntrainedError):
        logging.getLogger("flwr").addFilter(on_one_line)
        raise
    log.info("model_sha256 %s, results in %s", summary.model_sha256, folder.path)


def read_run_config(run_config: Mapping[str, Value]) -> tuple[ExperimentConfig, bool]:
    """Return the experiment, and whether to go on with it.

    Flower gives every key that the app declares. Of those that have their default it is unknown whether the user gave
    them, so the run to go on with decides about these.

    Raises:
        UserError: a wrong value; ``resume`` without ``out``.
    """
    settings = dict(run_config)
    resume = settings.pop(RESUME, False)
    if not isinstance(resume, bool):
        raise UserError(f"setting {RESUME} = {resume!r} in {WHERE}: true or false")
    if not resume:
        return read(ExperimentConfig, None, settings, WHERE), False
    if not settings["out"]:
        raise UserError(f"setting {RESUME} = true in {WHERE} needs the folder of the run: add out=DIR")
    defaults = ExperimentConfig().flat()
    given = {key: value for key, value in settings.items() if value not in (defaults.get(key), "default")}
    return resolve(ExperimentConfig, None, given, None, None, resume=True), True


def on_one_line(record: logging.LogRecord) -> bool:
    """Have Flower say of a user's mistake what it is: it prints the traceback of whatever a ServerApp raises."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError | UntrainedError):
        record.msg, record.args, record.exc_info = f"fedmaestro: {error}", (), None
    return True
