"""The page and the plots of runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from reports import FINALS, TIERS, Page, make_rounds, make_summary, svg_texts, write_run

from fedmaestro.errors import UserError
from fedmaestro.report import (
    html_report,
    partition_figure,
    save_figure,
    svg_text,
    tier_accuracy_figure,
    write_report,
    write_run_report,
)
from fedmaestro.report.curves import tier_curves, time_unit
from fedmaestro.runs.folder import RunFolder, write_record
from fedmaestro.runs.records import RoundRecord


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="run", *args, **options: write_run(tmp_path / name, *args, **options)


MakeRun = Callable[..., Path]


# The page


def test_a_run_is_told_on_one_page(make_run: MakeRun) -> None:
    page = Page(html_report([make_run()]))
    header, *rows = page.tables[0]
    assert [row[0] for row in rows] == list(TIERS)
    assert dict(zip(header, rows[0], strict=True)) == {
        "Tier": "flagship",
        "Devices": "20",
        "Final accuracy": "97.8 %",
        "Best accuracy": "97.8 %",
        "Updates lost": "–",
        "Parameters": "61.7 k",
        "MACs per example": "282 k",
        "Training memory": "1.90 MB",
        "Download per round": "247 kB",
        "Ranks": "2 layersconv1\N{NO-BREAK SPACE}6, fc1\N{NO-BREAK SPACE}120",
    }
    for fact in ("mnist", "own-prefix", "60.0 MB", "30.0 MB", "7 h 12 min", "1 min 13 s", "1 failed, 0 dropped"):
        assert fact in page.text
    assert ["train.lr", "0.05"] in page.tables[1]
    assert "Comparison" not in page.text


def test_nothing_is_loaded_and_ids_are_unique(make_run: MakeRun) -> None:
    runs = [make_run(name) for name in ("a", "b")]
    save_figure(partition_figure(np.ones((10, 10), dtype=np.int64)), runs[0] / "plots" / "partition")
    page = Page(html_report(runs))
    page.check_self_contained()
    assert page.values("src")[0].startswith("data:image/svg+xml;base64,")
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in page.source


def test_text_is_escaped(make_run: MakeRun) -> None:
    evil = "<b>&\"'</b><script>x</script>"
    rounds = make_rounds([evil, "low"], [0.9, 0.8])
    runs = [make_run(f"run<i>{seed}", rounds, strategy=evil, seed=seed) for seed in range(2)]
    page = Page(html_report(runs))
    assert "<b>" not in page.source
    assert "<i>" not in page.source
    assert page.source.count("<script>") == 1
    assert page.tables[0][1][:2] == ["run<i>0", evil]


def test_several_runs_are_compared(make_run: MakeRun) -> None:
    good = make_run("good", make_rounds(finals=[0.95] * 5), seed=3)
    bad = make_run("bad", make_rounds(["flagship", "tiny"], [0.9, 0.5]), strategy="heterofl", finished=False)
    page = Page(html_report([good, bad]))
    header, *rows = page.tables[0]
    assert header == ["Run", "Strategy", "Objective", "Seed", "Mean over tiers", "Worst tier", *TIERS, "tiny"]
    assert rows == [
        ["good", "nested", "own-prefix", "3", "95.0 %", "95.0 %", *["95.0 %"] * 5, "–"],
        ["bad (not finished)", "heterofl", "own-prefix", "0", "70.0 %", "50.0 %", "90.0 %", *["–"] * 4, "50.0 %"],
    ]
    assert [value for value in page.values("class") if "best" in value] == ["num best"] * 8
    again = Page(html_report([make_run("nested/seed0"), make_run("heterofl/seed0")]))
    assert [row[0] for row in again.tables[0][1:]] == ["nested/seed0", "heterofl/seed0"], "names are told apart"


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_killed_run_still_renders(make_run: MakeRun, lines: int) -> None:
    folder = make_run("run", make_rounds()[:lines], finished=False)
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "tie')
    page = Page(write_run_report(folder)[2].read_text(encoding="utf-8"))
    assert "This run is not finished" in page.text
    assert "mnist · lenet · nested · own-prefix · seed 0" in page.text
    if lines:
        assert page.tables[0][1][:3] == ["flagship", "–", "10.0 %"]
    else:
        assert "No round has been evaluated yet." in page.text


def test_a_run_stopped_by_ctrl_c_is_not_finished_but_its_summary_counts(make_run: MakeRun) -> None:
    page = Page(html_report([make_run("whole"), make_run("stopped", interrupted=True)]))
    assert [row[0] for row in page.tables[0][1:]] == ["whole", "stopped (not finished)"]
    warning = "This run is not finished: it was interrupted and can be resumed; the last recorded round is 60."
    assert page.text.count("This run is not finished") == page.text.count(warning) == 1


def test_why_updates_failed_and_why_a_run_ended_early(make_run: MakeRun) -> None:
    rounds = [
        row.model_copy(update={"failed_by": {"not-finite": row.failed}} if row.failed else {}) for row in make_rounds()
    ]
    folder = make_run("run", rounds)
    stopped = make_summary(rounds).model_copy(update={"stopped": "no update counted in 4 rounds"})
    write_record(RunFolder(folder).summary, stopped)
    text = Page(html_report([folder])).text
    assert "1 failed (1 not-finite), 0 dropped" in text
    assert "This run ended early: no update counted in 4 rounds." in text


def test_a_final_accuracy_from_before_the_last_round_names_its_round(make_run: MakeRun) -> None:
    folder = make_run()
    summary = make_summary(make_rounds())
    changes: dict[str, dict[str, Any]] = {"flagship": {"final_round": 40}, "mid": {"final_accuracy": None}}
    tiers = {name: tier.model_copy(update=changes.get(name, {})) for name, tier in summary.tiers.items()}
    write_record(RunFolder(folder).summary, summary.model_copy(update={"tiers": tiers}))
    finals = [row[2] for row in Page(html_report([folder])).tables[0][1:]]
    assert finals == ["97.8 % (round 40)", "97.6 %", "–", "97.1 %", "94.4 %"]


def test_files_are_the_same_bytes_again_and_their_folder_is_made(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    first = write_run_report(folder)
    assert [str(path.relative_to(folder)) for path in first] == [
        "plots/tier_accuracy.png",
        "plots/tier_accuracy.svg",
        "report.html",
    ]
    before = [path.read_bytes() for path in first]
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        assert [path.read_bytes() for path in write_run_report(folder)] == before
    assert write_report([folder], tmp_path / "new" / "all.html").is_file()
    with pytest.raises(UserError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "other" / "report.html")
    assert not (tmp_path / "other").exists()


# Accuracy per tier


def test_two_panels_with_units_and_the_tiers_in_order(tmp_path: Path) -> None:
    png, svg = save_figure(tier_accuracy_figure(make_rounds(), "mnist & co"), tmp_path / "plots" / "tier.accuracy")
    assert (png.name, svg.name) == ("tier.accuracy.png", "tier.accuracy.svg")
    texts = svg_texts(svg)
    assert {"mnist & co", "Test accuracy (%)", "Communication round", "Virtual time (h)"} <= set(texts)
    legend = [text.split() for text in texts if text.split()[-1] in TIERS]
    assert legend == [[f"{100 * final:.1f}", tier] for final, tier in zip(FINALS, TIERS, strict=True)]
    assert any(text.startswith("the y axis starts at") and "from 10.0 %" in text for text in texts)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("rounds", [[], [RoundRecord(round=0, tiers={"a": {"accuracy": None}})]])
def test_nothing_evaluated_says_so(rounds: list[RoundRecord]) -> None:
    assert "no round has been evaluated yet" in svg_texts(svg_text(tier_accuracy_figure(rounds)))


def test_thirty_tiers_have_a_name_each_inside_the_picture() -> None:
    tiers = [f"tier-{index}" for index in range(30)]
    figure = tier_accuracy_figure(make_rounds(tiers, [0.98 - 0.01 * index for index in range(30)]))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text().split()[-1] for text in legend.get_texts()] == tiers
    assert figure.bbox.y0 <= legend.get_window_extent().y0


def test_virtual_time_counts_rounds_that_were_not_evaluated() -> None:
    curve = tier_curves(make_rounds(last=10, virtual_seconds=2.0))[0]
    assert curve.rounds == (0, 5, 10)
    assert curve.virtual_seconds == (0.0, 10.0, 20.0)
    assert [time_unit(s)[0] for s in (119, 120, 7199, 7200, 2e5)] == ["s", "min", "min", "h", "days"]


# The partition


def counts(devices: int, classes: int = 10) -> Any:
    shares = np.random.default_rng(0).dirichlet([0.3] * devices, size=classes).T
    return (shares * 6000).astype(np.int64)


@pytest.mark.parametrize(("devices", "classes"), [(1, 1), (10, 100), (1000, 10)])
def test_the_partitions_axes_are_labelled(devices: int, classes: int) -> None:
    svg = svg_text(partition_figure(counts(devices, classes), title="mnist <0.3>"))
    texts = svg_texts(svg)
    assert {"Device id", "Class", "mnist <0.3>", "examples (white: none)"} <= set(texts)
    assert "Tier" not in texts
    assert len(svg) < 200_000, "a thousand devices are an image, not ten thousand paths"


def test_alternating_tiers_are_grouped_and_the_axis_says_so() -> None:
    names = ["flagship", "high", "low"]
    blocks, mixed = ([names[i // 30] for i in range(90)], [names[-1 - i % 3] for i in range(90)])
    for tiers, axis in ((blocks, "Device id"), (mixed, "Devices, grouped by tier")):
        texts = svg_texts(svg_text(partition_figure(counts(90), tiers, tier_order=names)))
        assert [text for text in texts if "×" in text] == ["30 × flagship", "30 × high", "30 × low"]
        assert any(text.startswith(axis) for text in texts)
