"""Final accuracies of a comparison as pictures: each is a function from ``results.json`` to a figure.

Draw and save them inside `figure.plot_style`; tiers stand largest first.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmaestro.report.compare_figure import (
    FAMILIES,
    GREY,
    NOTE,
    NOTHING,
    Scale,
    accuracy_scale,
    apply_scale,
    failed,
    family_legend,
    followed,
    name_legend,
    ranked,
    titled_figure,
)
from fedmaestro.report.compare_table import Fractions, family, is_whole, overall_stat, seeds_text, tier_stat
from fedmaestro.report.figure import MARKERS, place_labels, quiet_glyphs, short_name, tier_colors
from fedmaestro.runs.records import Results
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tier_accuracy_figure(results: Results) -> "Figure":
    """Draw the final accuracy (%) per tier ± its standard deviation: a row per strategy, a dot per tier."""
    rows, tiers = ranked(results), list(results.tiers)
    stats = [[tier_stat(row, tier, "final") for tier in tiers] for row in rows]
    lost = failed(results)
    edges = [
        (edge, row in lost) for row, line in zip(rows, stats, strict=True) for stat in line for edge in _interval(stat)
    ]
    scale = accuracy_scale(followed(edges), "Final test accuracy")
    row_inches = max(0.3, 0.085 * len(tiers) + 0.06)  # the tiers of a row lie below each other
    figure = titled_figure(results, 9.6, row_inches * len(rows) + 1.6)
    axes = figure.subplots()
    apply_scale(axes, "x", scale)
    for index, (row, line) in enumerate(zip(rows, stats, strict=True)):
        _draw_row(axes, index, line, scale)
        _draw_summary(axes, index, overall_stat(row, "mean", "final"), overall_stat(row, "worst", "final"))
    _name_rows(axes, rows, results)
    _tier_legend(figure, tiers)
    arrows = "; arrows: below the axis" if lost else ""
    figure.supxlabel(f"bars: ± standard deviation over seeds; black line: mean of tiers{arrows}", **NOTE)
    return figure


def worst_mean_figure(results: Results) -> "Figure":
    """Draw the final accuracy (%) of the worst tier against the mean over tiers: a labelled point per strategy."""
    rows = [row for row in ranked(results) if not any(map(math.isnan, _mean_and_worst(row)))]
    points, lost = [_mean_and_worst(row) for row in rows], [row in failed(results) for row in rows]
    means, worsts = (followed([(point[axis], far) for point, far in zip(points, lost, strict=True)]) for axis in (0, 1))
    x = accuracy_scale(means, "Final test accuracy, mean of tiers", room=0.1)
    y = accuracy_scale(worsts, "Final test accuracy, worst tier", room=0.1)
    figure = titled_figure(results, 8.6, 6.2)
    axes = figure.subplots()
    apply_scale(axes, "x", x)
    apply_scale(axes, "y", y)
    axes.grid(visible=True)
    ends = max(x.low, y.low), min(x.high, y.high)
    axes.plot(ends, ends, color=GREY, linewidth=1.0, zorder=1)
    shown = [(row, at) for row, at in zip(rows, points, strict=True) if at[0] >= x.low and at[1] >= y.low]
    for row, at in shown:
        color, marker = FAMILIES[family(row)]
        axes.plot(*at, marker, color=color, markersize=6.5, markeredgecolor="white")
    family_legend(figure, [family(row) for row, _ in shown], background=False)
    beyond = [
        f"{short_name(row.name)} ({at[0]:.1f}, {at[1]:.1f})"
        for row, at in zip(rows, points, strict=True)
        if (row, at) not in shown
    ]
    note = f"; beyond the axes (mean, worst): {', '.join(beyond)}" if beyond else ""
    note = f"grey line: all tiers equally good{note}" if rows else NOTHING
    figure.supxlabel(textwrap.fill(note, 100, break_on_hyphens=False), **NOTE)
    _label_points(figure, axes, [short_name(row.name) for row, _ in shown], [at for _, at in shown])
    return figure


def _interval(stat: Fractions) -> tuple[float, float]:
    """Return mean ± standard deviation in percent."""
    half = 0.0 if math.isnan(stat.std) else 100 * stat.std
    return 100 * stat.mean - half, 100 * stat.mean + half


def _draw_row(axes: "Axes", y: int, tiers: Sequence[Fractions], scale: Scale) -> None:
    """Draw a dot per tier; one that lies beyond the axis is an arrow at its edge with the value in words."""
    colors, markers, step = tier_colors(len(tiers)), list(MARKERS), 0.8 / len(tiers)
    for index, stat in enumerate(tiers):
        value, place, marker = 100 * stat.mean, y + (index - (len(tiers) - 1) / 2) * step, markers[index % len(markers)]
        dot: dict[str, Any] = {"color": colors[index], "markersize": 0.95 * MARKERS[marker], "markeredgecolor": "white"}
        if value < scale.low:
            axes.plot(scale.low, place, "<", **dot, markeredgewidth=0.5, clip_on=False)
            text: dict[str, Any] = {"fontsize": 6.5, "color": colors[index], "va": "center_baseline"}
            axes.annotate(f"{value:.1f}", (scale.low, place), (5, 0), textcoords="offset points", **text)
        else:
            axes.plot(_interval(stat), [place] * 2, color=colors[index], linewidth=1.4)
            axes.plot(value, place, marker, **dot, markeredgewidth=0.5)


def _draw_summary(axes: "Axes", y: int, mean: Fractions, worst: Fractions) -> None:
    """Draw the mean of the tiers as a line, and it and the worst as numbers at the right; shade every other row."""
    if y % 2:
        axes.axhspan(y - 0.5, y + 0.5, color="#f3f4f6", linewidth=0, zorder=0)
    axes.plot([100 * mean.mean] * 2, [y - 0.42, y + 0.42], color="#222222", linewidth=1.3, zorder=1.5)
    for x, stat in ((1.06, mean), (1.14, worst)):
        axes.text(x, y, stat.mean_text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)


def _name_rows(axes: "Axes", rows: Sequence[Row], results: Results) -> None:
    notes = ["" if is_whole(row, results) else f"\n{seeds_text(row, results)}" for row in rows]
    names = [short_name(row.name) + note for row, note in zip(rows, notes, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    for x, heading in ((1.06, "mean"), (1.14, "worst")):
        axes.text(x, 1.0, heading, transform=axes.transAxes, ha="right", va="bottom", **NOTE)


def _tier_legend(figure: "Figure", tiers: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    markers = list(MARKERS)
    handles = [
        Line2D([], [], color=color, marker=markers[index % len(markers)], linestyle="", markersize=7)
        for index, color in enumerate(tier_colors(len(tiers)))
    ]
    # A space before each name: matplotlib drops labels that start with an underscore.
    labels = [f" {short_name(tier)}" for tier in tiers]
    name_legend(figure, handles, labels, columns=min(len(tiers), 6))


def _mean_and_worst(row: Row) -> tuple[float, float]:
    return 100 * overall_stat(row, "mean", "final").mean, 100 * overall_stat(row, "worst", "final").mean


def _label_points(figure: "Figure", axes: "Axes", names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, with a line to it."""
    texts = [axes.text(*point, name, fontsize=9, in_layout=False) for name, point in zip(names, points, strict=True)]
    with quiet_glyphs():
        figure.draw_without_rendering()  # only now the axes have their place
    sizes = [(extent.width, extent.height) for extent in (text.get_window_extent() for text in texts)]
    at = [(float(x), float(y)) for x, y in map(axes.transData.transform, points)]
    corners = place_labels(at, sizes, axes.bbox.extents)
    pixel = 72 / figure.dpi  # in points, which stay the same when the picture is saved at another resolution
    for text, point, (x, y), (left, bottom), (width, height) in zip(texts, points, at, corners, sizes, strict=True):
        text.remove()
        nearest = (min(max((x - left) / width, 0.0), 1.0), min(max((y - bottom) / height, 0.0), 1.0))
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2, "relpos": nearest}
        place = ((left - x) * pixel, (bottom - y) * pixel)
        label = axes.annotate(text.get_text(), point, place, textcoords="offset points", fontsize=9, arrowprops=line)
        label.set_in_layout(False)
