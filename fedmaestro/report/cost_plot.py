"""What a model is worth at each size: accuracy or perplexity over MACs and over measured latency."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmaestro.report.curves import as_number
from fedmaestro.report.figure import (
    MARKERS,
    MUTED,
    SERIES_COLORS,
    new_figure,
    plot_style,
    save_figure,
    short_name,
    svg_text,
)
from fedmaestro.report.format import Shown, format_count
from fedmaestro.runs.records import MetricFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The dense model.
_BLACK = "#222222"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.8)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_SMALL = 0.25  # of the range of log MACs: the leading models from here up are always shown
_ROOM = 2.0  # times what the leading models lose down to there: how far a series is followed
_NEARLY_ALL = 1.5  # times that span: what needs no more than this is shown whole
_TICKS = 8
_MAX_MARKERS = 15  # per series


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a value is shown. Scores grow with quality, and distances on the axis are differences of scores."""

    label: str
    text: Callable[[float], str]  # a shown value in words
    factor: float  # shown value / value in the file
    lower_is_better: bool
    min_span: float  # scores: less would blow noise up to the full height
    min_margin: float  # scores: the room above the best point

    def score(self, shown: float) -> float:
        """Return nan for what is not a number or cannot stand on the axis."""
        if not self.lower_is_better:
            return shown if math.isfinite(shown) else math.nan
        return -math.log10(shown) if 0 < shown < math.inf else math.nan

    def shown(self, score: float) -> float:
        return 10**-score if self.lower_is_better else score


METRICS = {
    "accuracy": Metric(
        label="Test accuracy (%)",
        text=lambda percent: f"{percent:.1f} %",
        factor=100.0,
        lower_is_better=False,
        min_span=3.0,
        min_margin=0.15,
    ),
    "perplexity": Metric(
        label="Test perplexity (log scale, lower is better)",
        text=lambda perplexity: f"{perplexity:.3g}" if perplexity < 999.5 else format_count(perplexity),
        factor=1.0,
        lower_is_better=True,
        min_span=0.06,
        min_margin=0.003,
    ),
}


