"""The tables of a comparison: Markdown to read, CSV to compute with, LaTeX to print.

Also what pictures and page share with them: how ``results.json`` is read, and which row is the best of a column.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from fedmaestro.report.curves import as_number
from fedmaestro.report.difference_table import difference_tables, target_table
from fedmaestro.report.format import MISSING, Shown, format_bytes, format_count, format_seconds, lost_share, lost_text
from fedmaestro.report.text_table import Entry, Number, TextTable, md, to_latex, to_markdown
from fedmaestro.report.tuning import tuned_line, tuned_table
from fedmaestro.runs.differences import has_own_tests, tiers_differ_in_size
from fedmaestro.runs.records import OwnTest, Results, Scores, Stat, Updates
from fedmaestro.runs.records import StrategyResults as Row

Kind = Literal["final", "best", "last"]
Over = Literal["mean", "worst", "over_devices"]

BUDGETS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("Devices", "devices", format_count),
    ("MACs per example", "macs_per_example", format_count),
    ("Parameters", "params", format_count),
    ("Down per round and device", "download_bytes", format_bytes),
    ("Up per round and device", "upload_bytes", format_bytes),
    ("Peak training memory", "train_memory_bytes", format_bytes),
    ("Training MACs per example", "train_macs_per_example", format_count),
    ("Virtual time per round", "round_seconds", format_seconds),
)
"""Heading, key in a tier's budget, formatter."""

SCORE_NOTE = (
    "mean ± sample standard deviation over seeds (no ± for one seed); final, tier by tier, unless a column says best "
    "round. Monotone seeds: those in which no tier ends more than 0.5 points below a smaller one. Updates lost: of the "
    "devices that were asked to train, those whose update does not count (failed, rejected, dropped)."
)

_CSV_BUDGETS = (
    "devices",
    "ranks",
    "params",
    "macs_per_example",
    "train_macs_per_example",
    "train_memory_bytes",
    "download_bytes",
    "upload_bytes",
    "round_seconds",
)
_CSV_UPDATES = ("sampled", "failed", "dropped")
_CSV_OWN = ("own_test_mean", "own_test_worst_decile")
_CSV_REACHED = ("round", "bytes", "virtual_seconds")
_SAME_MACS = 0.03  # families whose MACs differ by more than this are not the same budget


@dataclass(frozen=True, kw_only=True)
class Values:
    """The main metric over seeds: mean and sample standard deviation, nan where unknown, and one value per seed."""

    mean: float = math.nan
    std: float = math.nan
    values: tuple[float, ...] = ()
    show: Shown = field(default_factory=Shown)

    @property
    def shown_mean(self) -> float:
        """The mean as pictures show it: in percent, if it is a share."""
        return self.show.factor * self.mean

    @property
    def shown_std(self) -> float:
        """The standard deviation as pictures show it; 0 for one seed."""
        return 0.0 if math.isnan(self.std) else self.show.factor * self.std

    @property
    def mean_text(self) -> str:
        """The mean as tables show it: what prints the same counts as equal."""
        return self.show.number(self.mean)

    @property
    def text(self) -> str:
        """``97.41 ± 0.15``, without the latter for one seed."""
        return self.mean_text if math.isnan(self.std) else f"{self.mean_text} ± {self.show.number(self.std)}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of results, one cell per strategy: text, number (nan where unknown), whether it is the best."""

    heading: str
    texts: Sequence[str]
    values: Sequence[float]
    best: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class MacsGap:
    """At ``tier``, strategy ``more`` has ``excess`` (a fraction) more MACs per example than ``less``."""

    tier: str
    more: Row
    less: Row
    excess: float


def tier_stat(results: Results, row: Row, tier: str, kind: Kind) -> Values:
    """Return the main metric of one tier."""
    return _values(results, row.tiers.get(tier), kind)


def overall_stat(results: Results, row: Row, over: Over, kind: Kind) -> Values:
    """Return the main metric over all tiers: their mean, the worst, or the mean over devices."""
    return _values(results, getattr(row, over), kind)


def values_of(results: Results, stat: Stat | None) -> Values:
    """Return a figure over seeds as tables show it."""
    show = Shown(results.metric)
    if stat is None:
        return Values(show=show)
    known = tuple(map(as_number, stat.values))
    return Values(mean=as_number(stat.mean), std=as_number(stat.std), values=known, show=show)


