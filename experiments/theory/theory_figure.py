"""One figure, three panels: what the columns of a LoD layer end up as."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from linear_maps import MAX_PREFIX_ERROR, SPECTRUM, Recovery
from pca_recovery import POINTS, THRESHOLD, PcaRecovery

from fedmaestro.report.figure import MUTED, new_figure, plot_style, save_figure, tier_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEARNED, _, _LIMIT, _TRUE = tier_colors(4)
_SPREAD = 0.5  # width over which the seeds of one column are laid out
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plot_theory(
    svd: Sequence[Recovery], pca: Sequence[PcaRecovery], order: Sequence[Recovery], path_without_suffix: Path | str
) -> tuple[Path, Path]:
    """Draw setups A, B and C from left to right; return the paths of the PNG and the SVG."""
    with plot_style():
        figure = new_figure(12.0, 4.2)
        a, b, c = figure.subplots(1, 3, gridspec_kw={"wspace": 0.08})
        _title(a, "A", "Inputs weigh all directions alike:", "singular values, largest first")
        _plot_recovery(a, svd, "singular values of the maps")
        _title(b, "B", f"{POINTS}-dimensional data, group lasso:", f"{POINTS} columns are left")
        _plot_importances(b, pca)
        _title(c, "C", "Inputs stress small singular values:", "the order turns around")
        for i, value in enumerate(SPECTRUM, start=1):
            _bar(c, i, value, "#b0b0b0", "singular values by size (A)" if i == 1 else "")
        _plot_recovery(c, order, "singular values by energy")
        for axes, place in ((a, "upper right"), (c, "upper left")):
            axes.legend(loc=place, frameon=False, borderaxespad=0.2)
        for axes in (a, b, c):
            axes.set_xlabel("column")
            axes.grid(axis="y")
        return save_figure(figure, path_without_suffix)


def _title(axes: "Axes", letter: str, first: str, second: str) -> None:
    axes.set_title(f"{letter}   {first}\n{second}", loc="left")


def _plot_recovery(axes: "Axes", results: Sequence[Recovery], name_of_truth: str) -> None:
    columns = range(1, len(results[0].strengths) + 1)
    expected = dict(enumerate(results[0].expected, start=1))
    for column in columns:
        _bar(axes, column, expected.get(column, 0.0), _TRUE, name_of_truth if column == 1 else "")
    for column in columns:
        values = [result.strengths[column - 1] for result in results]
        _dots(axes, column, values, f"learned, {len(results)} seeds" if column == 1 else "")
    axes.set_xticks(columns)
    axes.set_ylim(-0.5, 14)
    axes.set_ylabel("strength of the column")
    worst = max(result.worst_prefix_error for result in results)
    note = f"squared error of a prefix:\nat most {worst:.1e}\n(target {MAX_PREFIX_ERROR:.0e})"
    axes.text(0.99, 0.4, note, transform=axes.transAxes, ha="right", color=MUTED, linespacing=1.3)


def _plot_importances(axes: "Axes", results: Sequence[PcaRecovery]) -> None:
    columns = range(1, len(results[0].importances) + 1)
    for column in columns:
        _dots(axes, column, [result.importances[column - 1] for result in results])
    axes.axhline(THRESHOLD, color=_LIMIT, linewidth=1.5, linestyle="--")
    axes.text(columns[-1] + 0.4, THRESHOLD * 1.25, "threshold", color=_LIMIT, ha="right", va="bottom")
    axes.set_yscale("log")
    axes.set_ylim(2e-6, 20)
    exponents = range(-5, 2)
    axes.minorticks_off()
    axes.set_yticks([10.0**e for e in exponents], [f"10{str(e).translate(_SUPERSCRIPTS)}" for e in exponents])
    axes.set_xticks(columns)
    axes.set_ylabel("importance of the column and all after it")
    kept = sum(result.kept == POINTS for result in results)
    note = f"rank {POINTS} in {kept} of {len(results)} seeds"
    axes.text(0.99, 0.86, note, transform=axes.transAxes, ha="right", color=MUTED)


def _bar(axes: "Axes", column: int, value: float, color: str, label: str) -> None:
    axes.plot([column - 0.4, column + 0.4], [value, value], color=color, linewidth=3, label=label)


def _dots(axes: "Axes", column: int, values: Sequence[float], label: str = "") -> None:
    """Draw the seeds side by side, around their column."""
    step = _SPREAD / max(len(values) - 1, 1)
    x = [column + step * (i - (len(values) - 1) / 2) for i in range(len(values))]
    axes.plot(x, values, "o", color=_LEARNED, markersize=3.5, markeredgewidth=0, label=label)
