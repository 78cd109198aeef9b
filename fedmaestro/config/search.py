"""What a tuning searches: settings, each with the values or the range that are tried (``fedmaestro tune --search``)."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedmaestro.config.base import Value, parse_assignment
from fedmaestro.errors import UserError, shown

FORM = "KEY=VALUE,VALUE,… or KEY=LOW..HIGH or KEY=log:LOW..HIGH, with ROW: in front for one row only"

_KEY = r"[a-z][a-z0-9-]*(?:\.[a-z0-9-]+)*"
_SEARCH = re.compile(rf"(?:(?P<row>.+):)?\s*(?P<key>{_KEY})\s*=(?P<values>.*)", re.DOTALL)
_RANGE = re.compile(r"(?P<log>log:)?(?P<low>[^,:]+?)\.\.(?P<high>[^,:]+)")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values to choose from, in the order in which they were declared."""

    values: tuple[Value, ...]

    def __str__(self) -> str:
        return ", ".join(map(text_of, self.values))

    def edge(self, value: Value) -> str | None:
        """Return whether a value is the ``smallest`` or the ``largest`` of several numbers; None: neither."""
        numbers = sorted({x for x in self.values if is_number(x)})
        if len(numbers) < 2 or len(numbers) < len(self.values):
            return None
        return {numbers[0]: "smallest", numbers[-1]: "largest"}.get(value)


@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers from ``low`` to ``high``, by their logarithm with ``log``; whole ones where both are."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __str__(self) -> str:
        return f"{text_of(self.low)} to {text_of(self.high)}{' (log)' if self.log else ''}"

    def edge(self, value: Value) -> str | None:
        """Return whether a number is in the ``lowest`` or the ``highest`` twentieth of the range; None: in neither."""
        assert isinstance(value, int | float)
        scale = math.log if self.log else float
        part = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return "lowest" if part <= _MARGIN else "highest" if part >= 1 - _MARGIN else None


_MARGIN = 0.05

Dimension = Choices | Range
Space = Mapping[str, Dimension]
"""What is searched, by the settings' dotted keys."""


def is_number(value: object) -> bool:
    """Return whether a value is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text_of(value: Value) -> str:
    """Return a value as people read it: at most six digits of a number."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def settings_text(settings: Mapping[str, Value]) -> str:
    """Return ``train.lr=0.1, server.momentum=0.5``."""
    return ", ".join(f"{key}={text_of(value)}" for key, value in settings.items())


def spaces_of(search: Mapping[str, Any] | Sequence[str], rows: Sequence[str]) -> dict[str, dict[str, Dimension]]:
    """Return what is searched for every row.

    Args:
        search: texts (``FORM``), or by setting what is tried: a list of values, or such a text without its key; under
            the name of a row, the same for that row, in place of what all rows try.
        rows: their names.

    Raises:
        UserError: a malformed text, an unknown row, a setting declared twice, a row without anything to search.
    """
    found: dict[tuple[str | None, str], Dimension] = {}
    for row, key, dimension in _from_mapping(search) if isinstance(search, Mapping) else map(_parsed, search):
        if row is not None and row not in rows:
            raise UserError(f"--search {row}:{key}: there is no row {row!r}: rows are {', '.join(rows)}")
        if (row, key) in found:
            raise UserError(
                f"--search {key}: declared twice{f' for row {row!r}' if row else ''}: give all values at once"
            )
        found[row, key] = dimension
    spaces = {row: {key: x for (of, key), x in found.items() if of is None} for row in rows}
    for (row, key), dimension in found.items():
        if row is not None:
            spaces[row][key] = dimension
    if empty := [row for row, space in spaces.items() if not space]:
        raise UserError(f"nothing is searched for row {empty[0]!r}: add --search {FORM}")
    return spaces


def _from_mapping(search: Mapping[str, Any]) -> Iterator[tuple[str | None, str, Dimension]]:
    for key, values in search.items():
        if isinstance(values, Mapping):
            yield from ((key, own, _declared(own, tried)) for own, tried in values.items())
        else:
            yield None, key, _declared(key, values)


def _declared(key: str, values: Any) -> Dimension:
    if isinstance(values, str):
        return _dimension(key, values)
    if isinstance(values, Choices | Range):
        return values
    if not isinstance(values, Sequence) or not all(isinstance(value, Value) for value in values):
        raise UserError(f"search {key!r}: give a list of values or a text like 'log:0.01..1', not {shown(values)}")
    return _choices(key, tuple(values))


def _parsed(text: str) -> tuple[str | None, str, Dimension]:
    parts = _SEARCH.fullmatch(text.strip())
    if parts is None:
        raise UserError(f"--search {shown(text)}: write {FORM}")
    row = parts["row"]
    return None if row is None else row.strip(), parts["key"], _dimension(parts["key"], parts["values"])


def _dimension(key: str, text: str) -> Dimension:
    if (ends := _RANGE.fullmatch(text.strip())) is not None:
        return _range(key, text, _value(key, ends["low"]), _value(key, ends["high"]), log=bool(ends["log"]))
    return _choices(key, tuple(_value(key, part) for part in text.split(",")))


def _value(key: str, text: str) -> Value:
    return parse_assignment(f"{key}={text.strip()}")[1]


def _choices(key: str, values: tuple[Value, ...]) -> Choices:
    if not values or "" in values:
        raise UserError(f"--search {key}: a value is empty: write {FORM}")
    if repeated := [value for value in values if values.count(value) > 1]:
        raise UserError(f"--search {key}: {text_of(repeated[0])} is given twice")
    return Choices(values=values)


def _range(key: str, text: str, low: Value, high: Value, *, log: bool) -> Range:
    if not (is_number(low) and is_number(high)):
        raise UserError(f"--search {key}={text}: a range goes from a number to a number")
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        raise UserError(f"--search {key}={text}: the first number must be below the second{', above 0' if log else ''}")
    return Range(low=low, high=high, log=log)


def grid(space: Space) -> list[dict[str, Value]]:
    """Return every combination of the declared values, the last setting changing fastest.

    Raises:
        UserError: a range, which has no end of values.
    """
    values = []
    for key, dimension in space.items():
        if isinstance(dimension, Range):
            raise UserError(
                f"--search {key}={dimension}: a grid needs values (KEY=0.1,0.2,…); ranges need --sampler optuna"
            )
        values.append(dimension.values)
    return [dict(zip(space, point, strict=True)) for point in product(*values)]


def corners(space: Space) -> list[dict[str, Value]]:
    """Return few points in which every declared value, and both ends of every range, occur."""
    sides = {key: x.values if isinstance(x, Choices) else (x.low, x.high) for key, x in space.items()}
    longest = max(map(len, sides.values()))
    return [{key: side[min(i, len(side) - 1)] for key, side in sides.items()} for i in range(longest)]