def family(row: Row) -> str:
    """Return what a strategy cuts to fit a budget: ``rank``, ``width``, ``rank and width``, or ``other``."""
    cut = row.submodel.partition(",")[0]
    return cut if cut in ("rank", "width", "rank and width") else "other"


def seeds_text(row: Row, results: Results) -> str:
    """Return how many of the comparison's seeds a strategy has finished: ``1 of 3 seeds``."""
    return f"{len(row.seeds)} of {len(results.seeds)} seeds"


def is_whole(row: Row, results: Results) -> bool:
    """Whether a strategy has finished all seeds."""
    return len(row.seeds) == len(results.seeds)


def unfinished(results: Results) -> list[str]:
    """Return ``name: 1 of 3 seeds`` for every strategy that lacks a seed."""
    rows = (row for row in results.strategies if not is_whole(row, results))
    return [f"{row.name}: {seeds_text(row, results)}" for row in rows]


def score_columns(results: Results) -> list[Column]:
    """Return the columns of the result table: the main metric and, last, the monotone seeds."""
    rows, show = results.strategies, Shown(results.metric)

    def column(heading: str, stats: list[Values]) -> Column:
        best = _are_best([stat.mean for stat in stats], [stat.mean_text for stat in stats], show)
        return Column(heading=heading, texts=[s.text for s in stats], values=[s.mean for s in stats], best=best)

    overall: list[tuple[str, Over, Kind]] = [("Mean of tiers", "mean", "final"), ("Worst tier", "worst", "final")]
    if tiers_differ_in_size(results):
        overall.append(("Mean of devices", "over_devices", "final"))
    if (last := results.analysis.last) > 1:
        overall += [(f"Last {last}: mean", "mean", "last"), (f"Last {last}: worst", "worst", "last")]
    overall += [("Best round: mean", "mean", "best"), ("Best round: worst", "worst", "best")]
    columns = [column(tier, [tier_stat(results, row, tier, "final") for row in rows]) for tier in results.tiers]
    for heading, over, kind in overall:
        columns.append(column(heading, [overall_stat(results, row, over, kind) for row in rows]))
    columns.append(_monotone_column(rows))
    return [*columns, _epsilon_column(rows)] if any(row.epsilon is not None for row in rows) else columns


def macs_gap(results: Results) -> MacsGap | None:
    """Return the largest difference in MACs per example between two families at one tier, if it is above 3 %.

    A strategy that serves the smallest tier's model to every tier is left out: its MACs differ by design.
    """
    rows = [row for row in results.strategies if "smallest" not in re.split(r"\W+", row.submodel)]
    pairs = [pair for pair in combinations(rows, 2) if family(pair[0]) != family(pair[1])]
    gaps = [gap for tier in results.tiers for pair in pairs if (gap := _gap(tier, *pair)) is not None]
    worst = max(gaps, key=lambda gap: gap.excess, default=None)
    return worst if worst is not None and worst.excess > _SAME_MACS else None


def macs_remark(results: Results) -> str:
    """Return `macs_gap` as a sentence; empty where there is none."""
    gap = macs_gap(results)
    if gap is None or results.protocol.get("fleet.match-by", "macs") != "macs":
        return ""
    more, less = (f"{row.name} ({family(row)})" for row in (gap.more, gap.less))
    limit = f"{100 * _SAME_MACS:.0f} %"
    return (
        f"MACs per tier differ by more than {limit} between families. "
        f"Worst at tier {gap.tier}: {more} has {100 * gap.excess:.1f} % more MACs per example than {less}."
    )


def score_note(results: Results) -> str:
    """Return what the numbers of the result table are."""
    show = Shown(results.metric)
    direction = "" if show.metric.higher_is_better else " (lower is better)"
    note = f"{split(results).capitalize()} {show.name}{' in %' if show.metric.percent else ''}{direction}, {SCORE_NOTE}"
    if tiers_differ_in_size(results):
        note += " Mean of devices: tiers weighted by how many devices they have."
    last = results.analysis.last
    return note if last == 1 else f"{note} Last {last}: mean of the last {last} evaluated rounds."


def split(results: Results) -> str:
    """Return what the values are of: ``test``, or ``validation`` (``data.validation``)."""
    return "validation" if results.protocol.get("data.validation") else "test"


