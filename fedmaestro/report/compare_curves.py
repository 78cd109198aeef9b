"""Curves of a comparison over rounds, bytes and virtual time, each a function from ``results.json`` to a figure.

Draw and save them inside `figure.plot_style`. Up to four strategies share a panel, their names beside their lines. Of
more, each has a panel in which the others are grey: nobody tells twenty colours apart.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmaestro.report.compare_figure import (
    FAMILIES,
    GREY,
    NOTE,
    NOTHING,
    Scale,
    apply_scale,
    even_ticks,
    failed,
    family_legend,
    followed,
    is_beyond,
    metric_scale,
    ranked,
    titled_figure,
)
from fedmaestro.report.compare_table import family, is_whole, seeds_text
from fedmaestro.report.cost_plot import log_ticks
from fedmaestro.report.curves import as_number, time_unit
from fedmaestro.report.figure import SERIES_COLORS, short_name
from fedmaestro.report.format import Shown
from fedmaestro.report.rank_plot import spread
from fedmaestro.runs.records import Results, Series
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOGETHER = 4  # so many lines share a panel
_GREY_POINTS = 40  # per line in the background: a page holds panels × lines of them
_SETTLED = 1 / 3  # the axis of accuracy over a run is chosen from what comes after this part of it
_WIDE = 4.0  # costs that differ by more than this factor are drawn on a log scale
_FLOOR = 1e-4  # percent: smaller values are drawn at the end of a log axis
_BYTE_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))

Measure = Callable[[Series], list[float]]
"""From the series of one seed to a value per evaluated round; nan where there is none."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one strategy did over a run: the mean over its seeds, and ± one standard deviation."""

    name: str
    family: str
    failed: bool
    final: str
    rounds: Sequence[int]
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def accuracy_round_figure(results: Results) -> "Figure":
    """Draw the main metric, mean over tiers, over communication rounds."""
    lines = _metric_lines(results, "round")
    return _curves(results, lines, _rounds_x(lines), _metric_y(results, lines))


def accuracy_bytes_figure(results: Results) -> "Figure":
    """Draw the main metric, mean over tiers, over the bytes that all devices sent and received."""
    lines = _metric_lines(results, "bytes")
    most = max(_known(lines, "x"), default=0.0)
    unit, size = next(((unit, size) for unit, size in _BYTE_UNITS if most >= 2 * size), ("B", 1.0))
    lines = [_in_units(line, size) for line in lines]
    return _curves(
        results, lines, _cost_x(lines, "Traffic of all devices, down and up", unit), _metric_y(results, lines)
    )


def accuracy_time_figure(results: Results) -> "Figure":
    """Draw the main metric, mean over tiers, over virtual time."""
    lines = _metric_lines(results, "virtual_seconds")
    unit, size = time_unit(max(_known(lines, "x"), default=0.0))
    lines = [_in_units(line, size) for line in lines]
    return _curves(results, lines, _cost_x(lines, "Virtual time", unit), _metric_y(results, lines))


def tail_energy_figure(results: Results) -> "Figure":
    """Draw the share (%) of the LoD layers' energy beyond the smallest tier's ranks, over rounds, on a log axis."""
    lines = _layer_lines(results, "tail_energy", floor=_FLOOR)
    values = _known(lines, "low", "high")
    note = f"what is below {_FLOOR:g} % is drawn there" if min(values, default=1.0) <= _FLOOR else ""
    y = replace(_log_scale(values, "Tail energy", "% of Σσ²", lines), note=note)
    return _curves(results, lines, _rounds_x(lines), y)


def factor_bias_figure(results: Results) -> "Figure":
    """Draw the part (%) of a round's update that averaging factors instead of products misses, over rounds."""
    lines = _layer_lines(results, "factor_bias")
    y = _zero_scale(_known(lines, "high"), "Factor bias (% of the round's update)", lines)
    return _curves(results, lines, _rounds_x(lines), y)


def _zero_scale(values: Sequence[float], label: str, lines: Sequence[Line]) -> Scale:
    """Return an axis from zero to the largest value."""
    high = max(values, default=0.0) or 1.0
    return Scale(label=label, low=-0.03 * high, high=1.03 * high, ticks=even_ticks(0.0, high, _tick_count(lines)))


def _log_scale(values: Sequence[float], label: str, unit: str, lines: Sequence[Line]) -> Scale:
    low, high = min(values, default=1.0), max(values, default=10.0)
    room = max((high / low) ** 0.04, 1.05)
    low, high = low / room, high * room
    ticks = log_ticks(low, high, _tick_count(lines))
    return Scale(label=f"{label} ({unit}, log scale)", low=low, high=high, ticks=ticks, log=True)


