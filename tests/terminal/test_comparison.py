"""What is said in the end of a comparison, in eighty columns."""

import io
from pathlib import Path

import pytest
from reports import make_results, make_row
from rich.console import Console

from fedmaestro.flower.compare import Comparison
from fedmaestro.report.compare_files import EXPERIMENTS, write_ranks
from fedmaestro.runs.folder import write_atomically, write_record
from fedmaestro.runs.ranking import ranking
from fedmaestro.runs.records import Analysis, Results
from fedmaestro.terminal.comparison import print_comparison


def said(folder: Path, complete: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80)
    assert print_comparison(console, Comparison(folder)) is complete
    assert max(map(len, out.getvalue().splitlines()[:-1])) <= 80
    return out.getvalue()


def write(folder: Path, results: Results) -> Results:
    write_record(folder / "results.json", results)
    return results


@pytest.mark.parametrize("seeds", [3, 8])
def test_results_differences_and_target(tmp_path: Path, seeds: int) -> None:
    write(tmp_path, make_results(3, seeds=range(seeds), analysis=Analysis(target=0.9)))
    text = said(tmp_path, complete=True)
    assert "Differences from nested: mean of tiers" in text
    assert "Mean of tiers reaches 90.00 %" in text
    assert ("Too few seeds for a claim" in text) == (seeds == 3)
    assert f"results: {tmp_path} (table.md, table.csv, table.tex" in text


def test_several_experiments_end_with_their_ranks(tmp_path: Path) -> None:
    lacking = make_results([make_row("a", 0), make_row("b", 1, seeds=[0])])
    parts = {"x": make_results([make_row("a", 0), make_row("b", 1)]), "late": lacking}
    for name, results in parts.items():
        write(tmp_path / name, results)
    write_atomically(tmp_path / EXPERIMENTS, 'experiments = ["x", "late"]')
    write_ranks(ranking(parts), tmp_path)
    text = said(tmp_path, complete=False)
    assert text.count("Differences from a") == 2
    assert "Ranks over experiments" in text
    assert "Critical difference of average ranks" in " ".join(text.split())
