"""The ranks of rows over several experiments."""

from typing import Any

import pytest
from reports import edited, make_results, make_row

from fedmaestro.runs.ranking import ranking
from fedmaestro.runs.records import Results


def comparison(*ranks: float) -> Results:
    return make_results([make_row(name, rank) for name, rank in zip("abc", ranks, strict=False)])


def test_means_are_ranked_in_each_setting() -> None:
    found = ranking({"x": comparison(0, 1, 2), "y": comparison(0, 2, 1), "z": comparison(0, 1, 1)})
    assert (found.rows, found.seeds, found.left_out) == (["a", "b", "c"], 3, [])
    assert [setting.ranks for setting in found.settings] == [[1, 2, 3], [1, 3, 2], [1, 2.5, 2.5]]
    assert found.settings[0].values == [pytest.approx(x) for x in (0.962, 0.952, 0.942)]
    assert found.average == [pytest.approx(x) for x in (1, 2.5, 2.5)]
    assert found.cliques == [["a", "b", "c"]]
    assert found.p is not None


def test_lower_values_of_an_error_rank_first() -> None:
    def rmse(content: dict[str, Any]) -> None:
        content["metric"] = {"name": "rmse", "higher_is_better": False, "percent": False}

    found = ranking({"x": comparison(0, 1, 2), "error": edited(comparison(0, 1, 2), rmse)})
    assert [setting.ranks for setting in found.settings] == [[1, 2, 3], [3, 2, 1]]
    assert found.p == 1.0


def test_settings_that_lack_something_are_left_out_and_named() -> None:
    lacking = make_results([make_row("a", 0), make_row("b", 1, seeds=[0]), make_row("c", 1)])
    found = ranking({"x": comparison(0, 1, 2), "late": lacking})
    assert ([setting.name for setting in found.settings], found.left_out) == (["x"], ["late"])
    nothing = ranking({"late": lacking})
    assert (nothing.settings, nothing.average, nothing.p) == ([], [], None)


def test_one_row_has_no_rank() -> None:
    assert ranking({"x": comparison(0), "y": comparison(0)}).average == []
