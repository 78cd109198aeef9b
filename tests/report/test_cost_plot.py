"""The accuracy–cost curve as a picture."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import svg_texts

from fedmaestro.report import accuracy_cost_svg, plot_accuracy_cost
from fedmaestro.report.cost_plot import METRICS, Point, score_limits

NAMES = [f"{method}, {choice} ranks" for method in ("Maestro", "dense + SVD") for choice in ("searched", "uniform")]
BUDGETS = (1.0, 0.85, 0.7, 0.55, 0.45, 0.35, 0.27, 0.2, 0.15, 0.11, 0.08, 0.05)


def make_curve(metric: str = "accuracy", *, latency: bool = True, macs: float = 281640) -> dict[str, Any]:
    """Four series of twelve budgets; the later ones fall earlier."""

    def value(strength: float, budget: float) -> float:
        fall = (strength * (1 / budget - 1)) ** 2.2
        return max(0.1, 1 - 0.02 - fall / 2) if metric == "accuracy" else min(27.5 * math.exp(fall), 5e4)

    def point(strength: float, budget: float) -> dict[str, Any]:
        return {
            "macs": int(macs * budget),
            "params": int(61706 * budget),
            "latency_ms": 2 * (0.4 + 0.6 * budget) if latency else None,
            "value": value(strength, budget),
            "loss": 0.1,
            "ranks": {"fc1": int(120 * budget)},
        }

    series = {
        name: [point(strength, budget) for budget in BUDGETS]
        for name, strength in zip(NAMES, (0.03, 0.06, 0.2, 0.4), strict=True)
    }
    dense = {"macs": macs, "latency_ms": 1.7 if latency else None, "value": 0.99 if metric == "accuracy" else 26.9}
    return {"metric": metric, "device": "cpu, 1 thread, batch 64", "series": series, "dense": dense}


def test_two_panels_with_units_every_series_and_the_dense_model(tmp_path: Path) -> None:
    png, svg = plot_accuracy_cost(make_curve(), tmp_path / "plots" / "curve", "mnist & co")
    texts = svg_texts(svg)
    assert {"mnist & co", "Test accuracy (%)", "MACs per example (log scale)", "20 k", "100 k"} <= set(texts)
    assert {"Measured latency (ms, log scale)", "cpu, 1 thread, batch 64", "dense model: 99.0 %"} <= set(texts)
    assert [text for text in texts if text in NAMES] == NAMES
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1800, 690)


def test_a_series_that_collapses_is_cut_and_the_note_says_how_far() -> None:
    texts = svg_texts(accuracy_cost_svg(make_curve()))
    assert any(text.startswith("the y axis starts at") and "down to 10.0 %" in text for text in texts)
    legend = [texts.index(name) for name in NAMES]
    assert "cut off, down to 10.0 %" in texts[legend[-1] + 1], "the legend says which series goes on"
    ticks = [float(text) for text in texts[: texts.index("Test accuracy (%)")] if text.replace(".", "").isdigit()]
    assert 80 < min(ticks) < max(ticks) < 100


def test_perplexity_is_logarithmic_and_lower_is_better() -> None:
    texts = svg_texts(accuracy_cost_svg(make_curve("perplexity", macs=3.4e9)))
    assert {"Test perplexity (log scale, lower is better)", "dense model: 26.9", "1 G", "500 M"} <= set(texts)
    assert any(text.startswith("the y axis ends at") and "up to 50.0 k" in text for text in texts)


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [{"macs": 10, "value": None}]}])
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_measured_says_so(metric: str, series: dict[str, Any]) -> None:
    svg = accuracy_cost_svg({"metric": metric, "device": "cpu", "series": series, "dense": None})
    assert any("no model has been measured yet" in text for text in svg_texts(svg))


_MACS, _VALUES = st.floats(1e3, 1e10), {"accuracy": st.floats(0, 100), "perplexity": st.floats(1, 1e6)}


@pytest.mark.parametrize("metric", METRICS)
@given(st.data())
def test_limits_never_hide_the_leading_models(metric: str, data: st.DataObject) -> None:
    rule = METRICS[metric]
    drawn = data.draw(st.lists(st.tuples(_MACS, _VALUES[metric]), min_size=1, max_size=20))
    points = [Point(macs=m, latency_ms=math.nan, shown=v, score=rule.score(v)) for m, v in drawn]
    low, high = score_limits(rule, points, None)
    assert high - low >= rule.min_span
    smallest, largest = min(drawn)[0], max(drawn)[0]
    quarter = smallest * (largest / smallest) ** 0.25
    for point in points:
        assert point.score <= high
    for budget in (quarter, largest):
        assert low <= max(point.score for point in points if point.macs <= budget * (1 + 1e-9))
