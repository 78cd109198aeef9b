"""What the user sees in the terminal: a live display while a run goes on, and the closing table per tier."""

import logging
import time
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedmaestro.config.search import settings_text
from fedmaestro.report.curves import metric_of
from fedmaestro.report.format import (
    MISSING,
    Shown,
    format_bytes,
    format_count,
    format_privacy,
    format_seconds,
    lost_text,
)
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import MetricFacts, RoundRecord, Trial, Updates
from fedmaestro.terminal.console import LogLines, Terminal


class LiveDisplay(ComparisonObserver):
    """Observer that shows rounds, accuracy per tier, bytes, virtual and wall time and failures.

    On a terminal the display refreshes in place; elsewhere (a log file, CI) it prints a line per evaluated round.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Terminal()
        self._started = time.monotonic()
        self._rounds: list[RoundRecord] = []
        self._names: list[str] = []
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._bar = self._bars.add_task("starting Ray and the hosts", total=None)
        self._phase = ""
        # Through the console: other writers would tear the live display.
        self._log = LogLines(self.console)
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        logging.getLogger("fedmaestro").addHandler(self._log)
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()
        logging.getLogger("fedmaestro").removeHandler(self._log)

    def on_data(self, done: int, total: int) -> None:
        """Show the progress of decoding a dataset for the first time."""
        self._bars.update(self._bar, description="decoding the images (once)", completed=done, total=total)

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:
        """Show what runs and where its results go."""
        config = env.config
        self._names = [tier.tier.name for tier in env.plan.tiers]
        self._bars.update(self._bar, description="round", completed=max(0, first_round - 1), total=config.train.rounds)
        self.console.print(
            f"{env.task.name}, {len(env.parts)} devices, {config.train.devices_per_round} a round · "
            f"{config.model.name} · {env.method.name} with {env.method.objective.name} · seed {config.seed}",
            soft_wrap=True,
        )
        if held := config.data.validation:
            self.console.print(
                f"evaluated on {env.task.test_examples} training examples that are held out (data.validation={held}), "
                "not on the test set",
                soft_wrap=True,
            )
        if dense := env.plan.architecture.kept_dense if env.plan.architecture.own else {}:
            said = ", ".join(f"{layer} ({why})" for layer, why in dense.items())
            self.console.print(f"layers that stay dense: {said}", soft_wrap=True)
        self.console.print(f"results go to {folder.path}", soft_wrap=True)

    def on_progress(self, server_round: int, phase: str, done: int, total: int) -> None:
        """Show how far the round is."""
        self._phase = f"round {server_round}: {phase} {done}/{total} messages"

    def on_round(self, record: RoundRecord) -> None:
        """Show a complete round."""
        self._rounds.append(record)
        self._bars.update(self._bar, completed=record.round)
        if record.tiers and not self.console.is_terminal:
            line = f"round {record.round:4d}  {self._shown.heading}  {self._scores(record)}  {self._totals()}"
            self.console.print(line, soft_wrap=True)

    @property
    def _shown(self) -> Shown:
        return Shown(metric_of(self._rounds))

    def _scores(self, record: RoundRecord) -> str:
        show = self._shown
        return "  ".join(f"{name} {show.number(tier.get(show.name), 1)}" for name, tier in record.tiers.items())

    def _render(self) -> Group:
        latest = next((record for record in reversed(self._rounds) if record.tiers), None)
        parts: list[Any] = [self._bars]
        if latest is not None:
            table = Table(box=None, padding=(0, 2))
            show = self._shown
            table.add_column(f"{show.heading}, round {latest.round}")
            row = ["now"]
            for name in self._names:
                table.add_column(name, justify="right")
                score = latest.tiers.get(name)
                row.append(show.number(score.get(show.name) if score else None, 1))
            table.add_row(*row)
            parts.append(table)
        parts.append(Text(f"{self._totals()}   {self._phase}", style="dim"))
        return Group(*parts)

    def _totals(self) -> str:
        down = sum(record.download_bytes for record in self._rounds)
        up = sum(record.upload_bytes for record in self._rounds)
        virtual = sum(record.virtual_seconds for record in self._rounds)
        failed = sum(record.failed for record in self._rounds)
        return (
            f"down {format_bytes(down)}  up {format_bytes(up)}  virtual {format_seconds(virtual)}  "
            f"wall {format_seconds(time.monotonic() - self._started)}  failed {failed}"
        )


class ComparisonDisplay(LiveDisplay):
    """Observer of a comparison or a tuning: cells on top, the rounds of the cell in work below."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._cells = self._bars.add_task("cells", total=None)

    def on_cells(self, path: Path, done: int, total: int) -> None:
        """Show how many cells are finished."""
        if not self._bars.tasks[self._cells].total:
            self.console.print(f"{total} cells, {done} of them finished; results go to {path}", soft_wrap=True)
        self._bars.update(self._cells, completed=done, total=total)

    def on_cell(self, label: str, seed: int) -> None:
        """Show a cell that starts."""
        self._rounds, self._started = [], time.monotonic()
        self._label = f"{label}, seed {seed}"
        self._bars.update(self._bar, description=self._label, completed=0, total=None)

    def on_trial(self, row: str, trial: Trial) -> None:
        """Show what came of a trial."""
        value = (
            "failed" if trial.value is None else f"validation {self._shown.heading} {self._shown.number(trial.value)}"
        )
        line = f"{row}, trial {trial.number}: {settings_text(trial.settings)}: {value}"
        self.console.print(line, soft_wrap=True, markup=False)

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:  # noqa: ARG002
        """Show where the cell begins."""
        self._names = [tier.tier.name for tier in env.plan.tiers]
        self._bars.update(self._bar, completed=max(0, first_round - 1), total=env.config.train.rounds)

    def on_round(self, record: RoundRecord) -> None:
        """Show a complete round; off a terminal, one line per cell."""
        self._rounds.append(record)
        self._bars.update(self._bar, completed=record.round)
        if record.round == self._bars.tasks[self._bar].total and not self.console.is_terminal:
            line = f"{self._label}: {self._shown.heading}  {self._scores(record)}  {self._totals()}"
            self.console.print(line, soft_wrap=True)


