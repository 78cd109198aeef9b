"""Final values of a comparison as pictures: each is a function from ``results.json`` to a figure.

Tiers stand largest first.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fedmaestro.report.axis import Scale, followed, metric_scale
from fedmaestro.report.compare_figure import FAMILIES, NOTHING, failed, family_legend, ranked, titled_figure
from fedmaestro.report.compare_table import Values, family, is_whole, overall_stat, seeds_text, split, tier_stat
from fedmaestro.report.figure import BLACK, GREY, NOTE, key, marker, plot_style, short_name, tier_colors, top_legend
from fedmaestro.report.format import Shown
from fedmaestro.report.labels import place_labels
from fedmaestro.runs.records import Results
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OVERALL: tuple[Literal["mean", "worst"], ...] = ("mean", "worst")


@plot_style()
def tier_accuracy_figure(results: Results) -> "Figure":
    """Draw the final value per tier ± its standard deviation: a row per strategy, a dot per tier."""
    rows, tiers, show, lost = ranked(results), results.tiers, Shown(results.metric), failed(results)
    stats = [[tier_stat(results, row, tier, "final") for tier in tiers] for row in rows]
    pairs = [(stat, row in lost) for row, line in zip(rows, stats, strict=True) for stat in line]
    edges = [(edge, far) for stat, far in pairs for edge in _interval(stat)]
    scale = metric_scale(followed(edges, show.metric), show, f"Final {split(results)} {{metric}}")
    row_inches = max(0.3, 0.085 * len(tiers) + 0.06)  # the tiers of a row lie below each other
    figure = titled_figure(results, 9.6, row_inches * len(rows) + 1.6)
    axes = figure.subplots()
    scale.apply(axes, "x")
    for index, (row, line) in enumerate(zip(rows, stats, strict=True)):
        _draw_row(axes, index, line, scale)
        _draw_summary(axes, index, [overall_stat(results, row, over, "final") for over in _OVERALL])
    _name_rows(axes, rows, results)
    keys = [key(color, **marker(index), linestyle="") for index, color in enumerate(tier_colors(len(tiers)))]
    top_legend(figure, keys, list(map(short_name, tiers)), columns=min(len(tiers), 6))
    beyond = any(math.isfinite(stat.shown_mean) and not scale.holds(stat.shown_mean) for stat, _ in pairs)
    arrows = "; arrows: values beyond the axis" if beyond else ""
    figure.supxlabel(f"bars: ± standard deviation over seeds; black line: mean of tiers{arrows}", **NOTE)
    return figure


@plot_style()
def worst_mean_figure(results: Results) -> "Figure":
    """Draw the final value of the worst tier against the mean over tiers: a labelled point per strategy."""
    show, lost = Shown(results.metric), failed(results)
    every = [(row, _mean_and_worst(results, row)) for row in ranked(results)]
    points = [(row, at) for row, at in every if not any(map(math.isnan, at))]
    x, y = (
        metric_scale(
            followed([(at[axis], row in lost) for row, at in points], show.metric),
            show,
            f"Final {split(results)} {{metric}}, {over}",
            room=0.1,
        )
        for axis, over in enumerate(("mean of tiers", "worst tier"))
    )
    figure = titled_figure(results, 8.6, 6.2)
    axes = figure.subplots()
    x.apply(axes, "x")
    y.apply(axes, "y")
    axes.grid(visible=True)
    ends = max(x.low, y.low), min(x.high, y.high)
    axes.plot(ends, ends, color=GREY, linewidth=1.0, zorder=1)
    shown = [(row, at) for row, at in points if x.holds(at[0]) and y.holds(at[1])]
    for row, at in shown:
        color, kind = FAMILIES[family(row)]
        axes.plot(*at, kind, color=color, markersize=6.5, markeredgecolor="white")
    family_legend(figure, [family(row) for row, _ in shown], background=False)
    far = [f"{short_name(row.name)} ({', '.join(map(show.words, at))})" for row, at in points if (row, at) not in shown]
    beyond = f"; beyond the axes (mean, worst): {', '.join(far)}" if far else ""
    note = f"grey line: all tiers equally good{beyond}" if points else NOTHING
    figure.supxlabel(textwrap.fill(note, 100, break_on_hyphens=False), **NOTE)
    _label_points(figure, axes, [short_name(row.name) for row, _ in shown], [at for _, at in shown])
    return figure


def _interval(stat: Values) -> tuple[float, float]:
    """Return mean ± standard deviation as shown."""
    return stat.shown_mean - stat.shown_std, stat.shown_mean + stat.shown_std


def _draw_row(axes: "Axes", y: int, tiers: Sequence[Values], scale: Scale) -> None:
    """Draw a dot per tier; one that lies beyond the axis is an arrow at its edge with the value in words."""
    colors, step = tier_colors(len(tiers)), 0.8 / len(tiers)
    for index, stat in enumerate(tiers):
        value, place, color = stat.shown_mean, y + (index - (len(tiers) - 1) / 2) * step, colors[index]
        if scale.holds(value):
            axes.plot(_interval(stat), [place] * 2, color=color, linewidth=1.4)
            axes.plot(value, place, color=color, **marker(index))
        elif math.isfinite(value):
            _draw_arrow(axes, scale.clip(value), place, color, stat.show.words(value), left=value < scale.low)


def _draw_arrow(axes: "Axes", end: float, place: float, color: str, words: str, *, left: bool) -> None:
    kind, side, shift = ("<", "left", 5) if left else (">", "right", -5)
    axes.plot(end, place, kind, color=color, markersize=5.2, markeredgecolor="white", clip_on=False)
    text: dict[str, Any] = {"fontsize": 6.5, "color": color, "va": "center_baseline", "ha": side}
    axes.annotate(words, (end, place), (shift, 0), textcoords="offset points", **text)


def _draw_summary(axes: "Axes", y: int, overall: Sequence[Values]) -> None:
    """Draw the mean of the tiers as a line, and it and the worst as numbers at the right; shade every other row."""
    if y % 2:
        axes.axhspan(y - 0.5, y + 0.5, color="#f3f4f6", linewidth=0, zorder=0)
    axes.plot([overall[0].shown_mean] * 2, [y - 0.42, y + 0.42], color=BLACK, linewidth=1.3, zorder=1.5)
    for x, stat in zip((1.06, 1.14), overall, strict=True):
        axes.text(x, y, stat.mean_text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)


def _name_rows(axes: "Axes", rows: Sequence[Row], results: Results) -> None:
    notes = ["" if is_whole(row, results) else f"\n{seeds_text(row, results)}" for row in rows]
    axes.set_yticks(range(len(rows)), [short_name(row.name) + note for row, note in zip(rows, notes, strict=True)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    for x, heading in zip((1.06, 1.14), _OVERALL, strict=True):
        axes.text(x, 1.0, heading, transform=axes.transAxes, ha="right", va="bottom", **NOTE)


def _mean_and_worst(results: Results, row: Row) -> tuple[float, float]:
    mean, worst = (overall_stat(results, row, over, "final").shown_mean for over in _OVERALL)
    return mean, worst


def _label_points(figure: "Figure", axes: "Axes", names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, with a line to it."""
    texts = [axes.text(*point, name, fontsize=9, in_layout=False) for name, point in zip(names, points, strict=True)]
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
