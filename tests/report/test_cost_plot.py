"""The accuracy–cost curve as a picture."""

import math
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import svg_texts

from fedmaestro.report import cost_figure, save_figure, svg_text
from fedmaestro.report.cost_plot import value_scale
from fedmaestro.runs.records import CostCurve, CostPoint, MetricFacts

NAMES = [f"{method}, {choice} ranks" for method in ("Maestro", "dense + SVD") for choice in ("searched", "uniform")]
BUDGETS = (1.0, 0.85, 0.7, 0.55, 0.45, 0.35, 0.27, 0.2, 0.15, 0.11, 0.08, 0.05)
FACTS = {
    "accuracy": MetricFacts(),
    "perplexity": MetricFacts(name="perplexity", higher_is_better=False, percent=False),
    "r2": MetricFacts(name="r2", percent=False),
}


def make_point(macs: float, value: float, latency_ms: float | None = None) -> CostPoint:
    return CostPoint(params=1, macs=int(macs), latency_ms=latency_ms, value=value, loss=0.1)


def make_curve(series: dict[str, list[CostPoint]], metric: str, dense: CostPoint | None = None) -> CostCurve:
    facts = {"metric": metric, "facts": FACTS[metric], "device": "cpu, 1 thread, batch 64"}
    return CostCurve(**facts, seed=0, dense_params=1, dense_macs=1, series=series, dense=dense)


def falling(metric: str = "accuracy", *, macs: float = 281640, latency: bool = True) -> CostCurve:
    """Four series of twelve budgets; the later ones fall earlier."""

    def value(strength: float, budget: float) -> float:
        fall = (strength * (1 / budget - 1)) ** 2.2
        return max(0.1, 1 - 0.02 - fall / 2) if metric == "accuracy" else min(27.5 * math.exp(fall), 5e4)

    def point(strength: float, budget: float) -> CostPoint:
        return make_point(macs * budget, value(strength, budget), 2 * (0.4 + 0.6 * budget) if latency else None)

    series = {
        name: [point(strength, budget) for budget in BUDGETS]
        for name, strength in zip(NAMES, (0.03, 0.06, 0.2, 0.4), strict=True)
    }
    return make_curve(series, metric, make_point(macs, 0.99 if metric == "accuracy" else 26.9, 1.7))


def test_two_panels_with_units_every_series_and_the_dense_model(tmp_path: Path) -> None:
    png, svg = save_figure(cost_figure(falling(), "mnist & co"), tmp_path / "plots" / "curve")
    texts = svg_texts(svg)
    assert {"mnist & co", "Test accuracy (%)", "MACs per example (log scale)", "20 k", "100 k"} <= set(texts)
    assert {"Measured latency (ms, log scale)", "cpu, 1 thread, batch 64", "dense model: 99.0 %"} <= set(texts)
    assert [text for text in texts if text in NAMES] == NAMES
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1800, 690)


def test_a_series_that_collapses_is_cut_and_the_legend_says_how_far() -> None:
    texts = svg_texts(svg_text(cost_figure(falling())))
    legend = [texts.index(name) for name in NAMES]
    assert "cut off, down to 10.0 %" in texts[legend[-1] + 1]
    ticks = [float(text) for text in texts[: texts.index("Test accuracy (%)")] if text.replace(".", "").isdigit()]
    assert 80 < min(ticks) < max(ticks) < 100


def test_perplexity_is_logarithmic_and_lower_is_better() -> None:
    texts = svg_texts(svg_text(cost_figure(falling("perplexity", macs=3.4e9, latency=False))))
    assert {"Test perplexity (log scale, lower is better)", "dense model: 26.9", "1 G", "500 M"} <= set(texts)
    assert any("cut off, up to 50.0 k" in text for text in texts)
    assert "latency was not measured" in texts


@pytest.mark.parametrize("series", [{}, {"a": []}])
@pytest.mark.parametrize("metric", FACTS)
def test_nothing_measured_says_so(metric: str, series: dict[str, list[CostPoint]]) -> None:
    texts = svg_texts(svg_text(cost_figure(make_curve(series, metric))))
    assert any("no model has been measured yet" in text for text in texts)


def test_an_error_of_zero_has_a_place() -> None:
    scale = value_scale(make_curve({"a": [make_point(10, 0.0), make_point(5, 2.0)]}, "perplexity"))
    assert not scale.log
    assert scale.holds(0.0)
    assert scale.holds(2.0)


@pytest.mark.parametrize("metric", FACTS)
@given(st.data())
def test_limits_never_hide_the_leading_models(metric: str, data: st.DataObject) -> None:
    macs = st.integers(10**3, 10**10)
    values = {"accuracy": st.floats(0, 1), "perplexity": st.floats(1, 1e6), "r2": st.floats(-10, 1)}[metric]
    drawn = data.draw(st.lists(st.tuples(macs, values), min_size=1, max_size=20))
    facts, points = FACTS[metric], [make_point(m, v) for m, v in drawn]
    scale = value_scale(make_curve({"a": points}, metric))
    smallest, largest = min(drawn)[0], max(drawn)[0]
    for size in (smallest * (largest / smallest) ** 0.25, largest):
        leading = facts.best(point.value for point in points if point.macs <= size * (1 + 1e-9))
        assert leading is not None
        assert scale.holds(100 * leading if facts.percent else leading)
