"""Stored results: what a comparison and what runs leave, pages that are made from them, and that ours match."""

import subprocess
import sys
from pathlib import Path

import pytest

import fedmaestro

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "book.py"
SMALL = {"train.rounds": 2, "train.local-epochs": 1, "train.evaluate-every": 1}


def book(*words: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)


def test_the_pages_match_the_stored_results() -> None:
    done = book("pages", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The script in a repository of its own, with an empty page."""
    script = tmp_path / "repository" / "experiments" / "book.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    return script


def page_of(script: Path, *views: str, name: str = "mine") -> Path:
    page = script.parent / "README.md"
    page.write_text("\n".join(f"Before.\n<!-- results {name} {view} -->\n<!-- end -->\nAfter." for view in views))
    return page


def test_a_comparison_becomes_tables_and_figures_of_a_page(copied: Path, tmp_path: Path) -> None:
    rows = ["nested", "wide:fjord"]
    fedmaestro.compare(None, rows, 2, overrides=SMALL, out=tmp_path / "compare", actors=0)
    command = "fedmaestro compare --strategies nested,wide:fjord --seeds 2 --set train.rounds=2"
    done = book("store", "mine", str(tmp_path / "compare"), "--by", command, script=copied)
    assert done.returncode == 0, done.stderr
    page = page_of(copied, "scores", "differences", "budgets", "provenance", "figure-tiers")
    assert book("pages", "--check", script=copied).returncode == 1
    assert book("pages", script=copied).returncode == 0
    text = page.read_text()
    assert text.startswith("Before.\n<!-- results mine scores -->\n")
    assert text.endswith("<!-- end -->\nAfter.")
    for expected in ("| wide |", "fedmaestro compare --strategies nested,wide:fjord", "4 runs of", "Seeds 0, 1"):
        assert expected in text
    assert (copied.parent / "figures" / "mine-tiers.svg").read_text().startswith("<?xml")
    assert book("pages", "--check", script=copied).returncode == 0
    page.write_text(text.replace("Seeds 0, 1", "Seeds 0"))
    assert book("pages", "--check", script=copied).returncode == 1


def test_runs_become_a_row_for_each_label(copied: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        fedmaestro.run(None, overrides={**SMALL, "seed": seed}, out=tmp_path / f"run-{seed}", actors=0)
    folders = ",".join(str(tmp_path / f"run-{seed}") for seed in (0, 1))
    assert book("store", "mine", f"two seeds={folders}", f"one seed={tmp_path / 'run-0'}", "--by", "x", script=copied)
    page = page_of(copied, "scores")
    assert book("pages", script=copied).returncode == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith(("| two", "| one"))]
    assert [line.count("±") > 0 for line in lines] == [True, False]


def test_rows_join_those_that_are_stored_where_nothing_else_differs(copied: Path, tmp_path: Path) -> None:
    for label, seeds in (("a", 1), ("b", 1), ("c", 2)):
        fedmaestro.compare(None, [f"{label}:fjord"], seeds, overrides=SMALL, out=tmp_path / label, actors=0)
    assert book("store", "mine", str(tmp_path / "a"), "--by", "one", script=copied).returncode == 0
    more = ("--by", "two", "--add", "--commit", "0123456789abcdef")
    assert book("store", "mine", str(tmp_path / "b"), *more, script=copied).returncode == 0
    page = page_of(copied, "scores", "provenance")
    assert book("pages", script=copied).returncode == 0
    text = page.read_text()
    assert [line[:3] for line in text.splitlines() if line.startswith("| ")][2:] == ["| a", "| b"]
    assert "two" in text
    assert "2 runs of" in text
    assert "commit `0123456789` (``: a), " in text, "this repository has no commit"
    refused = {"b": "rows b are stored already", "c": "seeds of the stored rows is [0], of these [0, 1]"}
    for label, message in refused.items():
        done = book("store", "mine", str(tmp_path / label), "--by", "x", "--add", script=copied)
        assert done.returncode == 1
        assert message in done.stderr


def test_published_figures_stand_beside_the_largest_tier_or_the_mean_over_tiers(copied: Path, tmp_path: Path) -> None:
    result = fedmaestro.compare(None, ["a:fjord", "b:fjord"], 1, overrides=SMALL, out=tmp_path / "compare", actors=0)
    book("store", "mine", str(tmp_path / "compare"), "--by", "x", script=copied)
    (copied.parent / "validation").mkdir()
    rows = '"a" = { value = 10.0, std = 0.5 }', '"b" = { value = 20.0, of = "tiers" }', '"other" = { value = 1.0 }'
    (copied.parent / "validation" / "published.toml").write_text("\n".join(["[mine]", *rows]))
    page = page_of(copied, "published")
    assert book("pages", script=copied).returncode == 0
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith(("| a", "| b"))]
    a, b = result.results["strategies"]
    largest, mean = 100 * a["tiers"]["flagship"]["best"]["mean"], 100 * b["mean"]["final"]["mean"]
    assert [lines[0][i] for i in (0, 1, 2, 4, 5)] == [
        "a",
        "10.00 ± 0.50",
        f"{largest:.2f}",
        f"{largest - 10:+.2f}",
        "0",
    ]
    assert [lines[1][i] for i in (0, 1, 3, 4, 5)] == ["b", "20.00", f"{mean:.2f}", f"{mean - 20:+.2f}", "0"]


@pytest.mark.parametrize(
    ("name", "view", "message"), [("gone", "scores", "there is no"), ("../gone", "scores", "there is no")]
)
def test_a_block_without_results_is_said(copied: Path, name: str, view: str, message: str) -> None:
    page_of(copied, view, name=name)
    done = book("pages", script=copied)
    assert done.returncode == 1
    assert message in done.stderr
