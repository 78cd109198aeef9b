"""Axes: where they end, what that hides, and ticks that people can read. All values are as they are shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fedmaestro.report.format import Shown
from fedmaestro.runs.records import MetricFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SETTLED = 1 / 3  # an axis of values over a run is chosen from what comes after this part of it
_MIN_SPAN = 2.0  # percentage points: less would blow noise up to the full height
_STEPS = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One axis; ``note`` says in words what it hides."""

    label: str
    low: float
    high: float
    log: bool = False
    integer: bool = False
    bins: int = 8
    note: str = ""

    def clip(self, value: float) -> float:
        """Return the value, or the end of the axis that it lies beyond."""
        return min(max(value, self.low), self.high)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def apply(self, axes: "Axes", which: Literal["x", "y"], *, label: bool = True) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

        axis = axes.xaxis if which == "x" else axes.yaxis
        if self.log:
            getattr(axes, f"set_{which}scale")("log", nonpositive="mask")
            axis.set_major_locator(FixedLocator(_log_ticks(self.low, self.high, self.bins)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        else:
            axis.set_major_locator(MaxNLocator(self.bins, integer=self.integer, steps=_STEPS, min_n_ticks=1))
        axes.set(**{f"{which}lim": (self.low, self.high), f"{which}label": self.label if label else ""})


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a settled axis is chosen from: at each round a value, and the ends of its band if there is one."""

    rounds: Sequence[int]
    values: Sequence[Sequence[float]]
    failed: bool = False


def zero_scale(values: Sequence[float], label: str, *, bins: int = 8) -> Scale:
    """Return an axis from zero to the largest value; of whole numbers, such as rounds, ticks are whole too."""
    high, whole = max(values, default=0.0) or 1.0, all(value == int(value) for value in values)
    return Scale(label=label, low=-0.03 * high, high=1.03 * high, integer=whole, bins=bins)


def log_scale(values: Sequence[float], label: str, *, bins: int = 8) -> Scale:
    """Return an axis that holds all values, which are positive."""
    low, high = min(values, default=1.0), max(values, default=10.0)
    room = max((high / low) ** 0.04, 1.05)
    return Scale(label=label, low=low / room, high=high * room, log=True, bins=bins)


def metric_scale(values: Sequence[float], show: Shown, label: str, *, room: float = 0.05, bins: int = 8) -> Scale:
    """Return an axis that holds all values that are numbers and ``room`` (a share of its length) on both sides."""
    known = [value for value in values if math.isfinite(value)] or [0.0, show.factor]
    low, high = min(known), max(known)
    if show.metric.percent:
        lack = max(_MIN_SPAN - (high - low), 0.0) / 2
        low, high = max(low - lack, min(low, 0.0)), min(high + lack, 100.0)
    margin = room * ((high - low) or abs(high) or 1.0)
    return Scale(label=show.label(label), low=low - margin, high=high + margin, bins=bins)


def settled_scale(traces: Sequence[Trace], show: Shown, label: str, *, bins: int = 8) -> Scale:
    """Return the metric's axis over a run: what follows its first third is inside, and so is every best and last value.

    The start may be cut off, and what only traces reach that have failed.
    """
    last = max((trace.rounds[-1] for trace in traces), default=0)
    held = [(value, trace.failed) for trace in traces for value in _settled(trace, _SETTLED * last, show.metric)]
    scale = metric_scale(followed(held, show.metric), show, label, bins=bins)
    starts = [values[0] for trace in traces if not trace.failed for values in trace.values]
    worst = show.metric.worst(value for value in starts if math.isfinite(value))
    if worst is None or scale.holds(worst):
        return scale
    end = "starts" if show.metric.higher_is_better else "ends"
    edge = show.words(scale.clip(worst))
    return replace(scale, note=f"the y axis {end} at {edge}: the start, from {show.words(worst)}, is cut off")


def _settled(trace: Trace, since: float, metric: MetricFacts) -> list[float]:
    points = [(at, values) for at, values in zip(trace.rounds, trace.values, strict=True) if math.isfinite(values[0])]
    best = metric.best(values[0] for _, values in points)
    return [] if best is None else [best, *(x for at, xs in points if at >= min(since, points[-1][0]) for x in xs)]


def followed(values: Sequence[tuple[float, bool]], metric: MetricFacts) -> list[float]:
    """Return what an axis must hold of (value, whether that has failed): not what only failures reach."""
    worst = metric.worst(value for value, far in values if not far and math.isfinite(value))
    return [value for value, _ in values if worst is None or not metric.better(worst, value)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return at most ``count`` round numbers between two positive limits, as even as a log axis allows."""
    from matplotlib.ticker import MaxNLocator

    def inside(ticks: Sequence[float]) -> list[float]:
        return [tick for tick in ticks if low <= tick <= high]

    if high <= 3 * low:
        return inside([float(f"{tick:.6g}") for tick in MaxNLocator(count - 1).tick_values(low, high)])
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
    ticks = [inside([float(f"{step}e{decade}") for decade in decades for step in steps]) for steps in choices]
    return next((found for found in ticks if len(found) <= count), ticks[-1][:: -(-len(ticks[-1]) // count)])


def _tick(x: float) -> str:
    """Return a round number with a decimal prefix: ``15 k``, ``0.2``."""
    size, unit = next(((s, u) for s, u in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")) if x >= s), (1.0, ""))
    return f"{x / size:.4g}{unit}"