def protocol(results: Results) -> dict[str, str]:
    """Return the settings that all cells share, as text, and whether the families' MACs were matched."""
    settings = {
        key: value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in results.protocol.items()
    }
    tuned = {} if results.tuned is None else {"Tuned": tuned_line(results.tuned)}
    return {**settings, "MACs matched between families": "yes" if results.matched_macs else "no", **tuned}


def table_markdown(results: Results) -> str:
    """Return ``table.md``: protocol, seeds, the results in percent, what may be said of them, and the budgets."""
    settings = ", ".join(f"{md(key)} = {md(value)}" for key, value in protocol(results).items())
    lacking = "; ".join(map(md, unfinished(results)))
    tables = [result_table(results), *further_tables(results), budget_table(results)]
    parts = [
        f"# Comparison: {md(results.experiment)}",
        f"Protocol: {settings}",
        f"Seeds: {', '.join(map(str, results.seeds))}",
        "" if results.complete else f"**Incomplete**{f': {lacking}' if lacking else ''}",
        f"Remark: {md(remark)}" if (remark := macs_remark(results)) else "",
        *map(to_markdown, tables),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_latex(results: Results) -> str:
    """Return ``table.tex``: the results and what may be said of them, for the package booktabs."""
    tables = [result_table(results), *further_tables(results)]
    names = [f"{results.experiment}-{index}" for index in range(1, len(tables) + 1)]
    head = f"% Comparison: {' '.join(results.experiment.split())}; needs \\usepackage{{booktabs}}"
    return "\n\n".join([head, *map(to_latex, tables, names)]) + "\n"


def table_csv(results: Results) -> str:
    """Return ``table.csv``: one line per strategy, finished seed and tier, numbers in full precision.

    Shares are fractions; an unknown number is empty; ``ranks`` is JSON. ``sampled``, ``failed`` and ``dropped`` are
    those of the tier, all seeds of the strategy together. ``last_METRIC`` is what rows are compared by: the mean of the
    last evaluated rounds. ``own_test…`` is of the tier's devices on their own test examples; ``target…`` of the whole
    run: yes, no, or empty where there was none.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    metric = results.metric.name
    scores = [f"final_{metric}", f"best_{metric}"]
    added = [f"last_{metric}", *_CSV_OWN, "target_reached", *(f"target_{key}" for key in _CSV_REACHED)]
    writer.writerow(["strategy", "seed", "tier", *scores, *_CSV_BUDGETS, *_CSV_UPDATES, "epsilon", *added])
    for row in results.strategies:
        for index, seed in enumerate(row.seeds):
            for tier in results.tiers:
                scored = [_nth(tier_stat(results, row, tier, kind), index) for kind in ("final", "best")]
                cells = [_csv_cell(budget(row, tier, key)) for key in _CSV_BUDGETS]
                counts = row.updates.get(tier)
                asked = [getattr(counts, key) if counts else "" for key in _CSV_UPDATES]
                spent = "" if row.epsilon is None else row.epsilon
                more = _added(results, row, tier, index)
                writer.writerow([row.name, seed, tier, *scored, *cells, *asked, spent, *more])
    return buffer.getvalue()


def _added(results: Results, row: Row, tier: str, index: int) -> list[object]:
    """Return what a line of ``table.csv`` says of the last rounds, the devices' own tests and the target."""
    own = row.own_test.get(tier, OwnTest())
    stats = [row.tiers[tier].judged if tier in row.tiers else None, own.mean, own.worst_decile]
    scores = [_nth(values_of(results, stat), index) for stat in stats]
    if not row.reached:
        return [*scores, "", *("" for _ in _CSV_REACHED)]
    reached = row.reached[index]
    return [*scores, "no" if reached is None else "yes", *(getattr(reached, key, "") for key in _CSV_REACHED)]


def _values(results: Results, scores: Scores | None, kind: Kind) -> Values:
    return values_of(results, None if scores is None else getattr(scores, kind))


def _nth(stat: Values, index: int) -> float | str:
    value = stat.values[index] if index < len(stat.values) else math.nan
    return "" if math.isnan(value) else value


def budget(row: Row, tier: str, key: str) -> Any:
    """Return what a tier may spend of something under a strategy; None where it is unknown."""
    return getattr(row.budgets[tier], key) if tier in row.budgets else None


def _csv_cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value


def _monotone_column(rows: Sequence[Row]) -> Column:
    counts = [(as_number(row.monotone_seeds), len(row.seeds)) for row in rows]
    known = [seeds > 0 and not math.isnan(count) for count, seeds in counts]
    texts = [f"{n:.0f} of {seeds}" if ok else MISSING for (n, seeds), ok in zip(counts, known, strict=True)]
    values = [n / seeds if ok else math.nan for (n, seeds), ok in zip(counts, known, strict=True)]
    return Column(
        heading="Monotone seeds", texts=texts, values=values, best=_are_best(values, list(map(str, values)), Shown())
    )


def _epsilon_column(rows: Sequence[Row]) -> Column:
    texts = [MISSING if row.epsilon is None else f"{row.epsilon:.3g}" for row in rows]
    return Column(
        heading="Privacy ε", texts=texts, values=[as_number(row.epsilon) for row in rows], best=[False] * len(rows)
    )


def _are_best(values: Sequence[float], texts: Sequence[str], show: Shown) -> list[bool]:
    """Return which values print the same as the best; none is the best of fewer than two."""
    known = {value: text for value, text in zip(values, texts, strict=True) if not math.isnan(value)}
    best = show.metric.best(known) if sum(not math.isnan(value) for value in values) > 1 else None
    top = None if best is None else known[best]
    return [text == top for text in texts]


def _gap(tier: str, left: Row, right: Row) -> MacsGap | None:
    macs = [as_number(budget(row, tier, "macs_per_example")) for row in (left, right)]
    if not min(macs) > 0:
        return None
    more, less = (left, right) if macs[0] >= macs[1] else (right, left)
    return MacsGap(tier=tier, more=more, less=less, excess=max(macs) / min(macs) - 1)


def result_table(results: Results) -> TextTable:
    """Return the main table: the metric per tier and overall, and the updates lost."""
    columns = score_columns(results)

    def entries(index: int, row: Row) -> list[Entry]:
        note = "" if is_whole(row, results) else f" ({seeds_text(row, results)})"
        scores = [Number(column.texts[index], column.values[index], column.best[index]) for column in columns]
        return [row.name + note, *scores, _lost(sum(row.updates.values(), Updates()))]

    return TextTable(
        heading="Results",
        note=f"{score_note(results)} Bold: the best of a column.",
        header=["Strategy", *(column.heading for column in columns), "Updates lost"],
        rows=[entries(index, row) for index, row in enumerate(results.strategies)],
    )


def own_test_table(results: Results) -> TextTable | None:
    """Return what devices reach on their own test examples; None where they have none."""
    if not has_own_tests(results):
        return None

    def entry(stat: Stat | None) -> Number:
        values = values_of(results, stat)
        return Number(values.text, values.mean)

    def entries(row: Row) -> list[Entry]:
        tests = [row.own_test.get(tier, OwnTest()) for tier in results.tiers]
        means, worst = ([entry(getattr(test, key)) for test in tests] for key in ("mean", "worst_decile"))
        return [row.name, entry(row.own_test_mean), *means, *worst]

    return TextTable(
        heading="Devices' own tests",
        note="The model that serves a tier, on the own test examples of its devices, in the last round that tested "
        "them: mean over all devices, over those of each tier, and over the worst tenth of these.",
        header=["Strategy", "All devices", *results.tiers, *(f"{tier}: worst tenth" for tier in results.tiers)],
        rows=[entries(row) for row in results.strategies],
    )


def further_tables(results: Results) -> list[TextTable]:
    """Return the tables that say what may be said of the results: differences, target, own tests, tuning."""
    tuned = None if results.tuned is None else tuned_table(results.tuned)
    more = (target_table(results), own_test_table(results), tuned)
    return [*difference_tables(results), *(table for table in more if table is not None)]


def budget_table(results: Results) -> TextTable:
    """Return what every tier may spend under every strategy."""

    def entries(row: Row, tier: str) -> list[Entry]:
        values = [(as_number(budget(row, tier, key)), to_text) for _, key, to_text in BUDGETS]
        return [row.name, tier, *(Number(to_text(x), x) for x, to_text in values), _lost(row.updates.get(tier))]

    return TextTable(
        heading="Budgets",
        note="Per example, or per device and round; memory is the peak of a training step.",
        header=["Strategy", "Tier", *(heading for heading, _, _ in BUDGETS), "Updates lost"],
        rows=[entries(row, tier) for row in results.strategies for tier in results.tiers],
    )


def _lost(updates: Updates | None) -> Number:
    return Number(lost_text(updates), lost_share(updates))
