"""The tables of a comparison: Markdown to read, CSV to compute with.

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
from fedmaestro.report.format import MISSING, Shown, format_bytes, format_count, lost_text
from fedmaestro.report.markdown import escaped as _md
from fedmaestro.report.markdown import table as _table
from fedmaestro.report.tuning import tuned_line, tuned_table
from fedmaestro.runs.records import Results, Scores, Updates
from fedmaestro.runs.records import StrategyResults as Row

Kind = Literal["final", "best"]

BUDGETS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("Devices", "devices", format_count),
    ("MACs per example", "macs_per_example", format_count),
    ("Parameters", "params", format_count),
    ("Down per round and device", "download_bytes", format_bytes),
    ("Up per round and device", "upload_bytes", format_bytes),
    ("Peak training memory", "train_memory_bytes", format_bytes),
    ("Training MACs per example", "train_macs_per_example", format_count),
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
)
_CSV_UPDATES = ("sampled", "failed", "dropped")
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


def overall_stat(results: Results, row: Row, over: Literal["mean", "worst"], kind: Kind) -> Values:
    """Return the main metric over all tiers: their mean, or the worst."""
    return _values(results, getattr(row, over), kind)


def family(row: Row) -> str:
    """Return what a strategy cuts to fit a budget: ``rank`` or ``width``."""
    return "rank" if row.form == "lod" else "width"


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

    overall: tuple[tuple[str, Literal["mean", "worst"], Kind], ...] = (
        ("Mean of tiers", "mean", "final"),
        ("Worst tier", "worst", "final"),
        ("Best round: mean", "mean", "best"),
        ("Best round: worst", "worst", "best"),
    )
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
    if gap is None:
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
    split = "Validation" if results.protocol.get("data.validation") else "Test"
    return f"{split} {show.name}{' in %' if show.metric.percent else ''}{direction}, {SCORE_NOTE}"


def protocol(results: Results) -> dict[str, str]:
    """Return the settings that all cells share, as text, and whether the families' MACs were matched."""
    settings = {
        key: value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in results.protocol.items()
    }
    tuned = {} if results.tuned is None else {"Tuned": tuned_line(results.tuned)}
    return {**settings, "MACs matched between families": "yes" if results.matched_macs else "no", **tuned}


def table_markdown(results: Results) -> str:
    """Return ``table.md``: protocol, seeds, the results in percent and the budgets."""
    settings = ", ".join(f"{_md(key)} = {_md(value)}" for key, value in protocol(results).items())
    lacking = "; ".join(map(_md, unfinished(results)))
    parts = [
        f"# Comparison: {_md(results.experiment)}",
        f"Protocol: {settings}",
        f"Seeds: {', '.join(map(str, results.seeds))}",
        "" if results.complete else f"**Incomplete**{f': {lacking}' if lacking else ''}",
        f"Remark: {_md(remark)}" if (remark := macs_remark(results)) else "",
        "## Results",
        f"{score_note(results)} Bold: the best of a column.",
        _result_table(results),
        "## Budgets",
        "Per example, or per device and round; memory is the peak of a training step.",
        _budget_table(results),
        "" if results.tuned is None else f"## Tuning\n\n{tuned_table(results.tuned)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_csv(results: Results) -> str:
    """Return ``table.csv``: one line per strategy, finished seed and tier, numbers in full precision.

    Shares are fractions; an unknown number is empty; ``ranks`` is JSON. ``sampled``, ``failed`` and ``dropped`` are
    those of the tier, all seeds of the strategy together.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    metric = results.metric.name
    writer.writerow(
        ["strategy", "seed", "tier", f"final_{metric}", f"best_{metric}", *_CSV_BUDGETS, *_CSV_UPDATES, "epsilon"]
    )
    for row in results.strategies:
        for index, seed in enumerate(row.seeds):
            for tier in results.tiers:
                scores = [_nth(tier_stat(results, row, tier, kind), index) for kind in ("final", "best")]
                cells = [_csv_cell(budget(row, tier, key)) for key in _CSV_BUDGETS]
                counts = row.updates.get(tier)
                asked = [getattr(counts, key) if counts else "" for key in _CSV_UPDATES]
                spent = "" if row.epsilon is None else row.epsilon
                writer.writerow([row.name, seed, tier, *scores, *cells, *asked, spent])
    return buffer.getvalue()


def _values(results: Results, scores: Scores | None, kind: Kind) -> Values:
    show = Shown(results.metric)
    if scores is None:
        return Values(show=show)
    stat = scores.final if kind == "final" else scores.best
    known = tuple(map(as_number, stat.values))
    return Values(mean=as_number(stat.mean), std=as_number(stat.std), values=known, show=show)


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


def _result_table(results: Results) -> str:
    columns = score_columns(results)
    lines = []
    for index, row in enumerate(results.strategies):
        note = "" if is_whole(row, results) else f" ({seeds_text(row, results)})"
        cells = [f"**{c.texts[index]}**" if c.best[index] else c.texts[index] for c in columns]
        lost = lost_text(sum(row.updates.values(), Updates()))
        lines.append([_md(row.name) + note, *cells, lost])
    header = ["Strategy", *(_md(column.heading) for column in columns), "Updates lost"]
    return _table(header, lines, text_columns=1)


def _budget_table(results: Results) -> str:
    lines = [
        [
            _md(row.name),
            _md(tier),
            *(to_text(as_number(budget(row, tier, key))) for _, key, to_text in BUDGETS),
            lost_text(row.updates.get(tier)),
        ]
        for row in results.strategies
        for tier in results.tiers
    ]
    header = ["Strategy", "Tier", *(heading for heading, _, _ in BUDGETS), "Updates lost"]
    return _table(header, lines, text_columns=2)
