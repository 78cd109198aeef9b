"""The table that compares several runs."""

from collections.abc import Sequence
from pathlib import Path

from fedmaestro.report.curves import as_number
from fedmaestro.report.facts import headline, mean_and_worst, shown, tier_facts
from fedmaestro.report.format import Shown
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
    """Return the table of runs: strategy, seed, mean, worst and each tier's final value of the main metric."""
    tiers = list(dict.fromkeys(tier for run in runs for tier in tier_facts(run)))
    scores = [_scores(run, tiers) for run in runs]
    names_of_metrics = list(dict.fromkeys(shown(run).name for run in runs))
    # Columns of different metrics have no best one.
    show = shown(runs[0]) if len(names_of_metrics) == 1 else None
    best = [_best(column, show) for column in zip(*scores, strict=True)]
    rows = [
        _row(run, _link(run, name, anchor), values, best)
        for run, name, anchor, values in zip(runs, names, anchors, scores, strict=True)
    ]
    header = ["Run", "Strategy", "Objective", "Seed", "Mean over tiers", "Worst tier", *tiers]
    metrics = escape(", ".join(names_of_metrics))
    note = f"<p>Final test {metrics}. Bold: the best of a column. Click a heading to sort.</p>"
    return f"<section>\n<h2>Comparison</h2>\n{note}\n{table(header, rows, sortable=True)}\n</section>"


def _shared_names(paths: Sequence[Path], depth: int) -> bool:
    return len({path.parts[-depth:] for path in paths}) < len(set(paths))


def _link(run: RunRecord, name: str, anchor: str) -> Markup:
    unfinished = "" if run.finished else " (not finished)"
    return Markup(f'<a href="#{anchor}">{escape(name)}</a>{unfinished}')


def _scores(run: RunRecord, tiers: Sequence[str]) -> list[float]:
    facts = tier_facts(run)
    return [*mean_and_worst(run), *(as_number(facts.get(tier, {}).get("final")) for tier in tiers)]


def _best(column: Sequence[float], show: Shown | None) -> str:
    """Return the best of a column as it is printed: runs that print the same share the mark."""
    if show is None:
        return ""
    return show.text(show.metric.best(value for value in column if value == value))


def _row(run: RunRecord, link: Markup, scores: Sequence[float], best: Sequence[str]) -> list[Content]:
    facts, show = headline(run), shown(run)
    seed = Cell(facts["seed"], float(facts["seed"]) if facts["seed"].isdecimal() else float("nan"))
    cells = [
        Cell(show.text(score), score, best=score == score and show.text(score) == top)
        for score, top in zip(scores, best, strict=True)
    ]
    return [link, facts["strategy"], facts["objective"], seed, *cells]
