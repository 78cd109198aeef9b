"""All files of a comparison, of one experiment or of several, written from ``results.json`` and ``ranks.json``."""

from collections.abc import Mapping
from pathlib import Path

from fedmaestro.errors import UserError
from fedmaestro.places import file_name
from fedmaestro.report.compare_page import write_comparison
from fedmaestro.report.compare_table import table_latex
from fedmaestro.report.difference_plot import critical_difference_figure
from fedmaestro.report.difference_table import differences_csv
from fedmaestro.report.figure import save_figure
from fedmaestro.report.ranking_table import ranking_csv, ranking_latex, ranking_markdown
from fedmaestro.runs.folder import write_atomically, write_record
from fedmaestro.runs.ranking import Ranking, ranking
from fedmaestro.runs.reader import read_json, read_toml
from fedmaestro.runs.records import Results

RESULTS, RANKS, EXPERIMENTS = "results.json", "ranks.json", "experiments.toml"


def write_files(results: Results, folder: Path) -> None:
    """Write tables, plots and page of a comparison beside its ``results.json``."""
    write_comparison(results, folder)
    write_atomically(folder / "table.tex", table_latex(results))
    write_atomically(folder / "differences.csv", differences_csv(results))


def write_ranks(ranks: Ranking, folder: Path) -> None:
    """Write the tables of ranks over experiments and their picture, beside the folders of these."""
    write_record(folder / RANKS, ranks)
    texts = {"ranks.md": ranking_markdown(ranks), "ranks.csv": ranking_csv(ranks), "ranks.tex": ranking_latex(ranks)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    if ranks.average:
        save_figure(critical_difference_figure(ranks), folder / "plots" / "critical_difference")


def is_comparison(folder: Path) -> bool:
    """Return whether a comparison has left its results here, of one experiment or of several."""
    return (folder / RESULTS).is_file() or (folder / EXPERIMENTS).is_file()


def parts_of(folder: Path) -> list[str]:
    """Return the experiments of a comparison of several, in their order; none of one."""
    path = folder / EXPERIMENTS
    names = read_toml(path).get("experiments", []) if path.is_file() else []
    if not isinstance(names, list) or not all(isinstance(name, str) and name == file_name(name) for name in names):
        raise UserError(f"{path}: experiments is no list of folders beside it")
    return names


def report_comparison(folder: Path) -> Path:
    """Write all files of a comparison anew from its results and return the first one to read.

    Raises:
        UserError: they cannot be read.
    """
    if not (parts := parts_of(folder)):
        write_files(_read(folder), folder)
        return folder / "report.html"
    write_parts({name: _read(folder / name) for name in parts}, folder)
    return folder / "ranks.md"


def write_parts(comparisons: Mapping[str, Results], folder: Path) -> None:
    """Write the files of every comparison that has a finished cell, and the ranks over all of them."""
    for name, results in comparisons.items():
        if any(row.seeds for row in results.strategies):
            write_files(results, folder / name)
    write_ranks(ranking(comparisons), folder)


def _read(folder: Path) -> Results:
    results = read_json(folder / RESULTS, Results)
    if not results.strategies:
        raise UserError(f"{folder / RESULTS}: strategies is empty")
    return results
