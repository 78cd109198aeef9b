"""Keep the results of experiments as JSON, and make the tables and figures of the pages from them.

    python experiments/book.py store NAME COMPARISON           what `fedmaestro compare` has left
    python experiments/book.py store NAME LABEL=RUN[,RUN…] …   what `fedmaestro run` has left, a row for each label
                               … --add                         as further rows of a result that is stored already
    python experiments/book.py pages                           writes tables and figures anew (`make results`)
    python experiments/book.py pages --check                   says whether the pages match, and changes nothing
    python experiments/book.py rerun NAME --data-dir DIR       runs the command behind a result again

`results/NAME.json` holds what a comparison's `results.json` does, with the command, commit, versions, processor and
durations. Pages are written by hand but for blocks like

    <!-- results NAME scores -->
    …
    <!-- end -->

whose second word is one of VIEWS. A figure is made beside the page, under figures/.
"""

import argparse
import platform
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import Field

from fedmaestro.report.compare_plots import tier_accuracy_figure
from fedmaestro.report.compare_table import budget_table, result_table
from fedmaestro.report.difference_plot import difference_figure
from fedmaestro.report.difference_table import difference_tables
from fedmaestro.report.figure import svg_text
from fedmaestro.report.format import format_seconds
from fedmaestro.report.text_table import to_markdown
from fedmaestro.runs.folder import RunFolder, write_atomically, write_record
from fedmaestro.runs.reader import read_json, read_toml
from fedmaestro.runs.records import Record, Results, Summary
from fedmaestro.runs.results import FinishedCell, strategy_results

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = (HERE / "README.md", ROOT / "docs" / "validation.md")
PACKAGES = ("fedmaestro", "torch", "numpy", "flwr", "ray")


class Stored(Record):
    """One file of results."""

    format: int = 1
    name: str
    command: str
    """What made it, from the root of the repository; without the folders of data and results."""
    commit: str
    commits: dict[str, str] = Field(default_factory=dict)
    """Of rows that another commit has made, by row."""
    date: str
    """Of storing."""
    python: str
    versions: dict[str, str]
    processor: str
    seconds: dict[str, list[float]]
    """Wall time of every run, by row, one for each seed."""
    results: Results


def store(name: str, sources: Sequence[str], command: str, commit: str = "", *, add: bool = False) -> Path:
    """Write ``results/NAME.json`` of a comparison, or of runs by label; of this commit, unless another one made it.

    With ``add``, rows join those that are stored: long comparisons are made a few rows at a time.
    """
    if len(sources) == 1 and "=" not in sources[0]:
        results, seconds = _of_comparison(Path(sources[0]))
    else:
        results, seconds = _of_runs(name, dict(source.split("=", 1) for source in sources))
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT).stdout
    stored = Stored(
        name=name,
        command=command,
        commit=commit or head.strip(),
        date=datetime.now(UTC).date().isoformat(),
        python=platform.python_version(),
        versions={package: version(package) for package in PACKAGES},
        processor=processor(),
        seconds=seconds,
        results=results,
    )
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_record(path, _joined(read_json(path, Stored), stored) if add else stored)
    return path


def _joined(earlier: Stored, more: Stored) -> Stored:
    """Return a result with the rows of another, which must have the same settings and seeds."""
    for key in ("experiment", "seeds", "tiers", "metric", "matched_macs", "protocol", "analysis"):
        before, now = getattr(earlier.results, key), getattr(more.results, key)
        if before != now:
            sys.exit(f"{more.name}: {key} of the stored rows is {before}, of these {now}: take another name for these")
    if twice := earlier.seconds.keys() & more.seconds.keys():
        sys.exit(f"{more.name}: rows {', '.join(sorted(twice))} are stored already")
    rows = [*earlier.results.strategies, *more.results.strategies]
    results = more.results.model_copy(update={"strategies": rows})
    commits = {row: commit for row, commit in _commits(earlier).items() if commit != more.commit}
    return more.model_copy(update={"results": results, "seconds": earlier.seconds | more.seconds, "commits": commits})


