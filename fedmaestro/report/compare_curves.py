"""Curves of a comparison over rounds, bytes and virtual time, each a function from ``results.json`` to a figure.

Up to four strategies share a panel, their names beside their lines. Of more, each has a panel in which the others are
grey: nobody tells twenty colours apart.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fedmaestro.report.axis import Scale, Trace, log_scale, settled_scale, zero_scale
from fedmaestro.report.compare_figure import FAMILIES, NOTHING, failed, family_legend, ranked, titled_figure
from fedmaestro.report.compare_table import family, is_whole, seeds_text
from fedmaestro.report.curves import as_number, byte_unit, time_unit
from fedmaestro.report.figure import GREY, NOTE, SERIES_COLORS, key, plot_style, short_name, side_legend
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import Results, Series
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOGETHER = 4  # so many lines share a panel
_GREY_POINTS = 40  # per line in the background: a page holds panels × lines of them
_WIDE = 4.0  # costs that differ by more than this factor are drawn on a log scale
_FLOOR = 1e-4  # percent: smaller values are drawn at the end of a log axis

Over = Literal["round", "bytes", "virtual_seconds"]
Measure = Callable[[Series], list[float]]
"""From the series of one seed to a value per evaluated round, as it is shown; nan where there is none."""


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


@plot_style()
def metric_figure(results: Results, over: Over) -> "Figure":
    """Draw the main metric, mean over tiers, over communication rounds, over bytes of all devices, or virtual time."""
    show = Shown(results.metric)

    def mean_of_tiers(series: Series) -> list[float]:
        tiers = [series.values[tier] for tier in results.tiers]
        return [show.factor * statistics.fmean(map(as_number, scores)) for scores in zip(*tiers, strict=True)]

    lines, x = _placed(_lines(results, over, mean_of_tiers, show), over)
    bands = [(line, list(zip(line.mean, line.low, line.high, strict=True))) for line in lines]
    traces = [Trace(rounds=line.rounds, values=band, failed=line.failed) for line, band in bands]
    return _curves(results, lines, x, settled_scale(traces, show, "Mean {metric} of tiers", bins=_bins(lines)))


@plot_style()
def tail_energy_figure(results: Results) -> "Figure":
    """Draw the share (%) of the LoD layers' energy beyond the smallest tier's ranks, over rounds, on a log axis."""
    lines, x = _placed(_lines(results, "round", lambda series: _percent(series.tail_energy), floor=_FLOOR), "round")
    values = _known(lines, "low", "high")
    y = log_scale(values, "Tail energy (% of Σσ², log scale)", bins=_bins(lines))
    note = f"what is below {_FLOOR:g} % is drawn there" if min(values, default=1.0) <= _FLOOR else ""
    return _curves(results, lines, x, replace(y, note=note))


@plot_style()
def factor_bias_figure(results: Results) -> "Figure":
    """Draw the part (%) of a round's update that averaging factors instead of products misses, over rounds."""
    lines, x = _placed(_lines(results, "round", lambda series: _percent(series.factor_bias)), "round")
    y = zero_scale(_known(lines, "high"), "Factor bias (% of the round's update)", bins=_bins(lines))
    return _curves(results, lines, x, y)


def _percent(shares: Sequence[float | None]) -> list[float]:
    return [100 * as_number(share) for share in shares]


def _bins(lines: Sequence[Line]) -> int:
    return 7 if len(lines) <= _TOGETHER else 5


def _placed(lines: list[Line], over: Over) -> tuple[list[Line], Scale]:
    """Return lines and their x axis in readable units; logarithmic where costs of whole runs differ by a factor > 4."""
    bins = _bins(lines)
    if over == "round":
        return lines, zero_scale(_known(lines, "x"), "Communication round", bins=bins)
    most = max(_known(lines, "x"), default=0.0)
    unit, size = byte_unit(most) if over == "bytes" else time_unit(most)
    label = "Traffic of all devices, down and up" if over == "bytes" else "Virtual time"
    lines = [replace(line, x=[x / size for x in line.x]) for line in lines]
    ends = [max(_known([line], "x")) for line in lines]
    if ends and max(ends) > _WIDE * min(ends) > 0:
        positive = [x for x in _known(lines, "x") if x > 0]
        return lines, log_scale(positive, f"{label} ({unit}, log scale)", bins=bins)
    return lines, zero_scale(ends, f"{label} ({unit})", bins=bins)


def _lines(
    results: Results, over: Over, measure: Measure, show: Shown | None = None, floor: float | None = None
) -> list[Line]:
    """Return a line for every strategy of which a point can be drawn, best first.

    With a floor, means and deviations are those of the logarithms, and nothing is below it.
    """
    lines = (_line(row, results, over, measure, show or Shown(), floor) for row in ranked(results))
    return [line for line in lines if line is not None]


