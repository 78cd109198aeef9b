"""The main metric per tier over communication rounds, over virtual time, and over the privacy spent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmaestro.report.axis import Scale, Trace, settled_scale, zero_scale
from fedmaestro.report.curves import Curve, metric_of, tier_curves, time_unit
from fedmaestro.report.figure import (
    NOTE,
    key,
    marker,
    new_figure,
    plot_style,
    short_name,
    side_legend,
    stagger,
    tier_colors,
)
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@plot_style()
def tier_accuracy_figure(rounds: Sequence[RoundRecord], title: str = "", split: str = "test") -> "Figure":
    """Draw the main metric (shares in %) per tier over rounds, virtual time if simulated, and ε if private.

    Args:
        rounds: Lines of ``rounds.jsonl``.
        title: Shown above the panels.
        split: What the values are of: ``test``, or ``validation``.

    """
    curves, show = tier_curves(rounds), Shown(metric_of(rounds))
    panels, y = _panels(curves), value_scale(curves, show, split)
    figure = new_figure(3.0 + 4.3 * len(panels), max(4.4, 0.25 * len(curves) + 0.9), title)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    y.apply(grid[0], "y")
    for axes, (label, positions) in zip(grid, panels.items(), strict=True):
        zero_scale([x for xs in positions for x in xs], label, bins=7).apply(axes, "x")
        _draw(axes, curves, positions, show)
    if curves:
        # Final values first, padded with figure spaces to the width of 100.0: digits line up.
        finals = [show.number(curve.final, 1).rjust(5, "\N{FIGURE SPACE}") for curve in curves]
        names = [f"{final}  {short_name(curve.tier)}" for final, curve in zip(finals, curves, strict=True)]
        heading = f"{show.label('Final {metric}')}\nper tier, largest first"
        keys = [key(color, **marker(index)) for index, color in enumerate(tier_colors(len(curves)))]
        side_legend(figure, keys, names, heading, labelspacing=0.7)
    figure.supxlabel(_note(curves, y), **NOTE)
    return figure


def value_scale(curves: Sequence[Curve], show: Shown, split: str = "test") -> Scale:
    """Return the axis of the metric on a split."""
    traces = [Trace(rounds=c.rounds, values=[[show.factor * value] for value in c.values]) for c in curves]
    return settled_scale(traces, show, f"{split.capitalize()} {{metric}}")


def _panels(curves: Sequence[Curve]) -> dict[str, list[Sequence[float]]]:
    """Return by the label of each panel where the points of every curve stand on its x axis."""
    panels: dict[str, list[Sequence[float]]] = {"Communication round": [curve.rounds for curve in curves]}
    seconds = max((curve.virtual_seconds[-1] for curve in curves), default=0.0)
    if seconds > 0:
        unit, size = time_unit(seconds)
        panels[f"Virtual time ({unit})"] = [[second / size for second in curve.virtual_seconds] for curve in curves]
    if any(epsilon == epsilon for curve in curves for epsilon in curve.epsilons):
        # Before the first round nothing is spent.
        spent = [[epsilon if epsilon == epsilon else 0.0 for epsilon in curve.epsilons] for curve in curves]
        panels["Privacy spent (ε)"] = list(spent)
    return panels


def _draw(axes: "Axes", curves: Sequence[Curve], positions: Sequence[Sequence[float]], show: Shown) -> None:
    axes.grid(visible=True)
    colors = tier_colors(len(curves))
    for index, (curve, x) in enumerate(zip(curves, positions, strict=True)):
        every, y = stagger(index, len(curves), len(x)), [show.factor * value for value in curve.values]
        axes.plot(x, y, color=colors[index], linewidth=1.7, **marker(index), markevery=every)


def _note(curves: Sequence[Curve], y: Scale) -> str:
    if not any(curve.finite for curve in curves):
        return "no round has been evaluated yet"
    timeless = "" if any(curve.virtual_seconds[-1] > 0 for curve in curves) else "no virtual time"
    return "; ".join(filter(None, (y.note, timeless)))
