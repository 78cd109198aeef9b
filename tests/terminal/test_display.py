"""What the terminal shows of a comparison."""

import io
from typing import Any

import pytest
from rich.console import Console

from fedmaestro.terminal.display import comparison_table

TIERS = ["flagship", "high", "mid", "low", "minimal"]


def results(name: str) -> dict[str, Any]:
    scores = {"final": {"mean": 0.80864, "std": 0.05561}}
    row = {"name": name, "tiers": dict.fromkeys(TIERS, scores), "mean": scores, "worst": scores}
    return {"seeds": [0, 1, 2], "experiment": "mnist", "tiers": TIERS, "strategies": [row]}


@pytest.mark.parametrize("name", ["nested", "partitioned-product"])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_name_mean_or_deviation_is_cut_off_in_a_narrow_terminal(name: str, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(results(name)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    words = text.split()
    assert all(word in words for word in (name, *TIERS, "mean", "worst"))
    assert (words.count("80.86"), words.count("±5.56")) == (7, 7)
