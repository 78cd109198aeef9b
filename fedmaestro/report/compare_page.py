"""The files of a comparison: ``table.md``, ``table.csv``, ``plots/`` and one self-contained page, ``report.html``."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedmaestro.report import compare_table as table
from fedmaestro.report.compare_curves import factor_bias_figure, metric_figure, tail_energy_figure
from fedmaestro.report.compare_figure import ranked
from fedmaestro.report.compare_plots import tier_accuracy_figure, worst_mean_figure
from fedmaestro.report.difference_plot import difference_figure, has_differences
from fedmaestro.report.figure import save_figure
from fedmaestro.report.format import MISSING, Shown
from fedmaestro.report.page import render
from fedmaestro.runs.folder import write_atomically
from fedmaestro.runs.records import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS: Mapping[str, Callable[[Results], "Figure"]] = {
    "tier_accuracy": tier_accuracy_figure,
    "worst_mean": worst_mean_figure,
    "accuracy_rounds": partial(metric_figure, over="round"),
    "accuracy_bytes": partial(metric_figure, over="bytes"),
    "accuracy_time": partial(metric_figure, over="virtual_seconds"),
    "tail_energy": tail_energy_figure,
    "factor_bias": factor_bias_figure,
}
"""The pictures by the name of their files in ``plots/``; ``templates/comparison.html.md`` says what to look for."""


def write_comparison(results: Results, folder: Path) -> dict[str, Path]:
    """Write the tables, the plots and the page of a comparison; return the paths by name relative to ``folder``.

    Args:
        results: Strategies may lack seeds, series may hold nulls.
        folder: Made if it does not exist; files of the same names are replaced.

    """
    assert results.strategies, "a comparison needs at least one strategy"
    plots = {**PLOTS, **({"differences": difference_figure} if has_differences(results) else {})}
    written = {name: save_figure(draw(results), folder / "plots" / name) for name, draw in plots.items()}
    texts = {
        "table.md": table.table_markdown(results),
        "table.csv": table.table_csv(results),
        "report.html": comparison_page(results, {name: svg.read_text("utf-8") for name, (_, svg) in written.items()}),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    pictures = {f"plots/{path.name}": path for paths in written.values() for path in paths}
    return {**{name: folder / name for name in texts}, **pictures}


def comparison_page(results: Results, svgs: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        results: What the page is about.
        svgs: The plots by name, as SVG documents that matplotlib wrote.

    """
    return render(
        "comparison",
        title=f"Comparison: {results.experiment}",
        results=results,
        rows=results.strategies,
        columns=table.score_columns(results),
        further=table.further_tables(results),
        table=table,
        lost=[f"Lost: {tier}" for tier in results.tiers],
        metric=Shown(results.metric).name,
        svgs=svgs,
        best=_best(results),
    )


def _best(results: Results) -> str:
    """Return which strategy ends best, for those who cannot see the plots."""
    best = ranked(results)[0]
    text = table.overall_stat(results, best, "mean", "final").text
    return "" if text == MISSING else f" Best final mean of tiers: {best.name}, {text}{Shown(results.metric).unit}."
