"""From the results of a comparison to what may be said of its rows: every measure, every row beside the baseline.

Pure functions of ``results.json``, so what an older version has written is judged too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedmaestro.runs.records import Results, Stat, StrategyResults
from fedmaestro.stats.verdict import Difference, differences_from

SHARE_MARGIN = 0.005
"""Half a point: smaller differences between shares count as none, unless another margin is given."""

_NONE = Stat()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What rows are compared by.

    Attributes:
        name: in files: ``mean``, ``worst``, ``devices``, ``own-test`` or ``tier NAME``.
        heading: in tables.
        of: its values over the seeds of a row.
    """

    name: str
    heading: str
    of: Callable[[StrategyResults], Stat]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """All rows beside the baseline by one measure: one family of tests."""

    measure: Measure
    baseline: str
    differences: tuple[Difference, ...]


def measures(results: Results) -> list[Measure]:
    """Return what can be compared, the mean over tiers first.

    The mean over devices is left out where tiers are of one size (it is the mean over tiers), and the devices' own test
    where they have none.
    """
    found = [
        Measure(name="mean", heading="Mean of tiers", of=lambda row: row.mean.judged),
        Measure(name="worst", heading="Worst tier", of=lambda row: row.worst.judged),
    ]
    if tiers_differ_in_size(results):
        found.append(Measure(name="devices", heading="Mean of devices", of=lambda row: row.over_devices.judged))
    if has_own_tests(results):
        found.append(Measure(name="own-test", heading="Own test", of=lambda row: row.own_test_mean or _NONE))
    return [*found, *(_of_tier(tier) for tier in results.tiers)]


def compared(results: Results) -> list[Compared]:
    """Return every other row beside the baseline, by every measure; nothing where there is no other row."""
    baseline = baseline_of(results)
    others = [row for row in results.strategies if row is not baseline]
    if not others:
        return []
    margin = margin_of(results)

    def of(measure: Measure) -> Compared:
        values = {row.name: _by_seed(row, measure) for row in others}
        differences = differences_from(_by_seed(baseline, measure), values, margin)
        return Compared(measure=measure, baseline=baseline.name, differences=tuple(differences))

    return [of(measure) for measure in measures(results)]


def baseline_of(results: Results) -> StrategyResults:
    """Return the row that the others are compared with: the one that was named, else the first."""
    name = results.analysis.baseline
    return next((row for row in results.strategies if row.name == name), results.strategies[0])


def margin_of(results: Results) -> float | None:
    """Return the margin of equivalence; None where the metric is no share and nobody has said one."""
    if results.analysis.margin is not None:
        return results.analysis.margin
    return SHARE_MARGIN if results.metric.percent else None


def tiers_differ_in_size(results: Results) -> bool:
    """Return whether the mean over devices differs from that over tiers, and is known."""
    sizes = [{budget.devices for budget in row.budgets.values()} for row in results.strategies]
    known = any(row.over_devices.final.values for row in results.strategies)
    return known and any(len(of_row) > 1 for of_row in sizes)


def has_own_tests(results: Results) -> bool:
    """Return whether devices have test examples of their own."""
    return any(row.own_test_mean is not None for row in results.strategies)


def _of_tier(tier: str) -> Measure:
    def of(row: StrategyResults) -> Stat:
        return row.tiers[tier].judged if tier in row.tiers else _NONE

    return Measure(name=f"tier {tier}", heading=tier, of=of)


def _by_seed(row: StrategyResults, measure: Measure) -> dict[int, float | None]:
    """Return the value of each finished seed; None where it has none."""
    values = measure.of(row).values
    return dict(zip(row.seeds, values or [None] * len(row.seeds), strict=True))