def _rounds_x(lines: Sequence[Line]) -> Scale:
    return _zero_scale(_known(lines, "x"), "Communication round", lines)


def _cost_x(lines: Sequence[Line], label: str, unit: str) -> Scale:
    """Return the axis of what was spent: logarithmic where whole runs differ by more than a factor of four."""
    ends = [max(_known([line], "x")) for line in lines]
    if ends and max(ends) > _WIDE * min(ends) > 0:
        return _log_scale([x for x in _known(lines, "x") if x > 0], label, unit, lines)
    return _zero_scale(ends, f"{label} ({unit})", lines)


def _metric_y(results: Results, lines: Sequence[Line]) -> Scale:
    """Return the metric's axis: all that follows the first third of the runs is inside, the start may be cut off."""
    metric = results.metric
    last = max((line.rounds[-1] for line in lines), default=0)
    settled = [
        (value, line.failed)
        for line in lines
        for number, *values in zip(line.rounds, line.mean, line.low, line.high, strict=True)
        if number >= min(_SETTLED * last, line.rounds[-1])
        for value in values
    ]
    show = Shown(metric)
    scale = metric_scale(followed(settled, metric), show, "Mean {metric} of tiers", count=_tick_count(lines))
    worst = metric.worst(_known([line for line in lines if not line.failed], "mean"))
    if worst is None or not is_beyond(worst, scale, metric):
        return scale
    start = f"{worst:.0f}" if metric.percent else f"{worst:.3g}"
    return replace(scale, note=f"the start, from {start}{show.unit}, is cut off")


def _tick_count(lines: Sequence[Line]) -> int:
    return 7 if len(lines) <= _TOGETHER else 5


def _metric_lines(results: Results, x_key: str) -> list[Line]:
    show = Shown(results.metric)

    def mean_of_tiers(series: Series) -> list[float]:
        tiers = [series.values[tier] for tier in results.tiers]
        return [show.factor * statistics.fmean(map(as_number, scores)) for scores in zip(*tiers, strict=True)]

    lines = [_line(row, results, x_key, mean_of_tiers, show=show) for row in ranked(results)]
    return [line for line in lines if line is not None]


def _layer_lines(results: Results, key: str, floor: float | None = None) -> list[Line]:
    """Return a line per strategy with LoD layers: the others hold nulls.

    With a floor (percent) means and deviations are those of the logarithms, and nothing is below it.
    """

    def percent(series: Series) -> list[float]:
        return [100 * as_number(value) for value in getattr(series, key)]

    lines = [_line(row, results, "round", percent, floor) for row in ranked(results)]
    return [line for line in lines if line is not None]


def _line(
    row: Row, results: Results, x_key: str, measure: Measure, floor: float | None = None, show: Shown | None = None
) -> Line | None:
    """Return the line over the rounds that any seed has evaluated; None where no point can be drawn."""
    points: dict[int, list[tuple[float, float]]] = {}
    for series in row.series:
        for number, x, y in zip(series.round, getattr(series, x_key), measure(series), strict=True):
            points.setdefault(number, []).append((as_number(x), y))
    rounds = sorted(points)
    x = [_band([x for x, _ in points[number]])[1] for number in rounds]
    bands = [_band([y for _, y in points[number]], floor) for number in rounds]
    drawn = [band for at, band in zip(x, bands, strict=True) if math.isfinite(at) and math.isfinite(band[1])]
    if not drawn:
        return None
    low, mean, high = zip(*bands, strict=True)
    note = "" if is_whole(row, results) else f" ({seeds_text(row, results)})"
    return Line(
        name=short_name(row.name),
        family=family(row),
        failed=row in failed(results),
        final=f"{_ending(*drawn[-1], floor, show)}{note}",
        rounds=rounds,
        x=x,
        mean=mean,
        low=low,
        high=high,
    )


def _ending(_: float, mean: float, high: float, floor: float | None, show: Shown | None) -> str:
    """Return the last value in words, with its standard deviation where that is no logarithm's."""
    if show is not None and not show.metric.percent:
        return f"{mean:.4g} ± {high - mean:.2g}" if high > mean else f"{mean:.4g}"
    if floor is not None:
        return f"≤ {floor:g} %" if mean < 1.001 * floor else f"{mean:.2g} %"
    return f"{mean:.2f} ± {high - mean:.2f} %" if high > mean else f"{mean:.2f} %"


