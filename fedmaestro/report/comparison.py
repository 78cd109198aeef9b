"""The table that compares several runs."""

from collections.abc import Sequence
from pathlib import Path

from fedmaestro.report.curves import as_number
from fedmaestro.report.facts import headline, mean_and_worst, tier_facts
from fedmaestro.report.format import format_percent
from fedmaestro.report.html import Cell, Content, Markup, escape, table
from fedmaestro.runs.reader import RunRecord


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the shortest ends of the paths, of one depth, that tell the runs apart."""
    paths = [run.path.resolve() for run in runs]
    depth = 1
    while depth < max(len(path.parts) for path in paths) and _shared_names(paths, depth):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def comparison(runs: Sequence[RunRecord], names: Sequence[str], anchors: Sequence[str]) -> str:
    """Return the table of runs: strategy, seed, mean, worst and each tier's final accuracy."""
    tiers = list(dict.fromkeys(tier for run in runs for tier in tier_facts(run)))
    scores = [_scores(run, tiers) for run in runs]
    best = [_best(column) for column in zip(*scores, strict=True)]
    rows = [
        _row(run, _link(run, name, anchor), values, best)
        for run, name, anchor, values in zip(runs, names, anchors, scores, strict=True)
    ]
    header = ["Run", "Strategy", "Objective", "Seed", "Mean over tiers", "Worst tier", *tiers]
    note = "<p>Final test accuracy. Bold: the best of a column. Click a heading to sort.</p>"
    return f"<section>\n<h2>Comparison</h2>\n{note}\n{table(header, rows, sortable=True)}\n</section>"


def _shared_names(paths: Sequence[Path], depth: int) -> bool:
    return len({path.parts[-depth:] for path in paths}) < len(set(paths))


def _link(run: RunRecord, name: str, anchor: str) -> Markup:
    unfinished = "" if run.finished else " (not finished)"
    return Markup(f'<a href="#{anchor}">{escape(name)}</a>{unfinished}')


def _scores(run: RunRecord, tiers: Sequence[str]) -> list[float]:
    facts = tier_facts(run)
    return [*mean_and_worst(run), *(as_number(facts.get(tier, {}).get("final_accuracy")) for tier in tiers)]


def _best(column: Sequence[float]) -> str:
    """Return the best of a column as it is printed: runs that print the same share the mark."""
    known = [value for value in column if value == value]
    return format_percent(max(known, default=None))


def _row(run: RunRecord, link: Markup, scores: Sequence[float], best: Sequence[str]) -> list[Content]:
    facts = headline(run)
    seed = Cell(facts["seed"], float(facts["seed"]) if facts["seed"].isdecimal() else float("nan"))
    cells = [
        Cell(format_percent(score), score, best=score == score and format_percent(score) == top)
        for score, top in zip(scores, best, strict=True)
    ]
    return [link, facts["strategy"], facts["objective"], seed, *cells]
