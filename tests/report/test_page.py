import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmaestro.errors import UserError
from fedmaestro.report import html_report, plot_partition, write_report, write_run_report

MakeRun = Callable[..., Path]
MakeRounds = Callable[..., list[dict[str, Any]]]
TIERS = ["flagship", "high", "mid", "low", "minimal"]
_VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Page(HTMLParser):
    """Collects ids, attributes and table rows, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def test_a_run_is_told_on_one_page(make_run: MakeRun) -> None:
    page = _Page(html_report([make_run()]))
    header, *rows = page.tables[0]
    assert [row[0] for row in rows] == TIERS
    first = dict(zip(header, rows[0], strict=True))
    assert first == {
        "Tier": "flagship",
        "Devices": "20",
        "Final accuracy": "97.8 %",
        "Best accuracy": "97.8 %",
        "Parameters": "61.7 k",
        "MACs per example": "282 k",
        "Training memory": "1.90 MB",
        "Download per round": "247 kB",
        "Ranks": "2 layersconv1\N{NO-BREAK SPACE}6, conv2\N{NO-BREAK SPACE}16",
    }
    assert rows[1][-1] == "width\N{NO-BREAK SPACE}0.5"
    for fact in (
        "mnist",
        "own-prefix",
        "60.0 MB",
        "30.0 MB",
        "7 h 12 min",
        "1 min 12 s",
        "1 failed, 0 dropped",
    ):
        assert fact in page.text
    assert ["train.lr", "0.05"] in page.tables[1]
    assert "Comparison" not in page.text


def test_nothing_is_loaded_and_ids_are_unique(make_run: MakeRun) -> None:
    runs = [make_run(name) for name in ("a", "b")]
    plot_partition(np.ones((10, 10), dtype=np.int64), runs[0] / "plots" / "partition")
    text = html_report(runs)
    page = _Page(text)
    assert all(link.startswith(("#", "data:")) for name in ("src", "href", "xlink:href") for link in page.values(name))
    assert re.findall(r"url\((?!#)|@import", text) == []
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 20
    references = re.findall(r"url\(#([^)]+)\)", text) + [
        link[1:] for link in page.values("xlink:href") if link[0] == "#"
    ]
    assert references
    assert set(references) <= set(ids)
    assert page.values("src")[0].startswith("data:image/svg+xml;base64,")
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_text_is_escaped(make_run: MakeRun, make_rounds: MakeRounds) -> None:
    evil = "<b>&\"'</b><script>x</script>"
    rounds = make_rounds([evil, "low"], [0.9, 0.8])
    runs = [make_run(f"run<i>{seed}", rounds, strategy=evil, seed=seed) for seed in range(2)]
    (runs[0] / "config.toml").write_text(f"'<u>' = {json.dumps(evil)}\n", encoding="utf-8")
    text = html_report(runs)
    page = _Page(text)
    assert not {"b", "i", "u"} & set(re.findall(r"<(\w+)", text))
    assert text.count("<script>") == 1
    assert page.tables[0][1][:2] == ["run<i>0", evil]


def test_several_runs_are_compared(make_run: MakeRun, make_rounds: MakeRounds) -> None:
    good = make_run("good", make_rounds(finals=[0.95] * 5), seed=3)
    bad = make_run("bad", make_rounds(["flagship", "tiny"], [0.9, 0.5]), strategy="heterofl", finished=False)
    page = _Page(html_report([good, bad]))
    header, *rows = page.tables[0]
    assert header == ["Run", "Strategy", "Objective", "Seed", "Mean over tiers", "Worst tier", *TIERS, "tiny"]
    assert rows == [
        ["good", "nested", "own-prefix", "3", "95.0 %", "95.0 %", *["95.0 %"] * 5, "–"],
        [
            "bad (not finished)",
            "heterofl",
            "own-prefix",
            "0",
            "70.0 %",
            "50.0 %",
            "90.0 %",
            *["–"] * 4,
            "50.0 %",
        ],
    ]
    assert [value for value in page.values("class") if "best" in value] == ["num best"] * 8
    assert [value for value in page.values("href") if value in ("#run1", "#run2")] == ["#run1", "#run2"]


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    page = _Page(html_report([make_run("nested/seed0"), make_run("heterofl/seed0")]))
    assert [row[0] for row in page.tables[0][1:]] == ["nested/seed0", "heterofl/seed0"]


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_an_interrupted_run_still_renders(make_run: MakeRun, make_rounds: MakeRounds, lines: int) -> None:
    folder = make_run(rounds=make_rounds()[:lines], finished=False)
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "tie')
    paths = write_run_report(folder)
    page = _Page(paths[2].read_text(encoding="utf-8"))
    assert "This run is not finished" in page.text
    assert "mnist · lenet · nested · own-prefix · seed 0" in page.text
    if lines:
        assert page.tables[0][1][:3] == ["flagship", "–", "10.0 %"]
    else:
        assert "No round has been evaluated yet." in page.text


def edit_summary(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_run_stopped_by_ctrl_c_is_not_finished_but_its_summary_counts(make_run: MakeRun) -> None:
    stopped = make_run("stopped")
    edit_summary(stopped, interrupted=True)
    page = _Page(html_report([make_run("whole"), stopped]))
    assert [row[0] for row in page.tables[0][1:]] == ["whole", "stopped (not finished)"]
    warning = "This run is not finished: it was interrupted and can be resumed; the last recorded round is 60."
    assert page.text.count("This run is not finished") == page.text.count(warning) == 1
    assert [row[4] for table in page.tables[1:] for row in table if row[0] == "flagship"] == ["61.7 k"] * 2


def test_a_final_accuracy_from_before_the_last_round_names_its_round(make_run: MakeRun) -> None:
    folder = make_run()
    tiers = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["tiers"]
    for name, last in (("flagship", 40), ("high", 60), ("mid", None)):
        tiers[name]["final_round"] = last
    tiers["mid"]["final_accuracy"] = None
    edit_summary(folder, tiers=tiers)
    finals = [row[2] for row in _Page(html_report([folder])).tables[0][1:]]
    assert finals == ["97.8 % (round 40)", "97.6 %", "–", "97.1 %", "94.4 %"]


def test_scores_may_be_null(make_run: MakeRun, make_rounds: MakeRounds) -> None:
    rounds = make_rounds()
    for row in rounds:
        for scores in row["tiers"].values():
            scores["loss"] = None
        if row["tiers"]:
            row["tiers"]["mid"]["accuracy"] = None
    rows = _Page(html_report([make_run(rounds=rounds, finished=False)])).tables[0][1:]
    assert [row[2] for row in rows] == ["97.8 %", "97.6 %", "–", "97.1 %", "94.4 %"]


def test_write_run_report_twice_gives_the_same_bytes(make_run: MakeRun) -> None:
    folder = make_run()
    first = write_run_report(folder)
    assert [str(path.relative_to(folder)) for path in first] == [
        "plots/tier_accuracy.png",
        "plots/tier_accuracy.svg",
        "report.html",
    ]
    before = [path.read_bytes() for path in first]
    assert [path.read_bytes() for path in write_run_report(folder)] == before


def test_write_report_makes_the_folder(make_run: MakeRun, tmp_path: Path) -> None:
    out = write_report([make_run("a"), make_run("b")], tmp_path / "new" / "all.html")
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_wrong_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_import_is_cheap() -> None:
    heavy = ("flwr", "ray", "torch", "matplotlib", "numpy")
    code = f"import sys, fedmaestro.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
