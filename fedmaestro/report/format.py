"""Numbers as people read them; shared by the pages, the plots and the command line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmaestro.runs.records import ACCURACY, MetricFacts, Updates

MISSING = "–"  # what a table shows where a number is unknown or not a number

_COUNT_UNITS = ("", " k", " M", " G", " T")
_BYTE_UNITS = (" B", " kB", " MB", " GB", " TB", " PB")


def format_count(n: float | None) -> str:
    """Return ``n`` with three significant digits and a decimal prefix: ``61.7 k``; 0 to 999 stay whole."""
    return _scaled(n, _COUNT_UNITS)


def format_bytes(n: float | None) -> str:
    """Return ``n`` bytes with a decimal unit (1 kB = 1000 B, as network rates count): ``12.3 kB``."""
    return _scaled(n, _BYTE_UNITS)


def lost_text(updates: Updates | None) -> str:
    """Return ``12 of 600``: updates that do not count, of those that were asked for; ``–`` where none was."""
    return f"{updates.lost:,} of {updates.sampled:,}" if updates and updates.sampled else MISSING


def lost_share(updates: Updates | None) -> float:
    """Return the share of updates that do not count; nan where none was asked for."""
    return updates.lost / updates.sampled if updates and updates.sampled else math.nan


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction (0..1) as a percentage with ``digits`` decimals: ``97.8 %``."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return f"{100 * fraction:.{digits}f} %"


def format_privacy(epsilon: float | None, delta: float | None) -> str:
    """Return what differential privacy a model has: ``ε = 3.21 at δ = 1e-05``."""
    if epsilon is None:
        return MISSING
    return f"ε = {epsilon:.3g}" + (f" at δ = {delta:.2g}" if delta is not None else "")


@dataclass(frozen=True)
class Shown:
    """How values of a metric are shown: shares in percent, others as they are."""

    metric: MetricFacts = ACCURACY

    @property
    def name(self) -> str:
        """The metric in words."""
        return self.metric.name

    @property
    def factor(self) -> float:
        """Shown value by value."""
        return 100.0 if self.metric.percent else 1.0

    @property
    def unit(self) -> str:
        """What stands behind a shown value."""
        return " %" if self.metric.percent else ""

    @property
    def heading(self) -> str:
        """``accuracy %``."""
        return f"{self.name}{self.unit}"

    def label(self, what: str, *notes: str) -> str:
        """Return the label of an axis: ``Test accuracy (%)``, ``Test rmse (lower is better)``."""
        label, unit = what.format(metric=self.name), ["%"] * self.metric.percent
        known = [*unit, *notes, *["lower is better"] * (not self.metric.higher_is_better)]
        return f"{label} ({', '.join(known)})" if known else label

    def number(self, value: float | None, digits: int = 2) -> str:
        """Return a value without its unit: ``digits`` decimals in percent, four significant digits otherwise."""
        if value is None or not math.isfinite(value):
            return MISSING
        return f"{100 * value:.{digits}f}" if self.metric.percent else f"{value:.4g}"

    def text(self, value: float | None, digits: int = 1) -> str:
        """Return a value with its unit."""
        number = self.number(value, digits)
        return number if number == MISSING else f"{number}{self.unit}"

    def words(self, shown: float) -> str:
        """Return what is shown already (in percent, if it is a share), with few digits and its unit."""
        if self.metric.percent:
            return f"{shown:.1f} %"
        return f"{shown:.3g}" if abs(shown) < 999.5 else format_count(shown)


def format_seconds(s: float | None) -> str:
    """Return seconds as their two largest units: ``12.5 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if s is None or not math.isfinite(s):
        return MISSING
    if s < 0:
        return f"-{format_seconds(-s)}"
    if s < 0.01:
        return "< 0.01 s" if s else "0 s"
    if s < 59.95:  # above, one decimal would print 60.0 s
        return f"{s:.1f} s" if s >= 9.995 else f"{s:.2f} s"
    if round(s) < 3600:
        return _two_units(round(s), 60, "min", "s")
    return _two_units(round(s / 60), 60, "h", "min") if s < 86370 else _two_units(round(s / 3600), 24, "d", "h")


def _two_units(small: int, per_large: int, large_name: str, small_name: str) -> str:
    large, rest = divmod(small, per_large)
    return f"{large} {large_name} {rest} {small_name}" if rest else f"{large} {large_name}"


def _scaled(n: float | None, units: Sequence[str]) -> str:
    """Divide by 1000 until three significant digits print below 1000, and append the unit."""
    if n is None or not math.isfinite(n):
        return MISSING
    size, unit, digits = abs(n), 0, 0
    while size >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    if unit or size != int(size):
        digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{'-' if n < 0 else ''}{size:.{digits}f}{units[unit]}"
