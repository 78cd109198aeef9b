"""From results to differences: every measure, the chosen baseline, whatever lacks."""

from typing import Any

import pytest
from reports import edited, make_results, make_row

from fedmaestro.runs.differences import compared, margin_of, measures
from fedmaestro.runs.records import Analysis, Results
from fedmaestro.stats.verdict import Verdict

SEEDS = tuple(range(8))


def without_new_keys(content: dict[str, Any]) -> None:
    """What a version before the statistics has written."""
    del content["analysis"]
    for row in content["strategies"]:
        for key in ("over_devices", "own_test", "own_test_mean", "reached"):
            del row[key]
        for scores in (row["mean"], row["worst"], *row["tiers"].values()):
            del scores["last"]


def rmse(content: dict[str, Any]) -> None:
    content["metric"] = {"name": "rmse", "higher_is_better": False, "percent": False}


def of_measure(results: Results, name: str) -> dict[str, Verdict]:
    family = next(family for family in compared(results) if family.measure.name == name)
    return {x.row: x.verdict for x in family.differences}


def test_rows_beside_the_first_or_the_one_that_was_named() -> None:
    results = make_results(3, seeds=SEEDS)
    (family, *_) = compared(results)
    assert (family.baseline, [x.row for x in family.differences]) == ("nested", ["zero-pad", "heterofl"])
    assert family.differences[0].mean == pytest.approx(-0.01)
    assert of_measure(results, "mean") == {"zero-pad": Verdict.BELOW, "heterofl": Verdict.BELOW}
    named = make_results(3, seeds=SEEDS, analysis=Analysis(baseline="zero-pad"))
    assert of_measure(named, "worst") == {"nested": Verdict.ABOVE, "heterofl": Verdict.BELOW}


def test_measures_follow_from_what_there_is() -> None:
    tiers = ["tier flagship", "tier mid", "tier minimal"]
    assert [x.name for x in measures(make_results())] == ["mean", "worst", *tiers]

    def skewed(content: dict[str, Any]) -> None:
        for row in content["strategies"]:
            row["budgets"]["minimal"]["devices"] = 60
            row["own_test_mean"] = row["mean"]["final"]

    results = edited(make_results(), skewed)
    assert [x.name for x in measures(results)] == ["mean", "worst", "devices", "own-test", *tiers]
    assert of_measure(results, "own-test") == of_measure(results, "mean")


def test_old_results_are_judged_as_they_are() -> None:
    results = make_results(3, seeds=SEEDS)
    assert compared(edited(results, without_new_keys)) is not None
    for old, new in zip(compared(edited(results, without_new_keys)), compared(results), strict=True):
        assert old.differences == new.differences


def test_the_margin_is_half_a_point_of_shares_and_nothing_else() -> None:
    assert margin_of(make_results()) == 0.005
    assert margin_of(make_results(analysis=Analysis(margin=0.02))) == 0.02
    other = edited(make_results(), rmse)
    assert margin_of(other) is None
    near = [make_row(name, 0.1 * i, seeds=SEEDS, noise=0.002 * i) for i, name in enumerate("ab")]
    assert of_measure(make_results(near, seeds=SEEDS), "mean") == {"b": Verdict.LEVEL}
    assert of_measure(edited(make_results(near, seeds=SEEDS), rmse), "mean") == {"b": Verdict.NOT_TOLD_APART}


def test_what_lacks_is_unknown_and_not_left_out() -> None:
    rows = [make_row("a", 0, seeds=SEEDS), make_row("b", 1, seeds=SEEDS[:7]), make_row("c", 2, seeds=[])]
    results = make_results(rows, seeds=SEEDS)
    (b, c) = compared(results)[0].differences
    assert b.seeds == SEEDS[:7]
    assert (c.seeds, c.verdict) == ((), Verdict.UNKNOWN)

    def diverged(content: dict[str, Any]) -> None:
        stat = content["strategies"][1]["mean"]["final"]
        stat["values"][3] = stat["mean"] = stat["std"] = None

    assert of_measure(edited(results, diverged), "mean")["b"] is Verdict.UNKNOWN


def test_a_single_row_has_nothing_beside_it() -> None:
    assert compared(make_results(1)) == []
