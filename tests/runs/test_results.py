"""From records to summaries, and from those to the results of a comparison."""

from typing import Any

import pytest

from fedmaestro.runs.records import (
    AS_IT_IS,
    Analysis,
    MetricFacts,
    Reached,
    RoundRecord,
    Scores,
    Stat,
    StrategyResults,
    Summary,
    TierFigures,
)
from fedmaestro.runs.results import FinishedCell, is_monotone, stat, strategy_results
from fedmaestro.runs.summary import summarize

FIGURES = TierFigures(
    devices=2,
    ranks={"fc1": 4},
    params=10,
    macs_per_example=20,
    train_macs_per_example=60,
    train_memory_bytes=400,
    download_bytes=40,
    upload_bytes=40,
)
FACTS: dict[str, Any] = {"strategy": "nested", "objective": "own", "seed": 4, "dataset": "digits", "model": "mlp"}


def scored(number: int, big: float | None, small: float | None, **more: Any) -> RoundRecord:
    tiers = {name: {"accuracy": a, "loss": 1.0} for name, a in (("big", big), ("small", small))}
    return RoundRecord(round=number, tiers=tiers, **more)


def summary_of(records: list[RoundRecord]) -> Summary:
    return summarize(records, {"big": FIGURES, "small": FIGURES}, "abc", **FACTS)


def test_summary_figures() -> None:
    summary = summary_of(
        [
            scored(0, 0.1, 0.1, wall_seconds=0.5),
            RoundRecord(round=1, download_bytes=10, upload_bytes=3, failed=2, wall_seconds=1.0004, virtual_seconds=7.5),
            scored(2, 0.9, 0.5, download_bytes=20, upload_bytes=4, failed=1, wall_seconds=2.0, virtual_seconds=2.25),
            scored(3, 0.8, 0.4, wall_seconds=3.0),
        ]
    )
    assert list(summary.tiers) == ["big", "small"]
    for name, final, best in (("big", 0.8, 0.9), ("small", 0.4, 0.5)):
        tier = summary.tiers[name]
        assert (tier.final, tier.final_round, tier.best) == (final, 3, best)
        assert FIGURES.to_dict().items() <= tier.to_dict().items()
    assert summary.to_dict() | FACTS == summary.to_dict()
    assert summary.mean_tier == pytest.approx(0.6)
    assert (summary.worst_tier, summary.rounds, summary.model_sha256) == (0.4, 3, "abc")
    assert (summary.download_bytes, summary.upload_bytes, summary.failed) == (30, 7, 3)
    assert (summary.wall_seconds, summary.virtual_seconds) == (6.5, 9.75)


def test_a_tier_that_was_not_evaluated_has_no_accuracy_and_does_not_flatter_the_others() -> None:
    summary = summary_of([scored(0, 0.3, None), scored(1, 0.5, None)])
    tier = summary.tiers["small"]
    assert (tier.final, tier.final_round, tier.best) == (None, None, None)
    assert summary.mean_tier == summary.worst_tier == 0.5
    nothing = summary_of([])
    assert (nothing.rounds, nothing.mean_tier, nothing.worst_tier) == (0, None, None)


# Comparisons


def cell(seed: int, big: list[float | None], small: list[float | None]) -> FinishedCell:
    """An accuracy of every evaluated round for each of two tiers; a round in between is not evaluated."""
    cost = {"download_bytes": 100, "upload_bytes": 10, "virtual_seconds": 2.0}
    records = [
        scored(i, a, b, tail_energy=0.5, factor_bias=0.01 if i else None, **(cost if i else {}))
        for i, (a, b) in enumerate(zip(big, small, strict=True))
    ]
    records.insert(1, RoundRecord(round=1, **cost))  # type: ignore[arg-type]
    return FinishedCell(seed=seed, summary=summary_of(records), records=records)


def row_of(*cells: FinishedCell, analysis: Analysis = AS_IT_IS) -> StrategyResults:
    switches = dict.fromkeys(("summary", "source", "form", "submodel", "objective", "aggregation", "server"), "")
    return strategy_results(cells, analysis, name="x", **switches)


def test_means_and_deviations_are_over_seeds() -> None:
    row = row_of(cell(0, [0.1, 0.9, 0.8], [0.1, 0.5, 0.6]), cell(1, [0.1, 0.8, 0.9], [0.1, 0.6, 0.6]))
    assert row.seeds == [0, 1]
    final = row.tiers["big"].final
    assert (final.mean, final.std, final.values) == (pytest.approx(0.85), pytest.approx(0.0707106781), [0.8, 0.9])
    assert row.tiers["big"].best.values == [0.9, 0.9]
    assert row.mean.final.values == [pytest.approx(0.7), pytest.approx(0.75)]
    assert row.worst.final.values == [0.6, 0.6]
    assert row.monotone_seeds == 2
    assert row.budgets["small"] == FIGURES
    assert row.upload_bytes == 30


