"""What the user sees of a training: bars for epochs and steps, a line per epoch, and the closing table."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedmaestro.config.training import TrainingConfig
from fedmaestro.report.format import Shown, format_count
from fedmaestro.runs.records import EpochRecord, MetricFacts
from fedmaestro.tasks.task import Task, metric_facts
from fedmaestro.terminal.console import Terminal
from fedmaestro.training.run import TrainingObserver


class TrainingDisplay(TrainingObserver):
    """Observer of a training; without a terminal it prints only the line per epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Terminal()
        self._shown = Shown()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._epochs = self._progress.add_task("opening the data", total=None)
        self._steps = self._progress.add_task("step", total=None, visible=False)

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_start(self, config: TrainingConfig, task: Task, folder: Path, steps: int) -> None:
        """Show what is trained and where its results go."""
        self._shown = Shown(metric_facts(task))
        train = config.train
        how = f"{train.sampling} sampling, lasso {train.group_lasso:g}" if config.model.form == "lod" else "dense"
        self.console.print(
            f"{task.name}, {task.examples} examples · {config.model.name} · {how} · {train.epochs} epochs of {steps} "
            f"steps · seed {config.seed}",
            soft_wrap=True,
        )
        self.console.print(f"results go to {folder}", soft_wrap=True)
        self._progress.update(self._epochs, description="epoch", total=train.epochs)
        self._progress.update(self._steps, total=steps, visible=True)

    def on_step(self, epoch: int, step: int, loss: float) -> None:
        """Advance the bars."""
        self._progress.update(self._steps, completed=step, description=f"epoch {epoch}: loss {loss:.3f}")

    def on_epoch(self, record: EpochRecord) -> None:
        """Print the epoch's line."""
        self._progress.update(self._epochs, completed=record.epoch)
        train_loss = "" if record.train_loss is None else f"train loss {record.train_loss:.4f}  "
        ranks = f"  ranks {_span(record.ranks)}" if record.ranks else ""
        self.console.print(
            f"epoch {record.epoch:3d}  {train_loss}{self._shown.name} {self._shown.number(record.value)}  "
            f"{format_count(record.params)} parameters  {format_count(record.macs_per_example)} MACs{ranks}",
            soft_wrap=True,
        )

    def on_note(self, text: str) -> None:
        """Say what goes on besides training."""
        self._progress.update(self._epochs, description=text)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True)


def curve_table(curve: dict[str, Any]) -> Table:
    """Return the models per budget: cost as a part of the dense model's, latency, metric on the test set."""
    metric = curve["metric"]
    percent = metric == "accuracy"
    shown = Shown(MetricFacts(**(curve.get("facts") or {"name": metric, "percent": percent})))
    who = " and ".join(sorted({name.partition(",")[0] for name in curve["series"]}))
    table = Table(title=f"{who}: models by budget (test set)", box=box.SIMPLE, pad_edge=False)
    table.add_column("ranks", no_wrap=True)
    for heading in (
        "budget",
        "MACs",
        "% dense",
        "params",
        "% dense",
        "ms",
        "acc. %" if metric == "accuracy" else shown.heading,
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    dense = [("dense", {**curve["dense"], "budget": 1.0})] if curve["dense"] else []
    rows = [(name.partition(", ")[2].removesuffix(" ranks"), p) for name, ps in curve["series"].items() for p in ps]
    for name, point in dense + rows:
        table.add_row(
            name,
            f"{100 * point['budget']:.3g} %",
            format_count(point["macs"]),
            f"{100 * point['macs'] / curve['dense_macs']:.1f}",
            format_count(point["params"]),
            f"{100 * point['params'] / curve['dense_params']:.1f}",
            "–" if point["latency_ms"] is None else f"{point['latency_ms']:.3g}",
            shown.number(point["value"]),
        )
    return table


def _span(ranks: dict[str, int]) -> str:
    values = list(ranks.values())
    return "/".join(map(str, values)) if len(values) <= 8 else f"{min(values)}…{max(values)}, {sum(values)} in all"
