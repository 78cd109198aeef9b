"""What may be said of rows, as pictures: differences from a baseline, and ranks over several experiments."""

import math
import textwrap
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fedmaestro.report.axis import Scale
from fedmaestro.report.compare_figure import failed, titled_figure
from fedmaestro.report.difference_table import difference_text, seeds_note
from fedmaestro.report.figure import BLACK, MUTED, NOTE, SERIES_COLORS, new_figure, plot_style, short_name
from fedmaestro.report.format import Shown
from fedmaestro.report.ranking_table import friedman_note
from fedmaestro.runs.differences import Compared, compared, margin_of
from fedmaestro.runs.ranking import Ranking
from fedmaestro.runs.records import Results
from fedmaestro.stats.paired import ALPHA
from fedmaestro.stats.verdict import Difference, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLAIMED, _OPEN = SERIES_COLORS[0], "#8a8a8a"  # colours of rows with and without a claim
_PANELS = ("mean", "worst", "devices", "own-test")
_BAND = "#e8eef5"


def has_differences(results: Results) -> bool:
    """Return whether there is anything to draw."""
    return any(x.mean is not None for family in compared(results) for x in family.differences)


@plot_style()
def difference_figure(results: Results) -> "Figure":
    """Draw every row's difference from the baseline: a panel per measure over tiers or devices, a line per row.

    A dot is a seed, a diamond the mean, a bar the 95 % t interval; the band is the margin of equivalence.
    """
    families = [family for family in compared(results) if family.measure.name in _PANELS]
    rows = families[0].differences
    columns = min(len(families), 2)
    lines = -(-len(families) // columns)
    figure = titled_figure(results, 9.6, lines * (0.42 * len(rows) + 0.95) + 0.85)
    grid = figure.subplots(lines, columns, squeeze=False)
    for index, (family, axes) in enumerate(zip(families, grid.flat, strict=False)):
        _draw_family(axes, results, family, named=index % columns == 0)
    for axes in grid.flat[len(families) :]:
        axes.remove()
    band = "" if margin_of(results) is None else "; band: margin of equivalence"
    note = f"dots: seeds; diamond and bar: mean and its 95 % t interval{band}; blue: a claim, grey: none"
    if {x.row for x in rows} & {row.name for row in failed(results)}:
        note += "; triangles: beyond the axis"
    figure.supxlabel("\n".join(filter(None, (note, seeds_note(families)))), **NOTE)
    return figure


@plot_style()
def critical_difference_figure(ranks: Ranking) -> "Figure":
    """Draw the average ranks on a line, best left; bars join rows that do not differ (Demšar, 2006)."""
    assert ranks.critical_difference is not None, "there is something to rank"
    order = sorted(range(len(ranks.rows)), key=lambda index: ranks.average[index])
    half = -(-len(order) // 2)
    depth = 0.9 + 0.28 * len(_bars(ranks))
    title = f"Average ranks over {len(ranks.settings)} experiments"
    figure = new_figure(9.0, 0.33 * (half + depth) + 1.75, title)
    axes = figure.subplots()
    low, high = 1.0, float(len(order))
    axes.set(xlim=(low - 0.04 * (high - low), high + 0.04 * (high - low)), ylim=(half + depth, -1.3))
    axes.axis("off")
    _draw_axis(axes, low, high)
    _draw_distance(axes, low, min(ranks.critical_difference, high - low), ranks.critical_difference)
    for place, index in enumerate(order):
        left = place < half
        height = depth + (place if left else len(order) - 1 - place)
        _draw_rank(axes, ranks.average[index], height, low if left else high, short_name(ranks.rows[index]))
    for level, (start, end) in enumerate(_bars(ranks)):
        axes.plot([start - 0.012 * high, end + 0.012 * high], [0.45 + 0.28 * level] * 2, color=BLACK, linewidth=3.2)
    figure.supxlabel(textwrap.fill(friedman_note(ranks), 118, break_on_hyphens=False), **NOTE)
    return figure


def _draw_family(axes: "Axes", results: Results, family: Compared, *, named: bool) -> None:
    show, margin = Shown(results.metric), margin_of(results)
    scale = _scale(show, family, margin, {row.name for row in failed(results)})
    scale.apply(axes, "x")
    axes.set_title(family.measure.heading, loc="left", fontweight="bold")
    if margin is not None:
        axes.axvspan(-show.factor * margin, show.factor * margin, color=_BAND, linewidth=0, zorder=0)
    axes.axvline(0, color=MUTED, linewidth=1.0, zorder=1)
    for index, difference in enumerate(family.differences):
        _draw_difference(axes, index, difference, show, scale)
    names = [f"{short_name(x.row)}" for x in family.differences]
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.45, -0.7)
    axes.grid(visible=True, axis="x")


def _draw_difference(axes: "Axes", y: int, difference: Difference, show: Shown, scale: Scale) -> None:
    """Draw one row and write below its name what is known in words above the bar."""
    if difference.mean is None:
        axes.text(0.02, y, "unknown", transform=axes.get_yaxis_transform(), va="center", **NOTE)
        return
    color = _CLAIMED if difference.verdict.differs or difference.verdict is Verdict.LEVEL else _OPEN
    mean, half = show.factor * difference.mean, show.factor * (difference.half_width or 0.0)
    seeds = [show.factor * x for x in difference.differences]
    axes.plot([mean - half, mean + half], [y, y], color=color, linewidth=1.8, solid_capstyle="butt", zorder=2)
    axes.plot(seeds, [y + 0.2] * len(seeds), "o", color=color, markersize=3, alpha=0.55, markeredgewidth=0, zorder=2)
    inside = scale.holds(mean)
    marker = "D" if inside else "<" if mean < scale.low else ">"
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6, "zorder": 3, "clip_on": inside}
    axes.plot(scale.clip(mean), y, marker, color=color, markersize=6, **edge)
    words = difference_text(show, difference) + (f"  {difference.verdict.value}" if color == _CLAIMED else "")
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
    behind = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6}
    axes.text(0.995, y - 0.3, words, fontsize=8, bbox=behind, zorder=4, **place)


