import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.report import format_bytes, format_count, format_percent, format_seconds

_COUNT = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _value(text: str, units: dict[str, float]) -> float:
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) ?([A-Za-z]*)", text))


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.7, "1.00 k"),
        (1000, "1.00 k"),
        (61706, "61.7 k"),
        (281640, "282 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (2_314_000, "2.31 M"),
        (-61706, "-61.7 k"),
        (9.996, "10.0"),
        (0.5, "0.50"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_count(n: float | None, text: str) -> None:
    assert format_count(n) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (12345, "12.3 kB"), (74.1e6, "74.1 MB"), (None, "–")]
)
def test_bytes_are_decimal(n: float | None, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (0, "0 s"),
        (0.001, "< 0.01 s"),
        (0.5, "0.50 s"),
        (12.5, "12.5 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (86399, "1 d"),
        (273_600, "3 d 4 h"),
        (-12.5, "-12.5 s"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_seconds(s: float | None, text: str) -> None:
    assert format_seconds(s) == text


def test_percent() -> None:
    assert [format_percent(x) for x in (0.9779, 1.0, 0.0, None, math.nan)] == [
        "97.8 %",
        "100.0 %",
        "0.0 %",
        "–",
        "–",
    ]


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_counts_and_bytes_keep_the_order(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert _value(format_count(small), _COUNT) <= _value(format_count(large), _COUNT)
    assert _value(format_bytes(small), _BYTES) <= _value(format_bytes(large), _BYTES)


@given(st.integers(1, 10**15))
def test_three_digits_are_close_enough(n: int) -> None:
    assert _value(format_count(n), _COUNT) == pytest.approx(n, rel=0.0051)


@given(st.floats(0.01, 1e8), st.floats(0.01, 1e8))
def test_seconds_keep_the_order(a: float, b: float) -> None:
    small, large = sorted((a, b))
    # A unit rounds half away or to even at its border: one part in a thousand is below what is printed.
    assert _value(format_seconds(small), _SECONDS) <= _value(format_seconds(large), _SECONDS) + 1e-9


@given(st.floats(1, 1e8))
def test_seconds_are_close_enough(s: float) -> None:
    assert _value(format_seconds(s), _SECONDS) == pytest.approx(s, rel=0.025)


def test_percent_with_other_digits() -> None:
    assert [format_percent(0.97786, digits) for digits in (0, 2)] == ["98 %", "97.79 %"]
