"""The observer that draws a run's partition and writes its plots and page."""

import numpy as np

from fedmaestro.data import class_counts
from fedmaestro.report.figure import save_figure
from fedmaestro.report.partition_plot import partition_figure
from fedmaestro.report.run_page import write_run_report
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import Summary

SHOWN = 1000
"""Devices whose partition is drawn, spread over the fleet: no more can be told apart."""


class RunReporter(Observer):
    """Writes ``plots/`` and ``report.html`` at the end: drawing takes seconds, in which hosts would have to wait."""

    def __init__(self) -> None:
        self._env: Environment | None = None

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:  # noqa: ARG002
        """Keep what there is to draw."""
        self._env = env

    def on_finish(self, folder: RunFolder, summary: Summary) -> None:  # noqa: ARG002
        """Draw which device holds how much of which class, and write the page about what there is."""
        if self._env is not None:
            _draw_partition(self._env, folder)
        write_run_report(folder.path)


def _draw_partition(env: Environment, folder: RunFolder) -> None:
    picture = folder.plots / "partition"
    if env.task.labels is None or picture.with_suffix(".png").exists():
        return
    devices = len(env.parts)
    shown = np.unique(np.linspace(0, devices - 1, min(devices, SHOWN)).astype(int)).tolist()
    figure = partition_figure(
        class_counts(env.task.labels, [env.parts[device] for device in shown], env.task.num_classes),
        # Where devices draw a tier in every round, none is their own.
        tiers=[env.tier(device).tier.name for device in shown] if env.config.fleet.assignment == "fixed" else None,
        tier_order=[tier.tier.name for tier in env.plan.tiers],
        title=f"{env.task.name}: examples of each device by class",
        devices=devices,
    )
    save_figure(figure, picture)
