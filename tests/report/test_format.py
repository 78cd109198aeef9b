import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.report import format_bytes, format_count, format_percent, format_seconds

COUNT = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def value(text: str, units: dict[str, float]) -> float:
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) ?([A-Za-z]*)", text))


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (7, "7"),
        (999.7, "1.00 k"),
        (61706, "61.7 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
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
    ("s", "text"),
    [
        (0, "0 s"),
        (0.001, "< 0.01 s"),
        (0.5, "0.50 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (86399, "1 d"),
        (-12.5, "-12.5 s"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_seconds(s: float | None, text: str) -> None:
    assert format_seconds(s) == text


def test_bytes_are_decimal_and_shares_percent() -> None:
    assert [format_bytes(n) for n in (0, 999, 12345, None)] == ["0 B", "999 B", "12.3 kB", "–"]
    assert [format_percent(x) for x in (0.9779, 1.0, None, math.nan)] == ["97.8 %", "100.0 %", "–", "–"]
    assert [format_percent(0.97786, digits) for digits in (0, 2)] == ["98 %", "97.79 %"]


@given(st.integers(1, 10**15), st.floats(1, 1e8))
def test_what_is_printed_is_close_enough(n: int, s: float) -> None:
    assert value(format_count(n), COUNT) == pytest.approx(n, rel=0.0051)
    assert value(format_seconds(s), SECONDS) == pytest.approx(s, rel=0.025)
