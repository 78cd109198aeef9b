"""Ranks per layer over time as pictures."""

from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from reports import svg_texts

from fedmaestro.report import rank_figure, svg_text

LENET = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84, "fc3": 10}
TIERS = {"high": 1.0, "mid": 0.5, "low": 0.15}


def make_history(
    full: dict[str, int], tiers: dict[str, float] = TIERS, last: int = 30
) -> list[tuple[float, dict[str, dict[str, int]]]]:
    """Ranks that fall to a third, later layers later."""

    def rank(share: float, layer: int, size: int, epoch: int) -> int:
        return max(round(share * size * max(1 - max(epoch - layer % 7, 0) / 30, 1 / 3)), 1)

    return [
        (e, {t: {name: rank(x, i, size, e) for i, (name, size) in enumerate(full.items())} for t, x in tiers.items()})
        for e in range(last + 1)
    ]


def texts(figure: Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_one_panel_per_layer_with_the_tiers_in_order() -> None:
    svg = svg_text(rank_figure(make_history(LENET), full={"fc1": 120}, title="a & b"))
    shown = svg_texts(svg)
    titles = ["conv1 (largest rank seen 6)", "conv2 (largest rank seen 16)", "fc1 (full rank 120)"]
    assert [text for text in shown if text in titles] == titles
    assert [text for text in shown if text in TIERS] == list(TIERS)
    assert shown.count("Communication round") == 3, "below the last panel of each column"
    assert {"a & b", "Rank", "Tier"} <= set(shown)
    assert "<image" not in svg


def test_the_last_ranks_of_one_model_stand_above_its_panels() -> None:
    shown = texts(rank_figure(make_history(LENET, {"": 1.0}), full=LENET, x_label="Epoch"))
    assert {"conv1 (2 of full rank 6)", "fc1 (40 of full rank 120)", "Epoch"} <= set(shown)
    assert "Tier" not in shown


def test_a_rank_holds_until_the_next_moment() -> None:
    history = [(float(moment), {"a": {"fc": rank}}) for moment, rank in ((0, 8), (10, 4), (12, 2))]
    (axes,) = rank_figure(history).axes
    (steps,) = axes.patches
    values, edges, _ = steps.get_data()
    assert values.tolist() == [8, 4, 2]
    assert edges.tolist() == [0, 10, 12, 13]


@pytest.mark.parametrize("count", [9, 400])
def test_many_layers_are_rows_of_a_heat_map(count: int) -> None:
    full = {f"block{index // 6}.attention.layer{index}": 512 for index in range(count)}
    svg = svg_text(rank_figure(make_history(full, {"": 1.0}), x_label="Epoch"))
    shown = svg_texts(svg)
    rows = [row for row in shown if row.endswith("(512)")]
    assert rows[0] == "block0.attention.layer0 (512)"
    assert len(rows) == (count if count <= 130 else 100), "rows without a label rather than labels on each other"
    assert {"Epoch", "Rank (% of the largest rank seen)"} <= set(shown)
    assert any(text.startswith("layers from input to output") for text in shown)
    assert shown.count("171") == len(rows), "the last rank of each row"
    assert "<image" in svg
    assert len(svg) < 400_000


@pytest.mark.parametrize("history", [[], [(0, {})], [(0, {}), (1, {"a": {}})]])
def test_an_empty_history_says_so(history: list[tuple[float, dict[str, Any]]]) -> None:
    assert "no ranks have been recorded yet" in texts(rank_figure(history))
