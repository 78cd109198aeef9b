"""One self-contained HTML page about one run or several."""

from collections.abc import Sequence
from pathlib import Path

from fedmaestro.report.accuracy_plot import plot_tier_accuracy
from fedmaestro.report.comparison import comparison, run_names
from fedmaestro.report.facts import full_ranks, rank_history, run_title
from fedmaestro.report.html import document
from fedmaestro.report.rank_plot import plot_tier_ranks
from fedmaestro.report.run_section import run_section
from fedmaestro.runs.folder import write_atomically
from fedmaestro.runs.reader import RunRecord, read_run


def html_report(run_dirs: Sequence[Path | str]) -> str:
    """Return the page about these runs: a comparison when there are several, then a section for each.

    The page loads nothing: plots are inline, and it reads without its script, which only sorts a table.

    Raises:
        UserError: A folder is no run folder, or one of its files is corrupt.

    """
    return _page([read_run(run_dir) for run_dir in run_dirs])


def write_report(run_dirs: Sequence[Path | str], out_path: Path | str) -> Path:
    """Write the page about these runs, making the folder; return its path."""
    page, path = html_report(run_dirs), Path(out_path)
    if path.exists() and not path.is_file():  # a terminal or a pipe is written to, not replaced
        path.write_text(page, encoding="utf-8", newline="\n")
    else:
        write_atomically(path, page)
    return path


def write_run_report(run_dir: Path | str) -> tuple[Path, Path, Path]:
    """Write ``plots/tier_accuracy.png``, ``.svg`` and ``report.html`` in a run folder; return these paths.

    Where ranks could change, ``plots/tier_ranks.png`` and ``.svg`` too.
    """
    run = read_run(run_dir)
    png, svg = plot_tier_accuracy(run.rounds, run.path / "plots" / "tier_accuracy", run_title(run))
    if history := rank_history(run):
        plot_tier_ranks(history, run.path / "plots" / "tier_ranks", full=full_ranks(run), title=run_title(run))
    return png, svg, write_report([run.path], run.path / "report.html")


def _page(runs: Sequence[RunRecord]) -> str:
    assert runs, "a report needs at least one run"
    names, anchors = run_names(runs), [f"run{number}" for number in range(1, len(runs) + 1)]
    title = run_title(runs[0]) if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    sections = [run_section(run, name, anchor) for run, name, anchor in zip(runs, names, anchors, strict=True)]
    if len(runs) > 1:
        sections.insert(0, comparison(runs, names, anchors))
    body = "\n".join(sections)
    return document(title, body)