def test_series_hold_evaluated_rounds_with_traffic_of_all_rounds() -> None:
    (series,) = row_of(cell(3, [0.1, 0.9], [0.1, 0.5])).series
    assert (series.seed, series.round, series.bytes, series.virtual_seconds) == (3, [0, 1], [0, 220], [0.0, 4.0])
    assert series.values == {"big": [0.1, 0.9], "small": [0.1, 0.5]}
    assert series.factor_bias == [None, 0.01]


def test_without_cells_everything_is_unknown() -> None:
    row = row_of()
    assert row.seeds == row.series == []
    assert row.tiers == row.budgets == {}
    assert row.mean == row.worst == Scores()
    assert row.upload_bytes is None


def test_a_missing_accuracy_makes_the_mean_unknown_rather_than_flattering() -> None:
    row = row_of(cell(0, [None, None], [0.1, 0.5]))
    assert row.mean.final.mean is row.worst.final.mean is None
    assert row.monotone_seeds == 0
    assert stat([0.5, None]) == Stat(values=[0.5, None])


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([0.9, 0.8, 0.7], True), ([0.9, 0.904], True), ([0.9, 0.906], False), ([0.9, 0.897, 0.903], False), ([], True)],
)
def test_monotone_allows_half_a_point_between_any_two_tiers(accuracies: list[float | None], expected: bool) -> None:
    assert is_monotone(accuracies) is expected


def test_the_mean_of_the_last_rounds_is_judged_where_it_was_asked_for() -> None:
    cells = (cell(0, [0.1, 0.9, 0.8], [0.1, 0.5, 0.6]), cell(1, [0.1, 0.7, 0.9], [0.1, 0.6, None]))
    row = row_of(*cells, analysis=Analysis(last=2))
    assert row.tiers["big"].judged.values == [pytest.approx(0.85), pytest.approx(0.8)]
    assert row.tiers["small"].judged.values == [pytest.approx(0.55), pytest.approx(0.35)], "rounds that have a value"
    assert row.mean.judged.values == [pytest.approx(0.7), pytest.approx(0.575)]
    assert row.worst.judged.values == [pytest.approx(0.55), pytest.approx(0.35)]
    assert row.tiers["big"].final.values == [0.8, 0.9]
    assert row_of(*cells).mean.judged == row.mean.final
    assert row_of(*cells, analysis=Analysis(last=4)).tiers["big"].judged == Stat(values=[None, None])


def test_the_mean_over_devices_weighs_tiers_by_their_size() -> None:
    one = cell(0, [0.1, 0.9], [0.1, 0.5])
    tiers = {
        name: x.model_copy(update={"devices": n})
        for (name, x), n in zip(one.summary.tiers.items(), (1, 3), strict=True)
    }
    one = FinishedCell(seed=0, summary=one.summary.model_copy(update={"tiers": tiers}), records=one.records)
    row = row_of(one)
    assert row.over_devices.final.values == [pytest.approx(0.25 * 0.9 + 0.75 * 0.5)]
    assert row.mean.final.values == [pytest.approx(0.7)]


def test_devices_own_tests_are_of_the_last_round_that_has_them() -> None:
    def tested(seed: int, big: float, small: float) -> FinishedCell:
        of_tiers = {"big": {"devices": 1, "mean": big, "std": None, "worst_decile": big}}
        of_tiers["small"] = {"devices": 3, "mean": small, "std": 0.1, "worst_decile": small / 2}
        records = [scored(0, 0.1, 0.1, device_test={}), scored(1, 0.9, 0.5, device_test=of_tiers), RoundRecord(round=2)]
        return FinishedCell(seed=seed, summary=summary_of(records), records=records)

    row = row_of(tested(0, 0.8, 0.4), tested(1, 1.0, 0.6))
    assert row.own_test["small"].mean.values == [0.4, 0.6]
    assert row.own_test["small"].worst_decile.mean == pytest.approx(0.25)
    assert row.own_test_mean is not None
    assert row.own_test_mean.values == [pytest.approx(0.5), pytest.approx(0.7)]
    without = row_of(tested(0, 0.8, 0.4), cell(1, [0.1], [0.1]))
    assert without.own_test_mean is not None
    assert without.own_test_mean.mean is None, "a seed that lacks it is not left out"
    assert row_of(cell(1, [0.1], [0.1])).own_test_mean is None


def test_a_target_is_reached_by_the_mean_over_tiers_or_never() -> None:
    cells = (cell(0, [0.1, 0.5, 0.9], [0.1, 0.6, 0.9]), cell(1, [0.1, 0.9, 0.9], [0.1, None, 0.1]))
    row = row_of(*cells, analysis=Analysis(target=0.55))
    assert row.reached == [Reached(round=1, bytes=220, virtual_seconds=4.0), None]
    assert row_of(*cells).reached == []


def test_of_a_metric_where_lower_is_better_a_target_is_reached_from_above() -> None:
    rmse = MetricFacts(name="accuracy", higher_is_better=False, percent=False)
    one = cell(0, [9.0, 4.0, 2.0], [9.0, 5.0, 2.0])
    one = FinishedCell(seed=0, summary=one.summary.model_copy(update={"metric": rmse}), records=one.records)
    (reached,) = row_of(one, analysis=Analysis(target=4.5)).reached
    assert reached is not None
    assert reached.round == 1