def _scale(show: Shown, family: Compared, margin: float | None, far: Collection[str]) -> Scale:
    """Return an axis that holds zero, the margin, every seed and every interval but of rows that have failed."""
    ends = [0.0] if margin is None else [-margin, margin]
    for x in family.differences:
        if x.mean is not None and not (x.row in far and any(other.row not in far for other in family.differences)):
            half = x.half_width or 0.0
            ends += [x.mean - half, x.mean + half, *x.differences]
    shown = [show.factor * end for end in ends if math.isfinite(end)]
    span = max(shown) - min(shown) or 1.0
    low, high = min(shown) - 0.05 * span, max(shown) + 0.05 * span
    unit = "points" if show.metric.percent else show.label("{metric}")
    label = f"Difference from {short_name(family.baseline)} ({unit})"
    return Scale(label=label, low=low, high=high, bins=7)


def _draw_axis(axes: "Axes", low: float, high: float) -> None:
    axes.plot([low, high], [0, 0], color=BLACK, linewidth=1.2)
    for tick in range(int(low), int(high) + 1):
        axes.plot([tick, tick], [0, -0.16], color=BLACK, linewidth=1.2)
        axes.text(tick, -0.22, str(tick), ha="center", va="bottom", fontsize=9)


def _draw_distance(axes: "Axes", low: float, length: float, distance: float) -> None:
    """Draw the critical difference as a bar above the axis, cut off where it is longer."""
    cut = "" if length == distance else ", longer than the axis"
    axes.plot([low, low + length], [-0.95, -0.95], color=MUTED, linewidth=1.6)
    for end in (low, low + length):
        axes.plot([end, end], [-1.05, -0.85], color=MUTED, linewidth=1.6)
    axes.text(low + length / 2, -1.05, f"critical difference {distance:.2f}{cut}", ha="center", va="bottom", **NOTE)


def _draw_rank(axes: "Axes", rank: float, height: float, side: float, name: str) -> None:
    """Draw a line from the axis down to the row's name at one side."""
    axes.plot([rank, rank, side], [0, height, height], color=BLACK, linewidth=0.9)
    left = side == 1.0
    axes.annotate(
        f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}",
        (side, height),
        (-4 if left else 4, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=9.5,
        annotation_clip=False,
    )


def _bars(ranks: Ranking) -> list[tuple[float, float]]:
    """Return from where to where the groups of rows that do not differ go; one group of all where the test keeps it."""
    if ranks.p is not None and ranks.p > ALPHA:
        return [(min(ranks.average), max(ranks.average))]
    at = dict(zip(ranks.rows, ranks.average, strict=True))
    return [(min(at[name] for name in group), max(at[name] for name in group)) for group in ranks.cliques]
