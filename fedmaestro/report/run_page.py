"""One self-contained HTML page about one run or several."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmaestro.report.accuracy_plot import tier_accuracy_figure
from fedmaestro.report.facts import RunFacts
from fedmaestro.report.figure import save_figure, svg_text
from fedmaestro.report.format import format_bytes, format_count
from fedmaestro.report.page import render
from fedmaestro.report.rank_plot import rank_figure
from fedmaestro.runs.folder import write_atomically
from fedmaestro.runs.reader import read_run

# Heading, key in the summary of a tier, formatter.
_COSTS = (
    ("Parameters", "params", format_count),
    ("MACs per example", "macs_per_example", format_count),
    ("Training memory", "train_memory_bytes", format_bytes),
    ("Download per round", "download_bytes", format_bytes),
)


def html_report(run_dirs: Sequence[Path | str]) -> str:
    """Return the page about these runs: a comparison when there are several, then a section for each.

    Raises:
        UserError: A folder is no run folder, or one of its files is corrupt.

    """
    assert run_dirs, "a report needs at least one run"
    paths = [Path(run_dir) for run_dir in run_dirs]
    names = enumerate(zip(paths, _names(paths), strict=True), 1)
    runs = [RunFacts(read_run(path), name, f"run{number}") for number, (path, name) in names]
    return render(
        "runs",
        title=runs[0].title if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        runs=runs,
        **_comparison(runs),
        accuracy_svg=lambda run: svg_text(tier_accuracy_figure(run.record.rounds, split=run.split)),
        rank_svg=lambda run: svg_text(rank_figure(run.rank_history, full=run.full_ranks)),
        partition=_partition,
        costs=_COSTS,
    )


def write_report(run_dirs: Sequence[Path | str], out_path: Path | str) -> Path:
    """Write the page about these runs, making the folder; return its path."""
    page, path = html_report(run_dirs), Path(out_path)
    if path.exists() and not path.is_file():  # a terminal or a pipe is written to, not replaced
        path.write_text(page, encoding="utf-8", newline="\n")
    else:
        write_atomically(path, page)
    return path


def write_run_report(run_dir: Path | str) -> tuple[Path, Path, Path]:
    """Write ``plots/tier_accuracy.png``, ``.svg`` and ``report.html`` in a run folder; return these paths.

    Where ranks could change, ``plots/tier_ranks.png`` and ``.svg`` too.
    """
    run = RunFacts(read_run(run_dir))
    path = run.record.path
    png, svg = save_figure(
        tier_accuracy_figure(run.record.rounds, run.title, run.split), path / "plots" / "tier_accuracy"
    )
    if history := run.rank_history:
        save_figure(rank_figure(history, full=run.full_ranks, title=run.title), path / "plots" / "tier_ranks")
    return png, svg, write_report([path], path / "report.html")


def _partition(run: RunFacts) -> str:
    """Return the picture of the partition in base64: an image, not elements, as its source is not this program."""
    path = run.record.path / "plots" / "partition.svg"
    return base64.b64encode(path.read_bytes()).decode("ascii") if path.is_file() else ""


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of one depth, that tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    depths = range(1, max(map(len, parts)) + 1)
    depth = next((depth for depth in depths if len({path[-depth:] for path in parts}) == len(set(parts))), depths[-1])
    return ["/".join(path[-depth:]) for path in parts]


def _comparison(runs: Sequence[RunFacts]) -> dict[str, Sequence[Any]]:
    """Return what compares runs: metrics, tiers, mean, worst and each tier's final value, and the best as printed."""
    tiers = list(dict.fromkeys(tier.name for run in runs for tier in run.tiers))
    finals = [{tier.name: tier.final for tier in run.tiers} for run in runs]
    pairs = zip(runs, finals, strict=True)
    scores = [[*run.mean_and_worst, *(final.get(tier, math.nan) for tier in tiers)] for run, final in pairs]
    metrics, show = list(dict.fromkeys(run.show.name for run in runs)), runs[0].show
    known = [[score for score in column if score == score] for column in zip(*scores, strict=True)]
    # Columns of different metrics have no best one, and runs that print the same share the mark.
    best = [show.text(show.metric.best(column)) if column and len(metrics) == 1 else "" for column in known]
    return {"metrics": metrics, "tier_names": tiers, "scores": scores, "best": best}
