"""What the pictures of a comparison share: the order of strategies, axes, titles, legends.

Strategies stand in the order of their final accuracy (mean over tiers and seeds), best first. Accuracy axes follow the
field: a strategy that fails does not squash the others, what it reaches is said in words.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedmaestro.report.compare_table import overall_stat
from fedmaestro.report.figure import MUTED, SERIES_COLORS, new_figure
from fedmaestro.runs.records import Results
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
    """Return the strategies by final accuracy (mean over tiers), best first; those without one last."""
    means = [(overall_stat(row, "mean", "final").mean, row) for row in results.strategies]
    return [row for _, row in sorted(means, key=lambda pair: math.inf if math.isnan(pair[0]) else -pair[0])]


def failed(results: Results) -> list[Row]:
    """Return the strategies whose final accuracy lies far below the others': accuracy axes do not follow them."""
    means = {row.name: 100 * overall_stat(row, "mean", "final").mean for row in results.strategies}
    known = [mean for mean in means.values() if math.isfinite(mean)]
    if not known:
        return []
    median = statistics.median(known)
    lowest = median - _FAR * max(max(known) - median, _MIN_LEAD)
    return [row for row in results.strategies if means[row.name] < lowest]


def followed(values: Sequence[tuple[float, bool]]) -> list[float]:
    """Return what an axis must hold of (value, whether the strategy has failed): not what only failures reach."""
    lowest = min((value for value, far in values if not far and math.isfinite(value)), default=-math.inf)
    return [value for value, _ in values if value >= lowest]


def accuracy_scale(values: Sequence[float], label: str, *, room: float = 0.04, count: int = 8) -> Scale:
    """Return an axis in percent that holds all finite values and ``room`` (a share of its length) on both sides."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 100.0]
    lack = max(_MIN_SPAN - max(known) + min(known), 0.0) / 2
    low, high = max(min(known) - lack, 0.0), min(max(known) + lack, 100.0)
    margin = room * (high - low)
    ticks = even_ticks(low - margin, min(high + margin, 100.0), count)
    return Scale(label=f"{label} (%)", low=low - margin, high=high + margin, ticks=ticks)


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
