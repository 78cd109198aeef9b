"""The pictures of a comparison."""

import math
from itertools import combinations, pairwise

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from reports import make_results, make_row

from fedmaestro.report.compare_figure import failed
from fedmaestro.report.compare_page import PLOTS
from fedmaestro.report.figure import plot_style, tier_colors
from fedmaestro.report.labels import place_labels
from fedmaestro.runs.records import Results


@plot_style()
def draw(name: str, results: Results) -> Figure:
    figure = PLOTS[name](results)
    figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def labels(axes: Axes) -> list[str]:
    """What stands beside the points or lines of a panel."""
    return [text.get_text() for text in axes.texts if isinstance(text, Annotation)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def panel(figure: Figure, name: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(f"{name}\n"))


def curve(axes: Axes, index: int = 0) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.lines[index].get_xydata()]


@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 5) for name in PLOTS), ("tier_accuracy", 20), ("accuracy_rounds", 1)],
)
def test_every_picture_names_every_strategy(name: str, count: int) -> None:
    results = make_results(count)
    figure = draw(name, results)
    shown = "\n".join(texts(figure))
    lod_only = name in ("tail_energy", "factor_bias")
    for row in results.strategies:
        assert (row.name in shown) == (row.form == "lod" or not lod_only)
    assert "mnist · seeds 0, 1, 2" in shown


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tier_accuracy", {"Final test accuracy (%)"}),
        ("worst_mean", {"Final test accuracy, mean of tiers (%)", "Final test accuracy, worst tier (%)"}),
        ("accuracy_rounds", {"Communication round", "Mean accuracy of tiers (%)"}),
        ("accuracy_bytes", {"Traffic of all devices, down and up (MB)", "Mean accuracy of tiers (%)"}),
        ("accuracy_time", {"Virtual time (h)", "Mean accuracy of tiers (%)"}),
        ("tail_energy", {"Communication round", "Tail energy (% of Σσ², log scale)"}),
        ("factor_bias", {"Communication round", "Factor bias (% of the round's update)"}),
    ],
)
@pytest.mark.parametrize("count", [3, 6])
def test_axes_have_units(name: str, wanted: set[str], count: int) -> None:
    shown = {line for text in texts(draw(name, make_results(count))) for line in text.split("\n")}
    assert wanted <= shown


def test_tiers_are_dots_with_bars_largest_first_best_strategy_on_top() -> None:
    results = make_results([make_row("worse", 1), make_row("better", 0)])
    figure = draw("tier_accuracy", results)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["better", "worse"]
    assert axes.yaxis_inverted()
    assert legend(figure) == ["flagship", "mid", "minimal"]
    dots = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert [round(float(line.get_xdata()[0]), 6) for line in dots] == [97.2, 96.2, 95.2, 96.2, 95.2, 94.2]
    assert [line.get_color() for line in dots[:3]] == tier_colors(3)
    heights = [float(line.get_ydata()[0]) for line in dots]
    assert all(left < right for left, right in pairwise(heights)), "no dot lies on another"
    bars = [line for line in axes.lines if line.get_color() == tier_colors(3)[0] and len(line.get_xdata()) == 2]
    assert [round(float(x), 6) for x in bars[0].get_xdata()] == [97.0, 97.4]
    assert {"97.20", "96.20", "95.20"} & set(texts(figure)) == {"96.20", "95.20"}, "mean and worst in numbers"


def test_rows_that_lack_seeds_say_so() -> None:
    results = make_results([make_row("a", 1, seeds=[]), make_row("b", 0, seeds=[1]), make_row("c", 2)])
    (axes,) = draw("tier_accuracy", results).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b\n1 of 3 seeds", "c", "a\n0 of 3 seeds"]
    assert legend(draw("accuracy_rounds", results)) == ["b\n 96.20 % (1 of 3 seeds)", "c\n 94.20 ± 0.20 %"]
    assert "mnist · seeds 0, 1, 2 · incomplete" in texts(draw("worst_mean", results))


