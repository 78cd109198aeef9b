"""What the terminal says of a comparison when it is over: the results, what may be said of them, where they lie."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from fedmaestro.flower.compare import Comparison
from fedmaestro.report.compare_files import RESULTS
from fedmaestro.report.difference_table import difference_tables, seeds_note, target_table
from fedmaestro.report.ranking_table import ranking_note, ranking_table
from fedmaestro.report.text_table import TextTable, text_of
from fedmaestro.runs.differences import compared
from fedmaestro.runs.ranking import Ranking
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import Results
from fedmaestro.terminal.display import comparison_table


def print_comparison(console: Console, finished: Comparison) -> bool:
    """Print the tables of a comparison and where its files are; return whether it is complete."""
    if not (parts := finished.parts):
        complete = _print_one(console, finished)
        files = "table.md, table.csv, table.tex, differences.csv, results.json, report.html, plots/"
    else:
        complete = False not in [_print_one(console, part) for part in parts.values()]
        ranks = Ranking.model_validate(finished.ranks)
        if ranks.average:
            console.print(_rich(ranking_table(ranks)))
            console.print(ranking_note(ranks))
        files = "ranks.md, ranks.csv, ranks.tex, ranks.json, plots/, and a folder for each experiment"
    console.print(f"results: {finished.path} ({files})", soft_wrap=True)
    return complete


def _print_one(console: Console, finished: Comparison) -> bool:
    results = read_json(finished.path / RESULTS, Results)
    console.print(comparison_table(results.to_dict()))
    for table in difference_tables(results)[:1]:
        console.print(_rich(table, _OF_DIFFERENCES))
    if note := seeds_note(compared(results)):
        console.print(note)
    if (reached := target_table(results)) is not None:
        console.print(_rich(reached))
    return results.complete


_OF_DIFFERENCES = (0, 2, 4, 6)
"""Columns that fit into eighty characters: the others are in the files."""


def _rich(table: TextTable, columns: Sequence[int] = ()) -> Table:
    columns = columns or range(len(table.header))
    shown = Table(title=table.heading, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        shown.add_column(table.header[column], justify="right" if table.is_number[column] else "left")
    for row in table.rows:
        shown.add_row(*(text_of(row[column]) for column in columns))
    return shown
