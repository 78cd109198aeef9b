"""What may be said of the rows of a comparison: their differences from a baseline, and when they reach a target.

``difference_tables`` and ``target_table`` are data that a page can show with one loop; ``differences_csv`` has all of
it in full precision.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence

from fedmaestro.report.format import MISSING, Shown, format_bytes, format_seconds
from fedmaestro.report.text_table import Entry, Number, TextTable
from fedmaestro.runs.differences import Compared, compared, margin_of
from fedmaestro.runs.records import Results
from fedmaestro.runs.records import StrategyResults as Row
from fedmaestro.stats.paired import EXACT_SEEDS, seeds_needed, smallest_p
from fedmaestro.stats.verdict import Difference, Verdict

_CSV = (
    "measure",
    "strategy",
    "baseline",
    "seeds",
    "difference",
    "half_width_95",
    "p",
    "p_holm",
    "p_level",
    "p_level_holm",
    "margin",
    "verdict",
    "differences",
)


def difference_tables(results: Results) -> list[TextTable]:
    """Return two tables: the mean over tiers with all its tests, and every other measure in short."""
    found = compared(results)
    return [_in_full(results, found[0]), _in_short(results, found[1:])] if found else []


def target_table(results: Results) -> TextTable | None:
    """Return when and at what cost the mean over tiers reaches the target; None where there is no target."""
    target, show = results.analysis.target, Shown(results.metric)
    if target is None:
        return None
    return TextTable(
        heading=f"Mean of tiers reaches {show.number(target)}{show.unit}",
        note="Evaluated rounds only. Medians over seeds, in which a seed that never reaches it counts as later than "
        "all others; traffic of all devices, down and up.",
        header=["Strategy", "Seeds that reach it", "Round", "Traffic", "Virtual time"],
        rows=[_reaching(row) for row in results.strategies],
    )


def differences_csv(results: Results) -> str:
    """Return ``differences.csv``: one line per measure and row, in the metric's own unit (shares are fractions)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV)
    margin = margin_of(results)
    for family in compared(results):
        for x in family.differences:
            seeds, values = " ".join(map(str, x.seeds)), json.dumps(x.differences)
            tests = [x.mean, x.half_width, x.p, x.p_holm, x.p_level, x.p_level_holm, margin]
            known = ["" if value is None else value for value in tests]
            writer.writerow([family.measure.name, x.row, family.baseline, seeds, *known, x.verdict.value, values])
    return buffer.getvalue()


def p_text(p: float | None) -> str:
    """Return a p value with three significant digits."""
    return MISSING if p is None else "<0.001" if p < 0.001 else f"{p:.3g}"


def difference_text(show: Shown, difference: Difference) -> str:
    """Return ``+0.31 ± 0.12``: mean and half of the 95 % interval, shares in points."""
    if difference.mean is None:
        return MISSING
    sign = "-" if difference.mean < 0 else "+"
    mean = f"{sign}{show.number(abs(difference.mean))}"
    return mean if difference.half_width is None else f"{mean} ± {show.number(difference.half_width)}"


def verdict_text(difference: Difference) -> str:
    """Return the verdict in words, with the smallest p that so few seeds can give."""
    few = difference.verdict is Verdict.TOO_FEW_SEEDS
    return difference.verdict.value + (f" (p ≥ {p_text(difference.least_p)})" if few else "")


def seeds_note(found: Sequence[Compared]) -> str:
    """Return what so few seeds cannot show; empty where they are enough."""
    few = [x for x in found[0].differences if x.verdict is Verdict.TOO_FEW_SEEDS] if found else []
    if not few:
        return ""
    rows = sum(x.p is not None for x in found[0].differences)
    seeds = max(len(x.seeds) for x in few)
    after = f", or {smallest_p(seeds, rows):.3g} after Holm's adjustment over {rows} rows" if rows > 1 else ""
    return (
        f"Too few seeds for a claim: with {seeds} no p can be below {smallest_p(seeds):.3g}{after}. "
        f"It takes at least {seeds_needed(rows)}."
    )


def _in_full(results: Results, family: Compared) -> TextTable:
    show = Shown(results.metric)

    def entries(x: Difference) -> list[Entry]:
        p_values = [Number(p_text(p), math.nan if p is None else p) for p in (x.p, x.p_holm, x.p_level_holm)]
        mean = math.nan if x.mean is None else show.factor * x.mean
        seeds = Number(str(len(x.seeds)), len(x.seeds))
        return [x.row, seeds, Number(difference_text(show, x), mean), *p_values, verdict_text(x)]

    return TextTable(
        heading=f"Differences from {family.baseline}: {_lower(family.measure.heading)}",
        note=_note(results, family),
        header=["Strategy", "Seeds", f"Difference{' in points' if show.metric.percent else ''}", *_TESTS, "Verdict"],
        rows=list(map(entries, family.differences)),
    )


_TESTS = ("p", "p (Holm)", "p level (Holm)")


def _in_short(results: Results, families: Sequence[Compared]) -> TextTable:
    show = Shown(results.metric)

    def entry(x: Difference) -> Number:
        claim = x.verdict if x.verdict.differs or x.verdict is Verdict.LEVEL else ""
        text = " ".join(filter(None, (difference_text(show, x), claim)))
        return Number(text, math.nan if x.mean is None else show.factor * x.mean)

    by_row = zip(*(family.differences for family in families), strict=True)
    return TextTable(
        heading=f"Differences from {families[0].baseline}: other measures",
        note="As above, each column with its own tests: a word stands only where there is a claim.",
        header=["Strategy", *(family.measure.heading for family in families)],
        rows=[[row[0].row, *map(entry, row)] for row in by_row],
    )


def _note(results: Results, family: Compared) -> str:
    show, last = Shown(results.metric), results.analysis.last
    judged = "final values" if last == 1 else f"means of the last {last} evaluated rounds"
    margin = margin_of(results)
    lower = "" if show.metric.higher_is_better else " Lower is better: below is better."
    within = (
        "no margin of equivalence was given (--margin), so nothing is called level"
        if margin is None
        else f"p level: two one-sided t tests that the difference is within ±{show.number(margin)}"
        f"{' points' if show.metric.percent else ''}"
    )
    most = max(len(x.seeds) for x in family.differences)
    exact = "exact" if most <= EXACT_SEEDS else "randomised"
    note = (
        f"Row minus {family.baseline}, paired by seed, {judged}: mean ± half of the 95 % t interval. p: {exact} "
        f"sign-flip test, two-sided; {within}. Holm: adjusted over the rows.{lower}"
    )
    return " ".join(filter(None, (note, seeds_note([family]))))


def _reaching(row: Row) -> list[Entry]:
    reached = [x for x in row.reached if x is not None]
    missed = [math.inf] * (len(row.reached) - len(reached))

    def median(key: str) -> float:
        values = [float(getattr(x, key)) for x in reached]
        return statistics.median([*values, *missed]) if values or missed else math.nan

    count = Number(f"{len(reached)} of {len(row.reached)}", len(reached)) if row.reached else Number(MISSING)
    shown = (("round", "{:g}".format), ("bytes", format_bytes), ("virtual_seconds", format_seconds))
    medians = [(median(key), to_text) for key, to_text in shown]
    return [row.name, count, *(Number(_median_text(x, to_text), x) for x, to_text in medians)]


def _median_text(value: float, to_text: Callable[[float], str]) -> str:
    if math.isinf(value):
        return "not reached"
    return MISSING if math.isnan(value) else to_text(value)


def _lower(heading: str) -> str:
    return heading[:1].lower() + heading[1:]
