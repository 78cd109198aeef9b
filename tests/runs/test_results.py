"""From records and summaries to results.json."""

from typing import Any

import pytest

from fedmaestro.runs.folder import RoundRecord, summarize
from fedmaestro.runs.results import FinishedCell, is_monotone, stat, strategy_results

STATIC: dict[str, Any] = {
    "devices": 2,
    "ranks": {"fc1": 4},
    "params": 10,
    "macs_per_example": 20,
    "train_macs_per_example": 60,
    "train_memory_bytes": 400,
    "download_bytes": 40,
    "upload_bytes": 40,
}


def cell(seed: int, top: list[float | None], small: list[float | None]) -> FinishedCell:
    """Rounds 0, 1, 2, …; an accuracy of every round for each of two tiers."""
    records = [
        RoundRecord(
            round=i,
            tiers={"top": {"accuracy": a, "loss": 1.0}, "small": {"accuracy": b, "loss": 1.0}},
            download_bytes=100 * (i > 0),
            upload_bytes=10 * (i > 0),
            virtual_seconds=2.0 * (i > 0),
            tail_energy=0.5,
            factor_bias=None if i == 0 else 0.01,
        )
        for i, (a, b) in enumerate(zip(top, small, strict=True))
    ]
    records.insert(1, RoundRecord(round=1, tiers={}, download_bytes=100, upload_bytes=10, virtual_seconds=2.0))
    return FinishedCell(
        seed=seed, summary=summarize(records, {"top": STATIC, "small": STATIC}, {}, ""), records=records
    )


def test_means_and_deviations_are_over_seeds() -> None:
    row = strategy_results(
        {"name": "x"}, [cell(0, [0.1, 0.9, 0.8], [0.1, 0.5, 0.6]), cell(1, [0.1, 0.8, 0.9], [0.1, 0.6, 0.6])]
    )
    assert row["seeds"] == [0, 1]
    assert row["tiers"]["top"]["final"] == {
        "mean": pytest.approx(0.85),
        "std": pytest.approx(0.0707106781),
        "values": [0.8, 0.9],
    }
    assert row["tiers"]["top"]["best"]["values"] == [0.9, 0.9]
    assert row["mean"]["final"]["values"] == [pytest.approx(0.7), pytest.approx(0.75)]
    assert row["worst"]["final"]["values"] == [0.6, 0.6]
    assert row["monotone_seeds"] == 2
    assert row["budgets"]["small"] == STATIC
    assert row["upload_bytes"] == 30


def test_series_hold_evaluated_rounds_with_traffic_of_all_rounds() -> None:
    (series,) = strategy_results({}, [cell(3, [0.1, 0.9], [0.1, 0.5])])["series"]
    assert series["seed"] == 3
    assert series["round"] == [0, 1]
    assert series["bytes"] == [0, 220]
    assert series["virtual_seconds"] == [0.0, 4.0]
    assert series["accuracy"] == {"top": [0.1, 0.9], "small": [0.1, 0.5]}
    assert series["factor_bias"] == [None, 0.01]


def test_without_cells_everything_is_unknown() -> None:
    row = strategy_results({"name": "x"}, [])
    assert row["seeds"] == row["series"] == []
    assert row["tiers"] == row["budgets"] == {}
    assert row["mean"]["final"] == {"mean": None, "std": None, "values": []}
    assert row["upload_bytes"] is None


def test_a_missing_accuracy_makes_the_mean_unknown_rather_than_flattering() -> None:
    row = strategy_results({}, [cell(0, [None, None], [0.1, 0.5])])
    assert row["mean"]["final"]["mean"] is None
    assert row["worst"]["final"]["mean"] is None
    assert row["monotone_seeds"] == 0
    assert stat([0.5, None]) == {"mean": None, "std": None, "values": [0.5, None]}


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([0.9, 0.8, 0.7], True), ([0.9, 0.904], True), ([0.9, 0.906], False), ([0.9, 0.897, 0.903], False), ([], True)],
)
def test_monotone_allows_half_a_point_between_any_two_tiers(accuracies: list[float | None], expected: bool) -> None:
    assert is_monotone(accuracies) is expected