def _metric(name: str, facts: Mapping[str, Any] | None) -> Metric:
    """Return how a metric is drawn: one of ``METRICS``, or by what the curve says of it."""
    if name in METRICS:
        return METRICS[name]
    show = Shown(MetricFacts(**(facts or {"name": name, "percent": False})))
    if not show.metric.higher_is_better:
        label = f"Test {name} (log scale, lower is better)"
        return replace(METRICS["perplexity"], label=label, text=lambda value: f"{value:.3g}")
    return Metric(
        label=show.label("Test {metric}"),
        text=lambda value: f"{value:.3g}{show.unit}",
        factor=show.factor,
        lower_is_better=False,
        min_span=0.03 * show.factor,
        min_margin=0.0015 * show.factor,
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model: MACs, milliseconds and the shown value; nan where unknown."""

    macs: float
    latency_ms: float
    shown: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    metric: Metric
    device: str
    series: Mapping[str, Sequence[Point]]
    dense: Point | None

    @property
    def points(self) -> list[Point]:
        return [point for points in self.series.values() for point in points]


def plot_accuracy_cost(curve: Mapping[str, Any], path_without_suffix: Path | str, title: str = "") -> tuple[Path, Path]:
    """Draw accuracy (%) or perplexity over MACs and, where it was measured, over latency (ms).

    What comes before the last ", " in the name of a series sets its colour, what comes after its dashes: "Maestro,
    searched ranks" and "Maestro, uniform ranks" share a colour. The y axis follows the leading models; what falls far
    behind them leaves the picture, and a note says how far it goes.

    Args:
        curve: Content of ``curve.json``: ``metric`` ("accuracy", as a fraction, or "perplexity"), ``device``,
            ``series`` (lists of points by name) and ``dense`` (a point or null). A point whose ``value`` is null or
            not a number leaves a gap.
        path_without_suffix: ``.png`` (150 dpi) and ``.svg`` are appended.
        title: Shown above the panels.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: If the metric is another one.

    """
    with plot_style():
        return save_figure(_figure(_read(curve), title), path_without_suffix)


def accuracy_cost_svg(curve: Mapping[str, Any], title: str = "") -> str:
    """Return the picture of `plot_accuracy_cost` as an SVG document."""
    with plot_style():
        return svg_text(_figure(_read(curve), title))


def score_limits(metric: Metric, points: Sequence[Point], dense: Point | None) -> tuple[float, float]:
    """Return the limits of the y axis as scores (worst, best).

    The best models of every size down to a quarter of the range of log MACs lie inside, and so does the dense model.
    Series are followed for twice the height these need: one that collapses does not squash the rest.
    """
    known = [point for point in points if not math.isnan(point.score) and 0 < point.macs < math.inf]
    if not known:
        score = math.nan if dense is None else dense.score
        return (metric.score(100.0), 0.0) if math.isnan(score) else (score - metric.min_span, score + metric.min_margin)
    sizes = [math.log(point.macs) for point in known]
    small = min(sizes) + _SMALL * (max(sizes) - min(sizes))
    leading = max(point.score for point, size in zip(known, sizes, strict=True) if size <= small)
    best, worst = max(point.score for point in known), min(point.score for point in known)
    span = max(_ROOM * (best - leading), metric.min_span)
    low = worst if best - worst <= _NEARLY_ALL * span else best - span
    if dense is not None and not math.isnan(dense.score):
        low, best = min(low, dense.score), max(best, dense.score)
    low = min(low, best - metric.min_span)
    margin = 0.05 * (best - low)
    return low - margin, best + max(margin, metric.min_margin)


def log_ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return at most ``count`` round numbers between two positive limits, as even as a log axis allows."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if high > 3 * low:
        for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
            inside = [tick for tick in ticks if low <= tick <= high]
            if len(inside) <= count:
                return inside
        return inside[:: -(-len(inside) // count)]
    linear = [float(f"{tick:.6g}") for tick in MaxNLocator(count - 1).tick_values(low, high)]
    return [tick for tick in linear if low <= tick <= high]


def _read(curve: Mapping[str, Any]) -> Curve:
    name, facts = curve["metric"], curve.get("facts")
    if name not in METRICS and facts is None:
        raise ValueError(f"metric {name!r} is none of {', '.join(METRICS)}, and the curve does not say what it is")
    metric = _metric(name, facts)

    def point(row: Mapping[str, Any]) -> Point:
        shown = metric.factor * as_number(row.get("value"))
        macs, latency_ms = as_number(row.get("macs")), as_number(row.get("latency_ms"))
        return Point(macs=macs, latency_ms=latency_ms, shown=shown, score=metric.score(shown))

    # In the order of size in both panels: neighbours differ by one step of the budget.
    series = {
        name: sorted(map(point, rows), key=lambda p: math.inf if math.isnan(p.macs) else p.macs)
        for name, rows in curve["series"].items()
    }
    dense = curve.get("dense")
    return Curve(
        metric=metric, device=curve.get("device") or "", series=series, dense=None if dense is None else point(dense)
    )


def _figure(curve: Curve, title: str) -> "Figure":
    has_latency = any(point.latency_ms > 0 for point in curve.points)
    panels = 2 if has_latency else 1
    figure = new_figure(3.4 + 4.3 * panels, 4.6)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    limits = score_limits(curve.metric, curve.points, curve.dense)
    _set_y(axes[0], curve.metric, limits)
    _draw(axes[0], curve, lambda point: point.macs)
    axes[0].set_xlabel("MACs per example (log scale)")
    if has_latency:
        _draw(axes[1], curve, lambda point: point.latency_ms)
        axes[1].set_xlabel("Measured latency (ms, log scale)" + (f"\n{curve.device}" if curve.device else ""))
    if title:
        figure.suptitle(title, fontsize=11.5, fontweight="bold")
    _legend(figure, curve, limits[0])
    note = _note(curve, limits[0], has_latency=has_latency)
    if note:
        figure.supxlabel(note, fontsize=8.5, color=MUTED)
    return figure


def _set_y(axes: "Axes", metric: Metric, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = sorted(map(metric.shown, limits))
    axes.set_ylabel(metric.label)
    if metric.lower_is_better:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
    else:
        low, high = max(low, -1.5), min(high, 101.5)
        axes.yaxis.set_major_locator(MaxNLocator(_TICKS))
    axes.set_ylim(low, high)


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return how each series is drawn: colour by method, dashes and filling by the choice of ranks, own marker."""
    keys = [name.rpartition(", ")[::2] if ", " in name else (name, "") for name in names]
    methods, choices = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True)) if keys else ([], [])
    styles = []
    for index, (method, choice) in enumerate(keys):
        color = SERIES_COLORS[methods.index(method) % len(SERIES_COLORS)]
        marker = list(MARKERS)[index % len(MARKERS)]
        hollow = choices.index(choice) % 2 == 1
        styles.append(
            {
                "color": color,
                "marker": marker,
                "markersize": MARKERS[marker] + 0.5,
                "markerfacecolor": "white" if hollow else color,
                "markeredgecolor": color if hollow else "white",
                "markeredgewidth": 1.2 if hollow else 0.6,
                "linewidth": 1.7,
                "linestyle": _DASHES[choices.index(choice) % len(_DASHES)],
            }
        )
    return styles