def _line(row: Row, results: Results, over: Over, measure: Measure, show: Shown, floor: float | None) -> Line | None:
    """Return the line over the rounds that any seed has evaluated."""
    points: dict[int, list[tuple[float, float]]] = {}
    for series in row.series:
        for number, x, y in zip(series.round, getattr(series, over), measure(series), strict=True):
            points.setdefault(number, []).append((as_number(x), y))
    rounds = sorted(points)
    x = [_band([x for x, _ in points[number]])[1] for number in rounds]
    bands = [_band([y for _, y in points[number]], floor) for number in rounds]
    drawn = [band for at, band in zip(x, bands, strict=True) if math.isfinite(at) and math.isfinite(band[1])]
    if not drawn:
        return None
    low, mean, high = zip(*bands, strict=True)
    note = "" if is_whole(row, results) else f" ({seeds_text(row, results)})"
    final = f"{_final(drawn[-1], show, floor)}{note}"
    name, lost = short_name(row.name), row in failed(results)
    facts: dict[str, Any] = {"name": name, "family": family(row), "failed": lost, "final": final}
    return Line(**facts, rounds=rounds, x=x, mean=mean, low=low, high=high)


def _final(band: tuple[float, float, float], show: Shown, floor: float | None) -> str:
    """Return the last value in words, with its standard deviation where that is no logarithm's."""
    _, mean, high = band
    if floor is not None:
        return f"≤ {floor:g} %" if mean < 1.001 * floor else f"{mean:.2g} %"
    value, std = (".2f", ".2f") if show.metric.percent else (".4g", ".2g")
    return f"{mean:{value}}{f' ± {high - mean:{std}}' if high > mean else ''}{show.unit}"


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


def _known(lines: Sequence[Line], *names: str) -> list[float]:
    return [value for line in lines for name in names for value in getattr(line, name) if math.isfinite(value)]


def _curves(results: Results, lines: Sequence[Line], x: Scale, y: Scale) -> "Figure":
    return _together(results, lines, x, y) if len(lines) <= _TOGETHER else _apart(results, lines, x, y)


def _together(results: Results, lines: Sequence[Line], x: Scale, y: Scale) -> "Figure":
    """Draw all lines in one panel; the legend says what each ends at."""
    figure = titled_figure(results, 9.6, 4.4 if lines else 1.8)
    axes = figure.subplots()
    x.apply(axes, "x")
    y.apply(axes, "y")
    axes.grid(visible=True)
    for line, color in zip(lines, SERIES_COLORS, strict=False):
        _draw_line(axes, line, y, color)
    if lines:
        keys = [key(color) for color, _ in zip(SERIES_COLORS, lines, strict=False)]
        side_legend(figure, keys, [f"{line.name}\n {line.final}" for line in lines], labelspacing=0.9)
    note = "line: mean over seeds; band: ± standard deviation" if lines else NOTHING
    figure.supxlabel("; ".join(filter(None, (note, y.note))), **NOTE)
    return figure


def _apart(results: Results, lines: Sequence[Line], x: Scale, y: Scale) -> "Figure":
    """Draw a panel per line, the others in grey behind it."""
    columns = 5 if len(lines) > 16 else min((3, 4, 5), key=lambda count: (-len(lines) % count, -count))
    rows = -(-len(lines) // columns)
    figure = titled_figure(results, 2.2 * columns + 0.7, 1.75 * rows + 1.2)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    x.apply(grid[0, 0], "x", label=False)
    y.apply(grid[0, 0], "y", label=False)
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


def _draw_line(axes: "Axes", line: Line, y: Scale, color: str) -> None:
    """Draw a line with its band and a mark at its last point, at the edge where that lies beyond the axis."""
    axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    axes.plot(line.x, line.mean, color=color, linewidth=1.7)
    at, value = [pair for pair in zip(line.x, line.mean, strict=True) if all(map(math.isfinite, pair))][-1]
    inside, below = y.clip(value), value < y.low
    mark = "o" if y.holds(value) else "v" if below else "^"
    axes.plot(at, inside, mark, color=color, markersize=4.5, clip_on=False, zorder=3)
    if not y.holds(value):
        words, place = ("below the axis", (-4, 5)) if below else ("above the axis", (-4, -12))
        axes.annotate(words, (at, inside), place, textcoords="offset points", ha="right", **NOTE)


def _draw_background(axes: "Axes", lines: Sequence[Line]) -> None:
    """Draw lines as one path, thinned: the page holds panels × lines of them."""
    x, y = [], []
    for line in lines:
        every = -(-len(line.x) // _GREY_POINTS)
        x += [*line.x[:-1:every], line.x[-1], math.nan]
        y += [*line.mean[:-1:every], line.mean[-1], math.nan]
    axes.plot(x, y, color=GREY, linewidth=0.7, zorder=1)
