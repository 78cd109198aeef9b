"""What the pictures of a comparison share: the order of strategies, axes, titles, legends.

Strategies stand in the order of their final value (mean over tiers and seeds), best first. Axes of the metric follow
the field: a strategy that fails does not squash the others, what it reaches is said in words.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedmaestro.report.compare_table import overall_stat
from fedmaestro.report.figure import MUTED, SERIES_COLORS, new_figure
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import MetricFacts, Results
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = {"rank": (SERIES_COLORS[0], "o"), "width": (SERIES_COLORS[1], "s")}  # colour and marker
GREY = "#c4c4c4"
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": MUTED}
NOTHING = "nothing has been recorded yet"
_FAR = 4.0  # times the lead of the best over the median: a strategy this far below the median has failed
_MIN_LEAD = 1.0  # percentage points
_MIN_SPAN = 2.0  # percentage points: less would blow noise up to the full height


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One axis of a panel."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    note: str = ""

    def fraction(self, value: float) -> float:
        """Return where a value stands between the ends: 0 to 1, also for what lies beyond them."""
        low, at, high = (math.log10(x) if self.log else x for x in (self.low, value, self.high))
        return min(max((at - low) / (high - low), 0.0), 1.0)


def ranked(results: Results) -> list[Row]:
    """Return the strategies by final value (mean over tiers), best first; those without one last."""
    sign = -1 if results.metric.higher_is_better else 1
    means = [(overall_stat(results, row, "mean", "final").mean, row) for row in results.strategies]
    return [row for _, row in sorted(means, key=lambda pair: math.inf if math.isnan(pair[0]) else sign * pair[0])]


def failed(results: Results) -> list[Row]:
    """Return the strategies whose final value is far worse than the others': axes do not follow them."""
    sign = 1 if results.metric.higher_is_better else -1
    means = {row.name: sign * overall_stat(results, row, "mean", "final").shown_mean for row in results.strategies}
    known = [mean for mean in means.values() if math.isfinite(mean)]
    if not known:
        return []
    median = statistics.median(known)
    least = _MIN_LEAD if results.metric.percent else _MIN_LEAD / 100 * abs(median)
    lowest = median - _FAR * max(max(known) - median, least)
    return [row for row in results.strategies if means[row.name] < lowest]


def followed(values: Sequence[tuple[float, bool]], metric: MetricFacts) -> list[float]:
    """Return what an axis must hold of (value, whether the strategy has failed): not what only failures reach."""
    good = [value for value, far in values if not far and math.isfinite(value)]
    worst = metric.worst(good)
    return [value for value, _ in values if worst is None or not metric.better(worst, value)]


def is_beyond(value: float, scale: "Scale", metric: MetricFacts) -> bool:
    """Return whether a value lies beyond the bad end of an axis."""
    return value < scale.low if metric.higher_is_better else value > scale.high


def bad_end(scale: "Scale", metric: MetricFacts) -> float:
    """Return the end of an axis where values are worst."""
    return scale.low if metric.higher_is_better else scale.high


def metric_scale(values: Sequence[float], show: Shown, label: str, *, room: float = 0.04, count: int = 8) -> Scale:
    """Return an axis that holds all finite values (as shown) and ``room`` (a share of its length) on both sides."""
    label = show.label(label)
    if not show.metric.percent:
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        span = max(finite) - min(finite) or abs(max(finite)) or 1.0
        low, high = min(finite) - room * span, max(finite) + room * span
        return Scale(label=label, low=low, high=high, ticks=even_ticks(low, high, count))
    known = [value for value in values if math.isfinite(value)] or [0.0, 100.0]
    lack = max(_MIN_SPAN - max(known) + min(known), 0.0) / 2
    low, high = max(min(known) - lack, 0.0), min(max(known) + lack, 100.0)
    margin = room * (high - low)
    ticks = even_ticks(low - margin, min(high + margin, 100.0), count)
    return Scale(label=label, low=low - margin, high=high + margin, ticks=ticks)


def even_ticks(low: float, high: float, count: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(count).tick_values(low, high) if low <= tick <= high]


def apply_scale(axes: "Axes", which: Literal["x", "y"], scale: Scale, *, label: bool = True) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if scale.log:
        getattr(axes, f"set_{which}scale")("log", nonpositive="mask")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(scale.ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.set(**{f"{which}lim": (scale.low, scale.high)} | ({f"{which}label": scale.label} if label else {}))


def titled_figure(results: Results, width: float, height: float) -> "Figure":
    figure = new_figure(width, height)
    seeds = ", ".join(map(str, results.seeds))
    incomplete = "" if results.complete else " · incomplete"
    figure.suptitle(f"{results.experiment} · seeds {seeds}{incomplete}", fontsize=11.5, fontweight="bold")
    return figure


def family_legend(figure: "Figure", families: Sequence[str], *, background: bool) -> None:
    """Name the colours, where there is more than one; with a background, lines and their bands too."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = [name for name in FAMILIES if name in families]
    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=FAMILIES[name][0],
            marker="" if background else FAMILIES[name][1],
            linestyle="-" if background else "",
        )
        for name in present
    ]
    labels = [f"{name} family" for name in present]
    if background:
        handles += [Patch(color="#999999", alpha=0.35, linewidth=0), Line2D([], [], color=GREY)]
        labels += ["± standard deviation over seeds", "the other strategies"]
    if len(labels) > 1:
        name_legend(figure, handles, labels, columns=len(labels))


def name_legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Put the legend below the title: as two things, the layout would draw them on top of each other."""
    title = {"title": figure.get_suptitle(), "title_fontproperties": {"size": 11.5, "weight": "bold"}}
    figure.suptitle("")
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9, **title)