_DENSE: dict[str, Any] = {
    "color": _BLACK,
    "linewidth": 0.9,
    "marker": "*",
    "markersize": 14,
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
}


def _draw(axes: "Axes", curve: Curve, cost: Callable[[Point], float]) -> None:
    """Draw all series over one cost; a cost that is unknown or not positive has no place on a log axis."""
    costs: list[float] = []
    for index, (points, style) in enumerate(zip(curve.series.values(), _styles(list(curve.series)), strict=True)):
        placed = [point for point in points if 0 < cost(point) < math.inf]
        values = [math.nan if math.isnan(point.score) else point.shown for point in placed]
        # Staggered where points are many: a search may report hundreds of steps.
        every = max(1, -(-len(placed) // _MAX_MARKERS))
        axes.plot(list(map(cost, placed)), values, **style, markevery=(index * every // len(curve.series), every))
        costs += map(cost, placed)
    dense = curve.dense
    if dense is not None and not math.isnan(dense.score):
        axes.axhline(dense.shown, color=_BLACK, linewidth=_DENSE["linewidth"], zorder=1.5)
        if 0 < cost(dense) < math.inf:
            axes.plot([cost(dense)], [dense.shown], **_DENSE, zorder=3)
            costs.append(cost(dense))
    _set_x(axes, costs)
    axes.grid(visible=True)


def _set_x(axes: "Axes", costs: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if not costs:
        axes.xaxis.set_major_locator(NullLocator())
        return
    room = max((max(costs) / min(costs)) ** 0.05, 1.05)
    low, high = min(costs) / room, max(costs) * room
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high, 6)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))


def _tick(x: float) -> str:
    """Return a round number with a decimal prefix: ``15 k``, ``0.2``."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if x >= size:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"


def _legend(figure: "Figure", curve: Curve, lowest: float) -> None:
    """List the series in their order, each with how much of it the limits hide, and the dense model."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for style in _styles(list(curve.series))]
    # A space before each name: matplotlib drops labels that start with an underscore.
    labels = [f" {short_name(name)}{_cut(curve.metric, points, lowest)}" for name, points in curve.series.items()]
    if curve.dense is not None and not math.isnan(curve.dense.score):
        handles.append(Line2D([], [], **_DENSE))
        labels.append(f" dense model: {curve.metric.text(curve.dense.shown)}")
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, labelspacing=0.9, handlelength=3.2)


def _hidden(points: Sequence[Point], lowest: float) -> list[float]:
    return [point.score for point in points if point.score < lowest]


def _cut(metric: Metric, points: Sequence[Point], lowest: float) -> str:
    known, hidden = [p for p in points if not math.isnan(p.score)], _hidden(points, lowest)
    if not known:
        return "\n not measured"
    if not hidden:
        return ""
    way = "up" if metric.lower_is_better else "down"
    return f"\n {len(hidden)} of {len(known)} cut off, {way} to {metric.text(metric.shown(min(hidden)))}"


def _note(curve: Curve, lowest: float, *, has_latency: bool) -> str:
    """Return what the picture does not show."""
    if all(math.isnan(point.score) for point in curve.points):
        return "no model has been measured yet"
    metric, hidden = curve.metric, _hidden(curve.points, lowest)
    verb, way = ("ends", "up") if metric.lower_is_better else ("starts", "down")
    limit, end = metric.text(metric.shown(lowest)), metric.text(metric.shown(min(hidden, default=lowest)))
    cut = f"the y axis {verb} at {limit}: what lies beyond, {way} to {end}, is cut off"
    return "; ".join(([cut] if hidden else []) + ([] if has_latency else ["latency was not measured"]))
