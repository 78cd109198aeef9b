"""The ranks of rows over several experiments: Markdown to read, CSV to compute with, LaTeX to print."""

import csv
import io

from fedmaestro.report.difference_table import p_text
from fedmaestro.report.format import Shown
from fedmaestro.report.text_table import Entry, Number, TextTable, md, to_latex, to_markdown
from fedmaestro.runs.ranking import Ranking
from fedmaestro.runs.records import MetricFacts
from fedmaestro.stats.paired import ALPHA
from fedmaestro.stats.ranks import ENOUGH_SETTINGS


def ranking_table(ranks: Ranking) -> TextTable:
    """Return a row per strategy, best average rank first: in every setting its value and its rank."""
    best = [min(setting.ranks) for setting in ranks.settings]

    def entries(index: int) -> list[Entry]:
        cells = [
            Number(
                f"{Shown(setting.metric).number(setting.values[index])} ({setting.ranks[index]:g})",
                setting.ranks[index],
                setting.ranks[index] == top,
            )
            for setting, top in zip(ranks.settings, best, strict=True)
        ]
        return [ranks.rows[index], Number(f"{ranks.average[index]:.2f}", ranks.average[index]), *cells]

    order = sorted(range(len(ranks.average)), key=lambda index: ranks.average[index])
    return TextTable(
        heading="Ranks over experiments",
        note=f"Means over tiers and {ranks.seeds} seeds{_of_one_metric(ranks)}, in brackets their ranks, 1 for the "
        f"best. {ranking_note(ranks)}",
        header=["Strategy", "Average rank", *(_heading(ranks, index) for index in range(len(ranks.settings)))],
        rows=[entries(index) for index in order],
    )


def ranking_note(ranks: Ranking) -> str:
    """Return Friedman's test of the ranks, and which rows do not differ."""
    if ranks.p is None:
        return "There is nothing to rank yet: it takes two rows, and an experiment in which all have finished."
    return " ".join(filter(None, (friedman_note(ranks), _groups(ranks))))


def friedman_note(ranks: Ranking) -> str:
    """Return Friedman's test of the ranks, and what so few settings cannot show; empty where there are no ranks."""
    if ranks.p is None or ranks.chi_squared is None or ranks.critical_difference is None:
        return ""
    f = "" if ranks.f is None else f", F = {ranks.f:.3g} (Iman and Davenport)"
    parts = [
        f"Friedman's test: χ² = {ranks.chi_squared:.3g}{f}, {_equals(ranks.p)}.",
        f"Critical difference of average ranks (Nemenyi, .05): {ranks.critical_difference:.2f}.",
    ]
    if ranks.p > ALPHA:
        parts.append("The test does not reject: no two strategies are told apart.")
    if len(ranks.settings) < ENOUGH_SETTINGS:
        parts.append(
            f"Too few experiments for a claim: {len(ranks.settings)} describe, it takes {ENOUGH_SETTINGS} or more "
            f"(no p can be below {p_text(ranks.smallest_p)} here)."
        )
    return " ".join(parts)


def ranking_markdown(ranks: Ranking) -> str:
    """Return ``ranks.md``."""
    parts = [
        f"# Comparison over {len(ranks.settings)} experiments",
        f"Seeds of each: {ranks.seeds}",
        f"**Left out**, as a strategy lacks a seed or a value: {', '.join(map(md, ranks.left_out))}"
        if ranks.left_out
        else "",
        to_markdown(ranking_table(ranks)) if ranks.average else ranking_note(ranks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ranking_latex(ranks: Ranking) -> str:
    """Return ``ranks.tex``, for the package booktabs."""
    head = "% Ranks over experiments; needs \\usepackage{booktabs}"
    return "\n\n".join([head, *([to_latex(ranking_table(ranks), "ranks")] if ranks.average else [])]) + "\n"


def ranking_csv(ranks: Ranking) -> str:
    """Return ``ranks.csv``: one line per strategy and experiment, numbers in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["strategy", "experiment", "metric", "mean", "rank", "average_rank"])
    for at, average in enumerate(ranks.average):
        for setting in ranks.settings:
            scores = [setting.values[at], setting.ranks[at], average]
            writer.writerow([ranks.rows[at], setting.name, setting.metric.name, *scores])
    return buffer.getvalue()


def _equals(p: float) -> str:
    text = p_text(p)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def _of_one_metric(ranks: Ranking) -> str:
    """Return what all values are, where that is one thing."""
    return f" ({_in_words(ranks.settings[0].metric)})" if len(_metrics(ranks)) == 1 else ""


def _heading(ranks: Ranking, index: int) -> str:
    setting = ranks.settings[index]
    return setting.name if len(_metrics(ranks)) == 1 else f"{setting.name} ({_in_words(setting.metric)})"


def _metrics(ranks: Ranking) -> set[str]:
    return {_in_words(setting.metric) for setting in ranks.settings}


def _in_words(metric: MetricFacts) -> str:
    return Shown(metric).heading + ("" if metric.higher_is_better else ", lower is better")


def _groups(ranks: Ranking) -> str:
    """Return which rows are not told apart, where the test tells some apart at all."""
    if ranks.p is None or ranks.p > ALPHA:
        return ""
    groups = "; ".join(", ".join(group) for group in ranks.cliques)
    return f"Not told apart: {groups}." if groups else "All strategies are told apart."
