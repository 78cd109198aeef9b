"""Final accuracies of a comparison as pictures: each is a function from ``results.json`` to a figure.

Draw and save them inside `figure.plot_style`; tiers stand largest first.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fedmaestro.report.compare_figure import (
    FAMILIES,
    GREY,
    NOTE,
    NOTHING,
    Scale,
    apply_scale,
    bad_end,
    failed,
    family_legend,
    followed,
    is_beyond,
    metric_scale,
    name_legend,
    ranked,
    titled_figure,
)
from fedmaestro.report.compare_table import Values, family, is_whole, overall_stat, seeds_text, tier_stat
from fedmaestro.report.figure import MARKERS, place_labels, quiet_glyphs, short_name, tier_colors
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import Results
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tier_accuracy_figure(results: Results) -> "Figure":
    """Draw the final value per tier ± its standard deviation: a row per strategy, a dot per tier."""
    rows, tiers, metric = ranked(results), list(results.tiers), results.metric
    stats = [[tier_stat(results, row, tier, "final") for tier in tiers] for row in rows]
    lost = failed(results)
    edges = [
        (edge, row in lost) for row, line in zip(rows, stats, strict=True) for stat in line for edge in _interval(stat)
    ]
    scale = metric_scale(followed(edges, metric), Shown(metric), "Final test {metric}")
    row_inches = max(0.3, 0.085 * len(tiers) + 0.06)  # the tiers of a row lie below each other
    figure = titled_figure(results, 9.6, row_inches * len(rows) + 1.6)
    axes = figure.subplots()
    apply_scale(axes, "x", scale)
    for index, (row, line) in enumerate(zip(rows, stats, strict=True)):
        _draw_row(axes, index, line, scale)
        summaries = (overall_stat(results, row, over, "final") for over in _OVERALL)
        _draw_summary(axes, index, *summaries)
    _name_rows(axes, rows, results)
    _tier_legend(figure, tiers)
    arrows = f"; arrows: {'below' if metric.higher_is_better else 'beyond'} the axis" if lost else ""
    figure.supxlabel(f"bars: ± standard deviation over seeds; black line: mean of tiers{arrows}", **NOTE)
    return figure


def worst_mean_figure(results: Results) -> "Figure":
    """Draw the final value of the worst tier against the mean over tiers: a labelled point per strategy."""
    metric, show = results.metric, Shown(results.metric)
    rows = [row for row in ranked(results) if not any(map(math.isnan, _mean_and_worst(results, row)))]
    points, lost = [_mean_and_worst(results, row) for row in rows], [row in failed(results) for row in rows]
    means, worsts = (
        followed([(point[axis], far) for point, far in zip(points, lost, strict=True)], metric) for axis in (0, 1)
    )
    x = metric_scale(means, show, "Final test {metric}, mean of tiers", room=0.1)
    y = metric_scale(worsts, show, "Final test {metric}, worst tier", room=0.1)
    figure = titled_figure(results, 8.6, 6.2)
    axes = figure.subplots()
    apply_scale(axes, "x", x)
    apply_scale(axes, "y", y)
    axes.grid(visible=True)
    ends = max(x.low, y.low), min(x.high, y.high)
    axes.plot(ends, ends, color=GREY, linewidth=1.0, zorder=1)
    shown = [
        (row, at)
        for row, at in zip(rows, points, strict=True)
        if not is_beyond(at[0], x, metric) and not is_beyond(at[1], y, metric)
    ]
    for row, at in shown:
        color, marker = FAMILIES[family(row)]
        axes.plot(*at, marker, color=color, markersize=6.5, markeredgecolor="white")
    family_legend(figure, [family(row) for row, _ in shown], background=False)
    beyond = [
        f"{short_name(row.name)} ({_in_words(show, at[0])}, {_in_words(show, at[1])})"
        for row, at in zip(rows, points, strict=True)
        if (row, at) not in shown
    ]
    note = f"; beyond the axes (mean, worst): {', '.join(beyond)}" if beyond else ""
    note = f"grey line: all tiers equally good{note}" if rows else NOTHING
    figure.supxlabel(textwrap.fill(note, 100, break_on_hyphens=False), **NOTE)
    _label_points(figure, axes, [short_name(row.name) for row, _ in shown], [at for _, at in shown])
    return figure


_OVERALL: tuple[Literal["mean", "worst"], ...] = ("mean", "worst")


def _in_words(show: Shown, value: float) -> str:
    """Return a shown value with few digits."""
    return f"{value:.1f}" if show.metric.percent else f"{value:.3g}"


def _interval(stat: Values) -> tuple[float, float]:
    """Return mean ± standard deviation as shown."""
    return stat.shown_mean - stat.shown_std, stat.shown_mean + stat.shown_std


def _draw_row(axes: "Axes", y: int, tiers: Sequence[Values], scale: Scale) -> None:
    """Draw a dot per tier; one that lies beyond the axis is an arrow at its edge with the value in words."""
    colors, markers, step = tier_colors(len(tiers)), list(MARKERS), 0.8 / len(tiers)
    for index, stat in enumerate(tiers):
        value, place, marker = stat.shown_mean, y + (index - (len(tiers) - 1) / 2) * step, markers[index % len(markers)]
        dot: dict[str, Any] = {"color": colors[index], "markersize": 0.95 * MARKERS[marker], "markeredgecolor": "white"}
        if is_beyond(value, scale, stat.show.metric):
            left, end = stat.show.metric.higher_is_better, bad_end(scale, stat.show.metric)
            axes.plot(end, place, "<" if left else ">", **dot, markeredgewidth=0.5, clip_on=False)
            text: dict[str, Any] = {"fontsize": 6.5, "color": colors[index], "va": "center_baseline"}
            beside: dict[str, Any] = {"xytext": (5 if left else -5, 0), "ha": "left" if left else "right"}
            axes.annotate(_in_words(stat.show, value), (end, place), textcoords="offset points", **beside, **text)
        else:
            axes.plot(_interval(stat), [place] * 2, color=colors[index], linewidth=1.4)
            axes.plot(value, place, marker, **dot, markeredgewidth=0.5)


def _draw_summary(axes: "Axes", y: int, mean: Values, worst: Values) -> None:
    """Draw the mean of the tiers as a line, and it and the worst as numbers at the right; shade every other row."""
    if y % 2:
        axes.axhspan(y - 0.5, y + 0.5, color="#f3f4f6", linewidth=0, zorder=0)
    axes.plot([mean.shown_mean] * 2, [y - 0.42, y + 0.42], color="#222222", linewidth=1.3, zorder=1.5)
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


def _mean_and_worst(results: Results, row: Row) -> tuple[float, float]:
    mean, worst = (overall_stat(results, row, over, "final").shown_mean for over in _OVERALL)
    return mean, worst


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