def test_a_few_lines_share_a_panel_in_their_own_colours() -> None:
    figure = draw("accuracy_rounds", make_results(3))
    (axes,) = figure.axes
    assert legend(figure) == ["nested\n 96.20 ± 0.20 %", "zero-pad\n 95.20 ± 0.20 %", "heterofl\n 94.20 ± 0.20 %"]
    keys = [line.get_color() for line in figure.legends[0].get_lines()]
    assert keys == [line.get_color() for line in axes.lines[::2]]
    assert curve(axes)[-1] == (20, pytest.approx(96.2))
    assert len({line.get_color() for line in axes.lines}) == 3
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(96.5), "the best evaluation, 0.1 % above the last, and one deviation"


def test_more_lines_have_a_panel_each_with_the_others_in_grey() -> None:
    figure = draw("accuracy_rounds", make_results(7))
    assert len(figure.axes) == 7
    assert [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes][:3] == ["nested", "zero-pad", "heterofl"]
    grey, own = panel(figure, "zero-pad").lines[:2]
    assert sum(math.isnan(x) for x in grey.get_xdata()) == 6, "a gap after each of the others"
    assert own.get_ydata()[-1] == pytest.approx(95.2)
    assert own.get_color() != panel(figure, "heterofl").lines[1].get_color(), "families differ"
    assert [axes.get_ylim() for axes in figure.axes] == [figure.axes[0].get_ylim()] * 7
    assert legend(figure) == ["rank family", "width family", "± standard deviation over seeds", "the other strategies"]


@pytest.mark.parametrize(("cheap", "scale"), [(0.24, "log"), (0.26, "linear")])
@pytest.mark.parametrize(("name", "unit"), [("accuracy_bytes", "MB"), ("accuracy_time", "h")])
def test_costs_that_differ_much_are_drawn_on_a_log_axis(name: str, unit: str, cheap: float, scale: str) -> None:
    (axes,) = draw(name, make_results([make_row("a", 0), make_row("b", 1, cost=cheap)])).axes
    assert axes.get_xscale() == scale
    assert axes.get_xlabel().endswith(f"({unit}, log scale)" if scale == "log" else f"({unit})")
    start = axes.transData.transform((0.0, 50.0))[0]
    assert math.isfinite(start) == (scale == "linear"), "a log axis has no place for the start"
    ends = sorted(curve(axes, index)[-1][0] for index in (0, 2))
    assert ends == pytest.approx([30 * cheap, 30] if unit == "MB" else [2 * cheap, 2])


def test_a_strategy_that_fails_does_not_squash_the_others() -> None:
    rows = [make_row(f"m{rank}", rank / 2) for rank in range(6)] + [make_row("oracle", 40)]
    results = make_results(rows)
    assert [row.name for row in failed(results)] == ["oracle"]
    (axes,) = draw("tier_accuracy", results).axes
    assert axes.get_xlim()[0] > 90
    assert {"57.2 %", "56.2 %", "55.2 %"} <= set(texts(axes.figure)), "what lies beyond is a number at the edge"
    assert "arrows: values beyond the axis" in "; ".join(texts(axes.figure))
    (axes,) = draw("worst_mean", results).axes
    assert axes.get_xlim()[0] > 90
    assert labels(axes) == [f"m{rank}" for rank in range(6)]
    note = "grey line: all tiers equally good; beyond the axes (mean, worst): oracle (56.2 %, 55.2 %)"
    assert note in texts(axes.figure)
    lines = draw("accuracy_rounds", results)
    assert lines.axes[0].get_ylim()[0] > 60
    assert labels(panel(lines, "oracle")) == ["below the axis"]
    assert not any(labels(axes) for axes in lines.axes[:-1])


_points = st.lists(st.tuples(st.integers(20, 580), st.integers(20, 380)), min_size=1, max_size=20, unique=True)


@given(_points, st.integers(30, 110))
def test_labels_do_not_overlap(points: list[tuple[int, int]], width: int) -> None:
    corners = place_labels(points, [(width, 11)] * len(points), (0, 0, 900, 700))
    boxes = [(x, y, x + width, y + 11) for x, y in corners]
    for left, right in combinations(boxes, 2):
        assert left[2] <= right[0] or right[2] <= left[0] or left[3] <= right[1] or right[3] <= left[1]
    for box in boxes:
        assert 0 <= box[0] <= box[2] <= 900
        assert 0 <= box[1] <= box[3] <= 700
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in points)