def _band(values: Sequence[float], floor: float | None = None) -> tuple[float, float, float]:
    """Return mean - std, mean and mean + std of the finite values; nan if there are none."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, math.nan, math.nan
    if floor is not None:
        low, mean, high = _band([math.log10(max(value, floor)) for value in known])
        return max(10**low, floor), 10**mean, 10**high
    mean, std = statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0
    return mean - std, mean, mean + std


def _in_units(line: Line, size: float) -> Line:
    return replace(line, x=[x / size for x in line.x])


def _known(lines: Sequence[Line], *names: str) -> list[float]:
    return [value for line in lines for name in names for value in getattr(line, name) if math.isfinite(value)]


def _curves(results: Results, lines: Sequence[Line], x: Scale, y: Scale) -> "Figure":
    return _together(results, lines, x, y) if len(lines) <= _TOGETHER else _apart(results, lines, x, y)


def _together(results: Results, lines: Sequence[Line], x: Scale, y: Scale) -> "Figure":
    """Draw all lines in one panel, each with its name and last value beside its end."""
    figure = titled_figure(results, 9.6, 4.4 if lines else 1.8)
    axes = figure.subplots()
    apply_scale(axes, "x", x)
    apply_scale(axes, "y", y)
    axes.grid(visible=True)
    ends = [_draw_line(axes, line, y, color) for line, color in zip(lines, SERIES_COLORS, strict=False)]
    heights = [y.fraction(value) for _, value in ends]
    for line, color, end, place in zip(lines, SERIES_COLORS, ends, spread(heights, 0.13, 0.97), strict=False):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.9, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        text, place_xy = f"{line.name}\n{line.final}", (1.04, place)
        axes.annotate(
            text, end, place_xy, textcoords="axes fraction", va="center", annotation_clip=False, arrowprops=leader
        )
    note = "line: mean over seeds; band: ± standard deviation" if lines else NOTHING
    figure.supxlabel("; ".join(filter(None, (note, y.note))), **NOTE)
    return figure


def _apart(results: Results, lines: Sequence[Line], x: Scale, y: Scale) -> "Figure":
    """Draw a panel per line, the others in grey behind it."""
    columns = 5 if len(lines) > 16 else min((3, 4, 5), key=lambda count: (-len(lines) % count, -count))
    rows = -(-len(lines) // columns)
    figure = titled_figure(results, 2.2 * columns + 0.7, 1.75 * rows + 1.2)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    apply_scale(grid[0, 0], "x", x, label=False)
    apply_scale(grid[0, 0], "y", y, label=False)
    for index, (line, axes) in enumerate(zip(lines, grid.flat, strict=False)):
        _draw_background(axes, [other for other in lines if other is not line])
        _draw_line(axes, line, y, FAMILIES[line.family][0])
        axes.set_title(f"{line.name}\n{line.final}", fontsize=8.5, loc="left", linespacing=1.25)
        axes.tick_params(labelsize=8, labelbottom=index + columns >= len(lines))
        axes.grid(visible=True, linewidth=0.5)
    for axes in grid.flat[len(lines) :]:
        axes.remove()
    figure.supxlabel(f"{x.label}\n({y.note})" if y.note else x.label, fontsize=10)
    figure.supylabel(y.label, fontsize=10)
    family_legend(figure, [line.family for line in lines], background=True)
    return figure


def _draw_line(axes: "Axes", line: Line, y: Scale, color: str) -> tuple[float, float]:
    """Draw a line with its band and a mark at its last point; return where that is shown."""
    axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    axes.plot(line.x, line.mean, color=color, linewidth=1.7)
    at, value = [pair for pair in zip(line.x, line.mean, strict=True) if all(map(math.isfinite, pair))][-1]
    below, above = value < y.low, value > y.high
    inside, marker = min(max(value, y.low), y.high), "v" if below else "^" if above else "o"
    axes.plot(at, inside, marker, color=color, markersize=4.5, clip_on=False, zorder=3)
    if below or above:
        words, shift = ("below the axis", 5) if below else ("above the axis", -12)
        axes.annotate(words, (at, inside), (-4, shift), textcoords="offset points", ha="right", **NOTE)
    return at, inside


def _draw_background(axes: "Axes", lines: Sequence[Line]) -> None:
    """Draw lines as one path, thinned: the page holds panels × lines of them."""
    x, y = [], []
    for line in lines:
        every = -(-len(line.x) // _GREY_POINTS)
        x += [*line.x[:-1:every], line.x[-1], math.nan]
        y += [*line.mean[:-1:every], line.mean[-1], math.nan]
    axes.plot(x, y, color=GREY, linewidth=0.7, zorder=1)
