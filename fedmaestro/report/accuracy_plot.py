"""The main metric per tier over communication rounds and over virtual time."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from fedmaestro.report.curves import Curve, tier_curves, time_unit
from fedmaestro.report.figure import (
    MARKERS,
    MUTED,
    new_figure,
    plot_style,
    save_figure,
    short_name,
    svg_text,
    tier_colors,
)
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SETTLED = 0.25  # the y axis is chosen from what comes after this part of the run
_MIN_SPAN = 2.0  # percentage points: less would blow noise up to the full height
_MAX_MARKERS = 15  # per curve

_Rounds = Sequence[RoundRecord]


def plot_tier_accuracy(rounds: _Rounds, path_without_suffix: Path | str, title: str = "") -> tuple[Path, Path]:
    """Draw the main metric (accuracy in %) per tier over rounds, virtual time if simulated, and ε if private.

    Args:
        rounds: Lines of ``rounds.jsonl``.
        path_without_suffix: ``.png`` (150 dpi) and ``.svg`` are appended.
        title: Shown above the panels.

    Returns:
        The paths of the PNG and of the SVG.

    """
    with plot_style():
        return save_figure(_figure(rounds, title), path_without_suffix)


def tier_accuracy_svg(rounds: _Rounds, title: str = "") -> str:
    """Return the picture of `plot_tier_accuracy` as an SVG document."""
    with plot_style():
        return svg_text(_figure(rounds, title))


def y_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the limits of the metric's axis as shown, from the curves after the first quarter of the run.

    Every final value lies inside; the bad start may be cut off.
    """
    show = _shown(curves)
    last = max((curve.rounds[-1] for curve in curves), default=0)
    settled = [curve.final for curve in curves if curve.finite]
    for curve in curves:
        settled += [a for n, a in zip(curve.rounds, curve.values, strict=True) if n >= _SETTLED * last and a == a]
    if not settled:
        return 0.0, show.factor
    bests = [curve.best for curve in curves if curve.finite]
    low, high = show.factor * min(settled + bests), show.factor * max(settled + bests)
    if not show.metric.percent:
        margin = max(0.06 * (high - low), 0.005 * abs(high)) or 0.1
        return low - margin, high + margin
    if show.metric.higher_is_better:
        low = show.factor * min(settled)
    margin = max(0.06 * (high - low), (_MIN_SPAN - (high - low)) / 2, 0.15)
    return max(low - margin, -1.5), min(high + margin, max(101.5, low + _MIN_SPAN))


def _shown(curves: Sequence[Curve]) -> Shown:
    return Shown(curves[0].metric) if curves else Shown()


def _figure(rounds: _Rounds, title: str) -> "Figure":
    curves = tier_curves(rounds)
    seconds = max((curve.virtual_seconds[-1] for curve in curves), default=0.0)
    private = any(epsilon == epsilon for curve in curves for epsilon in curve.epsilons)
    panels = 1 + (seconds > 0) + private
    figure = new_figure(3.0 + 4.3 * panels, 4.4)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    _draw(axes[0], curves, [curve.rounds for curve in curves], "Communication round")
    if seconds > 0:
        unit, size = time_unit(seconds)
        times = [[s / size for s in curve.virtual_seconds] for curve in curves]
        _draw(axes[1], curves, times, f"Virtual time ({unit})")
    if private:
        # Before the first round nothing is spent.
        spent = [[epsilon if epsilon == epsilon else 0.0 for epsilon in curve.epsilons] for curve in curves]
        _draw(axes[-1], curves, spent, "Privacy spent (ε)")
    _finish(figure, axes, curves, title, has_time=seconds > 0)
    return figure


def _draw(axes: "Axes", curves: Sequence[Curve], positions: Sequence[Sequence[float]], x_label: str) -> None:
    colors, markers = tier_colors(len(curves)), list(MARKERS)
    for index, (curve, x) in enumerate(zip(curves, positions, strict=True)):
        every = max(1, -(-len(curve.rounds) // _MAX_MARKERS))
        marker = markers[index % len(markers)]
        axes.plot(
            x,
            [_shown(curves).factor * value for value in curve.values],
            color=colors[index],
            marker=marker,
            # Staggered where points are many; where they are few, each evaluation shows.
            markevery=(index * every // len(curves), every),
            markersize=MARKERS[marker],
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1.7,
        )
    right = max((x[-1] for x in positions), default=0.0)
    room = 0.03 * right or 0.5  # for the markers of the first and the last point
    axes.set_xlim(-room, right + room)
    axes.set_xlabel(x_label)
    axes.grid(visible=True)


def _finish(figure: "Figure", axes: "Sequence[Axes]", curves: Sequence[Curve], title: str, *, has_time: bool) -> None:
    """Set limits and labels, and say in words what the limits hide."""
    from matplotlib.ticker import MaxNLocator

    low, high = y_limits(curves)
    axes[0].set_ylim(low, high)
    axes[0].set_ylabel(_shown(curves).label("Test {metric}"))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if title:
        figure.suptitle(title, fontsize=11.5, fontweight="bold")
    if curves:
        _legend(figure, axes[0], curves)
    note = _note(curves, low, high, has_time=has_time)
    if note:
        figure.supxlabel(note, fontsize=8.5, color=MUTED)


def _legend(figure: "Figure", axes: "Axes", curves: Sequence[Curve]) -> None:
    """List the tiers in order, final value first: digits line up, and no label overlaps another."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=line.get_color(), marker=marker, markersize=1.2 * size, markeredgecolor="white")
        for line, (marker, size) in zip(axes.lines, cycle(MARKERS.items()), strict=False)
    ]
    figure.legend(
        handles,
        [f"{_final(curve)}  {short_name(curve.tier)}" for curve in curves],
        loc="outside right upper",
        title=f"{_shown(curves).label('Final {metric}')}\nper tier, largest first",
        title_fontsize=9.5,
        alignment="left",
        frameon=False,
        labelspacing=0.7,
    )


def _final(curve: Curve) -> str:
    """Return the final value, padded with figure spaces to the width of 100.0."""
    return Shown(curve.metric).number(curve.final, 1).rjust(5, "\N{FIGURE SPACE}")


def _note(curves: Sequence[Curve], low: float, high: float, *, has_time: bool) -> str:
    if not any(curve.finite for curve in curves):
        return "no round has been evaluated yet"
    show = _shown(curves)
    worst = show.metric.worst(show.metric.worst(curve.finite) or 0.0 for curve in curves if curve.finite)
    start, edge = show.factor * (worst or 0.0), low if show.metric.higher_is_better else high
    unit = show.unit
    where = "starts" if show.metric.higher_is_better else "ends"
    cut = f"the y axis {where} at {edge:{_digits(show)}}{unit}: the start of the run, from "
    cut += f"{start:{_digits(show)}}{unit}, is cut off"
    notes = ([cut] if show.is_worse(start, edge) else []) + ([] if has_time else ["no virtual time"])
    return "; ".join(notes)


def _digits(show: Shown) -> str:
    return ".1f" if show.metric.percent else ".4g"
