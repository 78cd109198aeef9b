"""Pages, tables and pictures of a metric that is no share and of which less is better."""

import math
import re
from pathlib import Path

import pytest
from reports import figures

from fedmaestro.report import write_report, write_run_report
from fedmaestro.report.accuracy_plot import value_scale
from fedmaestro.report.compare_figure import failed, ranked
from fedmaestro.report.compare_page import write_comparison
from fedmaestro.report.compare_table import score_columns, table_csv, table_markdown
from fedmaestro.report.curves import tier_curves
from fedmaestro.report.format import Shown
from fedmaestro.runs.folder import RunFolder, write_atomically, write_record, write_records
from fedmaestro.runs.reader import read_json, read_run
from fedmaestro.runs.records import MetricFacts, Results, RoundRecord, StrategyResults, Summary
from fedmaestro.runs.results import FinishedCell, is_monotone, strategy_results
from fedmaestro.runs.summary import summarize

RMSE = MetricFacts(name="rmse", higher_is_better=False, percent=False)
TIERS = ("big", "small")


def make_rounds(finals: tuple[float, float], last: int = 20) -> list[RoundRecord]:
    """Errors that fall from 40 and settle at `finals`."""
    rows = []
    for number in range(0, last + 1, 2):
        values = {
            tier: {"rmse": final + (40 - final) * math.exp(-number), "r2": 0.5, "loss": 1.0}
            for tier, final in zip(TIERS, finals, strict=True)
        }
        facts = {"download_bytes": 1000, "upload_bytes": 1000, "virtual_seconds": 1.0, "devices": 4}
        rows.append(RoundRecord(round=number, tiers=values, metric=None if number else RMSE, **facts))
    return rows


def make_summary(rounds: list[RoundRecord], strategy: str, seed: int) -> Summary:
    facts = {"strategy": strategy, "objective": "own-prefix", "seed": seed, "dataset": "trips", "model": "mlp"}
    return summarize(rounds, {t: figures(i) for i, t in enumerate(TIERS)}, "ab" * 32, RMSE, **facts)


def make_results() -> Results:
    rows: list[StrategyResults] = []
    for name, base in (("worse", 9.0), ("best", 5.0), ("broken", 400.0)):
        cells = []
        for seed in (0, 1):
            rounds = make_rounds((base + 0.1 * seed, base + 1))
            cells.append(FinishedCell(seed=seed, summary=make_summary(rounds, name, seed), records=rounds))
        switches = dict.fromkeys(("submodel", "objective", "aggregation", "server", "summary", "source"), "")
        rows.append(strategy_results(cells, **{**switches, "name": name, "form": "lod", "submodel": "rank, own"}))
    return Results(
        experiment="trips",
        complete=True,
        seeds=[0, 1],
        tiers=list(TIERS),
        metric=RMSE,
        matched_macs=False,
        protocol={"data.name": "trips"},
        strategies=rows,
    )


def visible_accuracy(page: str) -> list[str]:
    """Return what a reader sees of the word, outside of attributes."""
    return re.findall(r">[^<]*accuracy[^<]*<", page, re.IGNORECASE)


def test_less_is_better_everywhere(tmp_path: Path) -> None:
    results = make_results()
    assert [row.name for row in ranked(results)] == ["best", "worse", "broken"]
    assert [row.name for row in failed(results)] == ["broken"]
    first = results.strategies[1]
    assert first.worst.final.mean == pytest.approx(6.0), "the larger error is the worst tier's"
    columns = score_columns(results)
    assert all(column.best == [False, True, False] for column in columns[:4])
    assert columns[0].texts[1] == "5.05 ± 0.07071"
    assert table_csv(results).startswith("strategy,seed,tier,final_rmse,best_rmse,")
    markdown = table_markdown(results)
    assert "Test rmse (lower is better), mean" in markdown
    assert "%, mean" not in markdown
    written = write_comparison(results, tmp_path)
    page = written["report.html"].read_text()
    assert "Rmse per tier" in page
    assert "Down and left is better" in page
    assert not visible_accuracy(page)
    picture = written["plots/tier_accuracy.svg"].read_text()
    assert "Final test rmse (lower is better)" in picture
    assert (tmp_path / "plots" / "accuracy_rounds.png").stat().st_size > 5000


def test_a_run_says_its_metric_in_its_page(tmp_path: Path) -> None:
    rounds = make_rounds((5.0, 6.0))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_records(folder.rounds, rounds)
    write_atomically(folder.config, 'seed = 0\n[data]\nname = "trips"\n')
    for finished in (False, True):  # killed before it wrote a summary, and complete
        if finished:
            write_record(folder.summary, make_summary(rounds, "nested", 0))
        page = write_run_report(folder.path)[-1].read_text()
        assert "Test rmse per tier" in page
        assert "Final r2" in page
        assert "worst tier rmse" in page
        assert not visible_accuracy(page)
    scale = value_scale(tier_curves(rounds), Shown(RMSE))
    assert scale.low < 5.0 < 6.0 < scale.high < 40, "the start of the run is cut off"
    assert scale.note.endswith("the start, from 40, is cut off")
    both = write_report([folder.path, folder.path], tmp_path / "both.html").read_text()
    assert "Final test rmse." in both


def test_keys_of_the_summary_name_the_metric(tmp_path: Path) -> None:
    summary = make_summary(make_rounds((5.0, 6.0)), "nested", 0)
    content = summary.to_dict()
    assert content["mean_tier_rmse"] == pytest.approx(5.5, rel=1e-3)
    assert content["worst_tier_rmse"] == content["tiers"]["small"]["final_rmse"]
    assert content["tiers"]["big"]["best_rmse"] <= content["tiers"]["big"]["final_rmse"]
    write_record(tmp_path / "summary.json", summary)
    assert read_json(tmp_path / "summary.json", Summary) == summary
    run = tmp_path / "run"
    run.mkdir()
    write_records(run / "rounds.jsonl", make_rounds((5.0, 6.0)))
    write_record(run / "summary.json", summary)
    assert read_run(run).finished


def test_monotone_in_the_metrics_direction() -> None:
    assert is_monotone([5.0, 6.0, 7.0], RMSE)
    assert is_monotone([6.02, 6.0], RMSE), "within half a percent"
    assert not is_monotone([6.1, 6.0], RMSE)
    assert is_monotone([0.9, 0.8])


def test_how_values_are_shown() -> None:
    assert Shown().text(0.978) == "97.8 %"
    assert Shown().label("Test {metric}") == "Test accuracy (%)"
    assert Shown(RMSE).text(5.123456) == "5.123"
    assert Shown(RMSE).label("Test {metric}") == "Test rmse (lower is better)"
    assert Shown().words(97.84) == "97.8 %"
    assert Shown(RMSE).words(1234.5) == "1.23 k"
    assert Shown(RMSE).text(None) == Shown(RMSE).text(math.inf) == "–"