def _commits(stored: Stored) -> dict[str, str]:
    """Return the commit that has made each row."""
    return {row.name: stored.commits.get(row.name, stored.commit) for row in stored.results.strategies}


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _of_comparison(folder: Path) -> tuple[Results, dict[str, list[float]]]:
    results = read_json(folder / "results.json", Results)
    labels = {row["label"]: row for row in read_toml(folder / "compare.toml")["strategies"]}
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for summary in sorted((folder / "cells").glob("*/summary.json")):
        read = read_json(summary, Summary)
        label = next((x for x in labels if summary.parent.name.startswith(f"{x}-seed")), summary.parent.name)
        seconds.setdefault(label, []).append(read.wall_seconds)
    return results, seconds


def _of_runs(name: str, rows: Mapping[str, str]) -> tuple[Results, dict[str, list[float]]]:
    cells = {label: [_cell(Path(folder)) for folder in folders.split(",")] for label, folders in rows.items()}
    first = next(iter(cells.values()))[0].summary
    return Results(
        experiment=name,
        complete=True,
        seeds=sorted({cell.seed for of_row in cells.values() for cell in of_row}),
        tiers=list(first.tiers),
        metric=first.metric,
        matched_macs=False,
        protocol={},
        strategies=[
            strategy_results(
                of_row,
                name=label,
                summary="",
                source="",
                form="",
                submodel="",
                objective="",
                aggregation="",
                server="",
            )
            for label, of_row in cells.items()
        ],
    ), {label: [cell.summary.wall_seconds for cell in of_row] for label, of_row in cells.items()}


def _cell(folder: Path) -> FinishedCell:
    summary = read_json(folder / "summary.json", Summary)
    if summary.interrupted:
        sys.exit(f"{folder} was interrupted: finish it with fedmaestro run --resume")
    return FinishedCell(seed=summary.seed, summary=summary, records=RunFolder(folder).read_rounds())


def scores(stored: Stored) -> str:
    """Return the table of the metric by tier."""
    return _grid(to_markdown(result_table(stored.results)))


def differences(stored: Stored) -> str:
    """Return the table of differences of the mean over tiers."""
    return _grid(to_markdown(difference_tables(stored.results)[0]))


def budgets(stored: Stored) -> str:
    """Return the table of what every tier may spend."""
    return _grid(to_markdown(budget_table(stored.results)))


