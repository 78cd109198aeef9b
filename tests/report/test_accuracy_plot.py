import math
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from fedmaestro.report import plot_tier_accuracy
from fedmaestro.report.accuracy_plot import y_limits
from fedmaestro.report.curves import Curve, tier_curves, time_unit
from fedmaestro.report.figure import tier_colors

MakeRounds = Callable[..., list[dict[str, Any]]]
TIERS = ["flagship", "high", "mid", "low", "minimal"]


def _texts(svg: Path) -> list[str]:
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_two_panels_with_units_and_the_tiers_in_order(make_rounds: MakeRounds, tmp_path: Path) -> None:
    png, svg = plot_tier_accuracy(make_rounds(), tmp_path / "plots" / "tier_accuracy", "mnist & co")
    texts = _texts(svg)
    assert {"mnist & co", "Test accuracy (%)", "Communication round", "Virtual time (h)"} <= set(texts)
    legend = [text.split() for text in texts if text.split()[-1] in TIERS]
    assert legend == [[f, t] for f, t in zip(["97.8", "97.6", "97.4", "97.1", "94.4"], TIERS, strict=True)]
    assert any(text.startswith("the y axis starts at") and "from 10.0 %" in text for text in texts)
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1740, 660)


def test_outputs_are_reproducible_and_leave_matplotlib_alone(make_rounds: MakeRounds, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = plot_tier_accuracy(make_rounds(), tmp_path / "a.b")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        second = plot_tier_accuracy(make_rounds(), tmp_path / "c")
    assert first == (tmp_path / "a.b.png", tmp_path / "a.b.svg")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "<metadata" not in first[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [1, 2, 8, 10])
def test_one_to_many_tiers(make_rounds: MakeRounds, tmp_path: Path, count: int) -> None:
    names = [f"_t${index}$" for index in range(count)]  # matplotlib hides _names and reads $ as mathematics
    rounds = make_rounds(names, [0.9 - 0.01 * index for index in range(count)], every=1)
    _, svg = plot_tier_accuracy(rounds, tmp_path / "plot")
    assert [text.split()[-1] for text in _texts(svg) if text.endswith("$")] == names


def test_one_evaluated_round_shows_markers(make_rounds: MakeRounds, tmp_path: Path) -> None:
    _, svg = plot_tier_accuracy(make_rounds(last=0), tmp_path / "plot")
    texts = _texts(svg)
    assert "no virtual time" in texts
    assert not any(text.startswith("Virtual time") for text in texts)
    assert "-0.45" not in texts, "rounds are whole numbers"
    assert svg.read_text(encoding="utf-8").count("<use ") >= 5


def test_nan_accuracies_leave_gaps(make_rounds: MakeRounds, tmp_path: Path) -> None:
    rounds = make_rounds(virtual_seconds=0.0)
    rounds[60]["tiers"]["mid"]["accuracy"] = math.nan
    for row in rounds:
        if row["tiers"]:
            row["tiers"]["low"]["accuracy"] = None
    _, svg = plot_tier_accuracy(rounds, tmp_path / "plot")
    legend = {text.split()[-1]: text.split()[0] for text in _texts(svg) if text.split()[-1] in TIERS}
    assert legend["mid"] == "97.4"
    assert legend["low"] == "–"


@pytest.mark.parametrize("rounds", [[], [{"round": 0}], [{"round": 0, "tiers": {"a": {"accuracy": math.nan}}}]])
def test_nothing_evaluated_says_so(rounds: list[dict[str, Any]], tmp_path: Path) -> None:
    _, svg = plot_tier_accuracy(rounds, tmp_path / "plot")
    assert "no round has been evaluated yet" in _texts(svg)


def test_a_name_in_another_script_or_with_markup(make_rounds: MakeRounds, tmp_path: Path) -> None:
    names = ["旗舰", '<b>&"', "a name that is far too long to fit beside a plot"]
    _, svg = plot_tier_accuracy(make_rounds(names, [0.9, 0.8, 0.7]), tmp_path / "plot")
    shown = [text.split(maxsplit=1)[1] for text in _texts(svg) if text[:2] in ("90", "80", "70") and " " in text]
    assert shown == [names[0], names[1], names[2][:27] + "…"]


def test_virtual_time_counts_rounds_that_were_not_evaluated(make_rounds: MakeRounds) -> None:
    curve = tier_curves(make_rounds(last=10, virtual_seconds=2.0))[0]
    assert curve.rounds == (0, 5, 10)
    assert curve.virtual_seconds == (0.0, 10.0, 20.0)


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.5, "s"), (119, "s"), (120, "min"), (7199, "min"), (7200, "h"), (2e5, "days")]
)
def test_time_unit(seconds: float, unit: str) -> None:
    assert time_unit(seconds)[0] == unit


_accuracies = st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=20)


@given(st.lists(_accuracies, min_size=1, max_size=8))
def test_limits_never_hide_what_follows_the_start(values: list[list[float]]) -> None:
    curves = [Curve(str(i), tuple(range(len(v))), (0.0,) * len(v), tuple(v)) for i, v in enumerate(values)]
    low, high = y_limits(curves)
    last = max(curve.rounds[-1] for curve in curves)
    assert high - low >= 1.9
    for curve in curves:
        late = [a for n, a in zip(curve.rounds, curve.accuracy, strict=True) if n >= last / 4]
        for value in [*late, curve.final, curve.best]:
            assert math.isnan(value) or low <= 100 * value <= high


@pytest.mark.parametrize("count", range(1, 9))
def test_colours_are_ordered_and_stand_out_from_white(count: int) -> None:
    def luminance(color: str) -> float:
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    levels = [luminance(color) for color in tier_colors(count)]
    assert all(left < right for left, right in pairwise(levels))
    assert all(1.05 / (level + 0.05) >= 3 for level in levels)
