"""What a model is worth at each size: the metric over MACs and over measured latency."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedmaestro.report.axis import Scale, log_scale, metric_scale
from fedmaestro.report.figure import (
    BLACK,
    NOTE,
    SERIES_COLORS,
    key,
    marker,
    new_figure,
    plot_style,
    short_name,
    side_legend,
    stagger,
)
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import ACCURACY, CostCurve, CostPoint, MetricFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.8)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_DENSE: dict[str, Any] = {"marker": "*", "markersize": 14, "markeredgecolor": "white", "linewidth": 0.9}
_SMALL = 0.25  # of the range of log MACs: the leading models from here up are always shown
_ROOM = 2.0  # times what the leading models lose down to there: how far a series is followed
_NEARLY_ALL = 1.5  # times that span: what needs no more than this is shown whole
_MIN_SPAN = 0.03  # of a value of 1: less would blow noise up to the full height
_MIN_LOG_SPAN = 0.06  # decades


@plot_style()
def cost_figure(curve: CostCurve, title: str = "") -> "Figure":
    """Draw the metric over MACs and, where it was measured, over latency (ms).

    What comes before the last ", " in the name of a series sets its colour, what comes after its dashes: "Maestro,
    searched ranks" and "Maestro, uniform ranks" share a colour. The y axis follows the leading models; what falls far
    behind them leaves the picture, and the legend says how far it goes.

    Args:
        curve: Content of ``curve.json``.
        title: Shown above the panels.

    """
    show, y, points = _shown(curve), value_scale(curve), _points(curve)
    has_latency = any(point.latency_ms for point in points)
    figure = new_figure(3.4 + 4.3 * (1 + has_latency), 4.6, title)
    axes = figure.subplots(1, 1 + has_latency, sharey=True, squeeze=False)[0]
    y.apply(axes[0], "y")
    _draw(axes[0], curve, show, "MACs per example (log scale)", lambda point: point.macs)
    if has_latency:
        device = f"\n{curve.device}" if curve.device else ""
        _draw(axes[1], curve, show, f"Measured latency (ms, log scale){device}", lambda point: point.latency_ms)
    _legend(figure, curve, show, y)
    notes = "" if points else "no model has been measured yet", "" if has_latency else "latency was not measured"
    figure.supxlabel("; ".join(filter(None, notes)), **NOTE)
    return figure


def value_scale(curve: CostCurve) -> Scale:
    """Return the y axis, logarithmic where less is better.

    The best models of every size down to a quarter of the range of log MACs lie inside, and so does the dense model.
    Series are followed for twice the height these need: one that collapses does not squash the rest.
    """
    show, points, dense = _shown(curve), _points(curve), [curve.dense] if curve.dense else []
    if not [*points, *dense]:
        return metric_scale([], show, "Test {metric}")
    sign = 1 if show.metric.higher_is_better else -1
    log = sign < 0 and all(point.value > 0 for point in [*points, *dense])

    def score(point: CostPoint) -> float:
        """Grows with quality; distances are those that a reader sees."""
        shown = show.factor * point.value
        return sign * (math.log10(shown) if log else shown)

    models = [(math.log(max(point.macs, 1)), score(point)) for point in points or dense]
    ends = _limits(models, list(map(score, dense)), _MIN_LOG_SPAN if log else _MIN_SPAN * show.factor)
    low, high = sorted(10 ** (sign * end) if log else sign * end for end in ends)
    low, high = (max(low, -1.5), min(high, 101.5)) if show.metric.percent else (low, high)
    return Scale(label=show.label("Test {metric}", *["log scale"] * log), low=low, high=high, log=log)


def _limits(models: Sequence[tuple[float, float]], dense: Sequence[float], least: float) -> tuple[float, float]:
    """Return the worst and the best score to show of models (log MACs, score), at least so far apart."""
    sizes, scores = zip(*models, strict=True)
    small, best = min(sizes) + _SMALL * (max(sizes) - min(sizes)), max(scores)
    leading = max(score for size, score in models if size <= small)
    span = max(_ROOM * (best - leading), least)
    low = min(scores) if best - min(scores) <= _NEARLY_ALL * span else best - span
    best = max([best, *dense])
    low = min([low, best - least, *dense])
    margin = 0.05 * (best - low)
    return low - margin, best + margin


def _points(curve: CostCurve) -> list[CostPoint]:
    return [point for points in curve.series.values() for point in points]


def _shown(curve: CostCurve) -> Shown:
    """Return how values are shown; a curve that does not say what its metric is has accuracies or perplexities."""
    other = MetricFacts(name=curve.metric, higher_is_better=False, percent=False)
    return Shown(curve.facts or (ACCURACY if curve.metric == ACCURACY.name else other))


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return how each series is drawn: colour by method, dashes and filling by the choice of ranks, own marker."""
    keys = [name.rpartition(", ")[::2] if ", " in name else (name, "") for name in names]
    methods, choices = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True)) if keys else ([], [])
    styles = []
    for index, (method, choice) in enumerate(keys):
        color = SERIES_COLORS[methods.index(method) % len(SERIES_COLORS)]
        dashes = _DASHES[choices.index(choice) % len(_DASHES)]
        hollow = {"markerfacecolor": "white", "markeredgecolor": color, "markeredgewidth": 1.2}
        filling = hollow if choices.index(choice) % 2 else {}
        styles.append({"color": color, "linewidth": 1.7, "linestyle": dashes, **marker(index), **filling})
    return styles


def _draw(axes: "Axes", curve: CostCurve, show: Shown, label: str, cost: Callable[[CostPoint], float | None]) -> None:
    """Draw all series over one cost; a cost that is unknown or zero has no place on a log axis."""
    costs: list[float] = []
    for index, (points, style) in enumerate(zip(curve.series.values(), _styles(list(curve.series)), strict=True)):
        # In the order of size in both panels: neighbours differ by one step of the budget.
        placed = [(x, show.factor * p.value) for p in sorted(points, key=lambda p: p.macs) if (x := cost(p))]
        every = stagger(index, len(curve.series), len(placed))
        axes.plot([x for x, _ in placed], [y for _, y in placed], **style, markevery=every)
        costs += [x for x, _ in placed]
    if (dense := curve.dense) is not None:
        axes.axhline(show.factor * dense.value, color=BLACK, linewidth=0.9, zorder=1.5)
        if x := cost(dense):
            axes.plot([x], [show.factor * dense.value], color=BLACK, **_DENSE, zorder=3)
            costs.append(x)
    log_scale(costs, label, bins=6).apply(axes, "x")
    axes.grid(visible=True)


def _legend(figure: "Figure", curve: CostCurve, show: Shown, y: Scale) -> None:
    """List the series in their order, each with how much of it the axis hides, and the dense model."""
    keys = [key(**style) for style in _styles(list(curve.series))]
    names = [f"{short_name(name)}{_cut(points, show, y)}" for name, points in curve.series.items()]
    if curve.dense is not None:
        keys.append(key(BLACK, **_DENSE))
        names.append(f"dense model: {show.words(show.factor * curve.dense.value)}")
    if keys:
        side_legend(figure, keys, names, labelspacing=0.9, handlelength=3.2)


def _cut(points: Sequence[CostPoint], show: Shown, y: Scale) -> str:
    hidden = [value for point in points if not y.holds(value := show.factor * point.value)]
    way, worst = "down" if show.metric.higher_is_better else "up", show.metric.worst(hidden)
    cut = "" if worst is None else f"\n {len(hidden)} of {len(points)} cut off, {way} to {show.words(worst)}"
    return cut if points else "\n not measured"
