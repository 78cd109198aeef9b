"""Ranks per layer over time as pictures."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import svg_texts

from fedmaestro.report import plot_ranks, plot_tier_ranks, rank_svg, tier_rank_svg
from fedmaestro.report.rank_plot import hold, spread

LENET = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84, "fc3": 10}
TIERS = {"high": 1.0, "mid": 0.5, "low": 0.15}


def make_history(full: dict[str, int], last: int = 30) -> list[tuple[float, dict[str, int]]]:
    """Ranks that fall to a third, later layers later."""

    def rank(layer: int, epoch: int) -> float:
        return max(1 - max(epoch - layer % 7, 0) / 30, 1 / 3)

    return [
        (epoch, {name: round(size * rank(layer, epoch)) for layer, (name, size) in enumerate(full.items())})
        for epoch in range(last + 1)
    ]


def make_tier_history(full: dict[str, int]) -> list[tuple[float, dict[str, dict[str, int]]]]:
    return [
        (epoch, {tier: {n: max(round(share * r), 1) for n, r in ranks.items()} for tier, share in TIERS.items()})
        for epoch, ranks in make_history(full, last=12)
    ]


def test_a_few_layers_are_lines_with_their_last_ranks_beside_them(tmp_path: Path) -> None:
    _, svg = plot_ranks(make_history(LENET), tmp_path / "plots" / "ranks", full=LENET, x_label="Epoch", title="a & b")
    text = svg.read_text(encoding="utf-8")
    texts = svg_texts(text)
    assert {"a & b", "Epoch", "Rank (% of the full rank)"} <= set(texts)
    assert {"conv1  2 of 6", "conv2  5 of 16", "fc1  40 of 120", "fc2  28 of 84", "fc3  3 of 10"} <= set(texts)
    assert "<image" not in text


@pytest.mark.parametrize("count", [9, 400])
def test_many_layers_are_rows_of_a_heat_map(count: int) -> None:
    full = {f"block{index // 6}.attention.layer{index}": 512 for index in range(count)}
    svg = rank_svg(make_history(full), x_label="Epoch")
    texts = svg_texts(svg)
    rows = [row for row in texts if row.endswith("(512)")]
    assert rows[0] == "block0.attention.layer0 (512)"
    assert len(rows) == (count if count <= 130 else 100), "rows without a label rather than labels on each other"
    assert {"Epoch", "Rank (% of the largest rank seen)"} <= set(texts)
    assert any(text.startswith("layers from input to output") for text in texts)
    assert texts.count("171") == len(rows), "the last rank of each row"
    assert "<image" in svg
    assert len(svg) < 400_000


def test_one_panel_per_layer_with_the_tiers_in_order(tmp_path: Path) -> None:
    _, svg = plot_tier_ranks(make_tier_history(LENET), tmp_path / "ranks", full={"fc1": 120}, title="federated")
    texts = svg_texts(svg.read_text(encoding="utf-8"))
    titles = ["conv1 (largest rank 6)", "conv2 (largest rank 16)", "fc1 (full rank 120)", "fc2 (largest rank 84)"]
    assert [text for text in texts if text in titles] == titles
    assert [text for text in texts if text in TIERS] == list(TIERS)
    assert texts.count("Communication round") == 3, "below the last panel of each column"
    assert {"federated", "Rank", "Tier"} <= set(texts)


@pytest.mark.parametrize("history", [[], [(0, {})], [(0, {}), (1, {})]])
def test_an_empty_history_says_so(history: list[tuple[float, dict[str, Any]]]) -> None:
    for svg in (rank_svg(history, x_label="Epoch"), tier_rank_svg(history)):
        assert "no ranks have been recorded yet" in svg_texts(svg)


def test_ranks_hold_until_the_next_moment() -> None:
    even, held = hold(np.array([0.0, 10.0, 11.0, 15.0]), np.array([[4.0], [3.0], [2.0], [1.0]]))
    assert even.tolist() == list(range(16))
    assert held[:, 0].tolist() == [4.0] * 10 + [3.0] + [2.0] * 4 + [1.0]
    assert len(hold(np.array([0.0, 1e-6, 100.0]), np.zeros((3, 2)))[0]) == 1000


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_do_not_overlap_and_keep_their_order(positions: list[float]) -> None:
    placed = spread(positions, 0.066, 1.0)
    assert all(right - left >= 0.066 - 1e-9 for left, right in pairwise(sorted(placed)))
    assert max(placed) <= 1.0
    pairs = sorted(zip(positions, placed, strict=True))
    assert all(upper > lower for (p, lower), (q, upper) in pairwise(pairs) if p < q)
