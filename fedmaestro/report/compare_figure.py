"""What the pictures of a comparison share: the order of strategies, which of them have failed, titles and families.

Strategies stand in the order of their final value (mean over tiers and seeds), best first. Axes of the metric follow
the field: a strategy that fails does not squash the others, what it reaches is said in words.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmaestro.report.compare_table import overall_stat
from fedmaestro.report.figure import GREY, SERIES_COLORS, key, new_figure, top_legend
from fedmaestro.runs.records import Results
from fedmaestro.runs.records import StrategyResults as Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour and marker.
FAMILIES = dict(zip(("rank", "width", "rank and width", "other"), zip(SERIES_COLORS, "os^D", strict=True), strict=True))
NOTHING = "nothing has been recorded yet"
_FAR = 4.0  # times the lead of the best over the median: a strategy this far below the median has failed
_MIN_LEAD = 1.0  # percentage points, or percent of the median


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


def titled_figure(results: Results, width: float, height: float) -> "Figure":
    incomplete = "" if results.complete else " · incomplete"
    title = f"{results.experiment} · seeds {', '.join(map(str, results.seeds))}{incomplete}"
    return new_figure(width, height, title)


def family_legend(figure: "Figure", families: Sequence[str], *, background: bool) -> None:
    """Name the colours, where there is more than one; with a background, lines and their bands too."""
    from matplotlib.patches import Patch

    present = [(name, *FAMILIES[name]) for name in FAMILIES if name in families]
    keys: list[Any] = [key(color) if background else key(color, marker=m, linestyle="") for _, color, m in present]
    names = [f"{name} family" for name, _, _ in present]
    if background:
        keys += [Patch(color="#999999", alpha=0.35, linewidth=0), key(GREY)]
        names += ["± standard deviation over seeds", "the other strategies"]
    if len(names) > 1:
        top_legend(figure, keys, names, columns=len(names))