def provenance(stored: Stored) -> str:
    """Return where a result comes from."""
    runs = [seconds for of_row in stored.seconds.values() for seconds in of_row]
    versions = ", ".join(f"{name} {number}" for name, number in stored.versions.items() if name != "fedmaestro")
    lines = textwrap.wrap(stored.command, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    command = " \\\n".join(lines)
    seeds = ", ".join(map(str, stored.results.seeds))
    took = f"{len(runs)} runs of {format_seconds(min(runs))} to {format_seconds(max(runs))}"
    others = [f"`{commit[:10]}`: {_rows_of(stored, commit)}" for commit in dict.fromkeys(stored.commits.values())]
    commits = f"commit `{stored.commit[:10]}`" + (f" ({'; '.join(others)})" if others else "")
    code = f"{commits}, {stored.date}, Python {stored.python}, {versions}"
    return f"```sh\n{command}\n```\n\nSeeds {seeds}; {took}; {code}; {stored.processor}."


def _rows_of(stored: Stored, commit: str) -> str:
    return ", ".join(row for row, of_row in stored.commits.items() if of_row == commit)


def published(stored: Stored) -> str:
    """Return what is published beside what was reached here, row by row."""
    known = read_toml(HERE / "validation" / "published.toml")[stored.name]
    lines = [
        "| setting | published | ours, best round | ours, final | difference | seeds |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in stored.results.strategies:
        if row.name in known:
            of_tiers = known[row.name].get("of") == "tiers"
            scores = row.mean if of_tiers else next(iter(row.tiers.values()))
            best, final = ([100 * x for x in stat.values if x is not None] for stat in (scores.best, scores.final))
            theirs, spread = known[row.name]["value"], known[row.name].get("std")
            text = f"{theirs:.2f}" if spread is None else f"{theirs:.2f} ± {spread:.2f}"
            gap = f"{statistics.fmean(final if of_tiers else best) - theirs:+.2f}"
            seeds = ", ".join(map(str, row.seeds))
            lines.append(f"| {row.name} | {text} | {_mean(best)} | {_mean(final)} | {gap} | {seeds} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


VIEWS: Mapping[str, Callable[[Stored], str]] = {
    "scores": scores,
    "differences": differences,
    "budgets": budgets,
    "provenance": provenance,
    "published": published,
}
FIGURES = {"figure-tiers": tier_accuracy_figure, "figure-differences": difference_figure}
BLOCK = re.compile(r"<!-- results (\S+) (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def _grid(markdown: str) -> str:
    """Return the note and the table, without the heading: pages have their own."""
    return markdown.partition("\n\n")[2]


def rendered(page: Path) -> tuple[str, dict[Path, str]]:
    """Return a page with its blocks made anew, and the figures that it shows, by their paths."""
    figures: dict[Path, str] = {}

    def block(match: re.Match[str]) -> str:
        name, view = match[1], match[2]
        path = HERE / "results" / f"{name}.json"
        if not path.is_file():
            sys.exit(f"{page}: there is no {path}: store it, or take the block out")
        stored = read_json(path, Stored)
        if view in FIGURES:
            target = page.parent / "figures" / f"{name}-{view.removeprefix('figure-')}.svg"
            figures[target] = svg_text(FIGURES[view](stored.results))
            body = f"![{stored.results.experiment}: {view.removeprefix('figure-')}](figures/{target.name})"
        elif view in VIEWS:
            body = VIEWS[view](stored)
        else:
            sys.exit(f"{page}: results {name} {view}: views are {', '.join([*VIEWS, *FIGURES])}")
        return f"<!-- results {name} {view} -->\n{body}\n<!-- end -->"

    return BLOCK.sub(block, page.read_text(encoding="utf-8")), figures


def pages(*, check: bool) -> list[Path]:
    """Write the pages' tables and figures anew; return what differs from the files, which ``check`` leaves alone."""
    stale = []
    for page in PAGES:
        if not page.is_file():
            continue
        text, figures = rendered(page)
        for path, content in {page: text, **figures}.items():
            # Figures' bytes depend on matplotlib's version: that they are there is all that is checked.
            same = path.is_file() and (path in figures or path.read_text(encoding="utf-8") == content)
            if not same:
                stale.append(path)
            if not check:
                write_atomically(path, content)
    return stale


def rerun(name: str, data_dir: str, out: str) -> int:
    """Run the command behind a result again."""
    stored = read_json(HERE / "results" / f"{name}.json", Stored)
    words = [*shlex.split(stored.command), "--data-dir", data_dir, *(["--out", out] if out else [])]
    print(shlex.join(words), flush=True)
    return subprocess.run(words, cwd=ROOT, check=False).returncode


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    keep = commands.add_parser("store")
    keep.add_argument("name")
    keep.add_argument("sources", nargs="+")
    keep.add_argument("--by", required=True, help="the command that made it")
    keep.add_argument("--commit", default="", help="of the code that made it; this one by default")
    keep.add_argument("--add", action="store_true", help="rows join those that are stored; --by makes all of them")
    write = commands.add_parser("pages")
    write.add_argument("--check", action="store_true")
    again = commands.add_parser("rerun")
    again.add_argument("name")
    again.add_argument("--data-dir", default="../shared/data")
    again.add_argument("--out", default="")
    asked = parser.parse_args()
    if asked.command == "store":
        print(store(asked.name, asked.sources, asked.by, asked.commit, add=asked.add))
        return 0
    if asked.command == "rerun":
        return rerun(asked.name, asked.data_dir, asked.out)
    stale = pages(check=asked.check)
    print("\n".join(f"{'differs' if asked.check else 'written'}: {path}" for path in stale) or "all pages match")
    return 1 if asked.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