def comparison_table(results: dict[str, Any]) -> Table:
    """Return the closing table of a comparison: final value of the metric, mean ± standard deviation over seeds."""
    seeds, show = ", ".join(map(str, results["seeds"])), _shown_of(results)
    title = f"{results['experiment']} · final {show.heading} · seeds {seeds}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", no_wrap=True)
    for heading in (*results["tiers"], "mean", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["strategies"]:
        stats = [*(row["tiers"].get(name, {}).get("final") for name in results["tiers"])]
        table.add_row(row["name"], *(_stat(show, x) for x in (*stats, row["mean"]["final"], row["worst"]["final"])))
    counts = {
        row["name"]: sum((Updates(**counts) for counts in row.get("updates", {}).values()), Updates())
        for row in results["strategies"]
    }
    if lost := [f"{name} {lost_text(updates)}" for name, updates in counts.items() if updates.lost]:
        table.caption = f"updates lost: {', '.join(lost)}"
    return table


def _shown_of(content: dict[str, Any]) -> Shown:
    """Return how the metric of a summary or of results is shown."""
    return Shown(MetricFacts(**content.get("metric", {})))


def _stat(show: Shown, stat: dict[str, Any] | None) -> str:
    if not stat or stat["mean"] is None:
        return MISSING
    # Below the mean, so that five tiers fit into eighty columns.
    return show.number(stat["mean"]) + ("" if stat["std"] is None else f"\n±{show.number(stat['std'])}")


def tier_table(summary: dict[str, Any]) -> Table:
    """Return the closing table, largest tier first: MACs per example (forward), download per device and round.

    ``lost``, where there are any, are the updates that do not count, of those that were asked for.
    """
    show = _shown_of(summary)
    main = "" if show.name == "accuracy" else f" · {show.name}"
    split = " · validation split" if summary.get("split") == "validation" else ""
    title = f"{summary['dataset']} · {summary['strategy']} · after round {summary['rounds']}{main}{split}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("tier", no_wrap=True)
    updates = {name: Updates(**tier.get("updates", {})) for name, tier in summary["tiers"].items()}
    lost = any(counts.lost for counts in updates.values())
    headings = ("ranks", "params", "MACs", "download", f"final{show.unit}", f"best{show.unit}")
    for heading in ("devices", *(["lost"] if lost else []), *headings):
        table.add_column(heading, justify="right", no_wrap=heading != "ranks")
    for name, tier in summary["tiers"].items():
        table.add_row(
            name,
            str(tier["devices"]),
            *([lost_text(updates[name])] if lost else []),
            _ranks(tier["ranks"]),
            format_count(tier["params"]),
            format_count(tier["macs_per_example"]),
            format_bytes(tier["download_bytes"]),
            show.number(tier[f"final_{show.name}"]),
            show.number(tier[f"best_{show.name}"]),
        )
    return table


def _ranks(ranks: dict[str, float]) -> str:
    values = [rank for key, rank in ranks.items() if key not in ("width", "depth", "share")]
    some = "/".join(map(str, values)) if len(values) <= 4 else f"{min(values)}…{max(values)}"
    if values:  # one line of the table, also with a width
        return f"{some} w{ranks['width']:.2g}" if "width" in ranks else some
    return ", ".join(f"{key} {ranks[key]:.3g}" for key in ("width", "depth", "share") if key in ranks)


def print_closing(console: Console, path: str, summary: dict[str, Any]) -> None:
    """Print the closing table and where everything lies."""
    console.print(tier_table(summary))
    if summary["failed"]:
        why = ", ".join(f"{count} {kind}" for kind, count in summary["failed_by"].items())
        console.print(
            f"{summary['failed']} device updates failed ({why}): see {path}/run.log", style="bold", soft_wrap=True
        )
    console.print(
        f"wall {format_seconds(summary['wall_seconds'])}, virtual {format_seconds(summary['virtual_seconds'])}, "
        f"down {format_bytes(summary['download_bytes'])}, up {format_bytes(summary['upload_bytes'])}"
    )
    if summary.get("epsilon") is not None:
        spent = format_privacy(summary["epsilon"], summary["delta"])
        console.print(f"differential privacy of the model: {spent}", soft_wrap=True)
    console.print(f"model_sha256 {summary['model_sha256']}", soft_wrap=True)
    console.print(f"results: {path} (report.html, plots/tier_accuracy.png)", soft_wrap=True)
