"""How a round's work is cut into messages: cohorts that keep all workers busy and end together.

A cohort is a node of the tree of its tier (``rounds.tree``), so cutting is a matter of speed only and may follow what
was measured. The closed form of ``fleet.cost`` says how the tiers' work compares before anything has run; from then on,
what hosts took for it.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

from fedmaestro.fleet.plan import Submodel, TierPlan
from fedmaestro.rounds.schedule import Group
from fedmaestro.rounds.tree import Span

PIECES = 3
"""A long round's work is cut so finely that each worker gets this many cohorts: whoever is slower takes fewer."""

SHORT_SECONDS = 0.3
"""Cohorts are not cut finer than this for that: a message costs some 5 ms of all processes together."""

SHORTEST_SECONDS = 0.01
"""Nor finer than this for workers to end together."""

EVEN = 1.05
"""What workers may take, against equal shares of the work, before cohorts are cut finer for them to end together."""

GUESS = 1e-9
"""Seconds per MAC before anything was measured."""

WEIGHT = 0.3
"""Of the newest measurement in the running mean."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Devices of one tier that one message carries."""

    group: Group
    span: Span
    """Which of the group's devices."""

    @property
    def tier(self) -> TierPlan:
        """Theirs."""
        return self.group.tier

    @property
    def submodel(self) -> Submodel:
        """What they train."""
        return self.group.submodel

    @property
    def devices(self) -> tuple[int, ...]:
        """By number, ascending."""
        return self.group.devices[self.span.first : self.span.last]

    @property
    def work(self) -> int:
        """Training MACs of all of its devices."""
        return sum(self.group.work[self.span.first : self.span.last])


@dataclass
class Pace:
    """What a unit of work takes, by its kind: predicted until it was measured, and then a running mean."""

    _measured: dict[Hashable, float] = field(default_factory=dict)

    def seconds(self, kind: Hashable, work: float) -> float:
        """Return how long ``work`` MACs of a kind will take on one worker."""
        known = self._measured
        return work * known.get(kind, sum(known.values()) / len(known) if known else GUESS)

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._measured)

    def measure(self, kind: Hashable, work: float, seconds: float) -> None:
        """Take note of how long ``work`` MACs of a kind took."""
        if work > 0 and seconds > 0:
            rate = seconds / work
            known = self._measured.get(kind, rate)
            self._measured[kind] = known + WEIGHT * (rate - known)


def cut(
    groups: Iterable[Group],
    seconds: Callable[[Cohort], float],
    *,
    workers: int,
    limit: int | None = None,
    stack: int = 1,
    other_seconds: float = 0.0,
) -> list[Cohort]:
    """Return a round's cohorts, the longest first: then workers that take the next one end together.

    Args:
        groups: the devices.
        seconds: what a cohort will take.
        workers: how many messages are worked on at once.
        limit: largest number of devices; None: there is none.
        stack: devices that train as one model: nodes of so many are not cut.
        other_seconds: what the workers have to do besides.
    """
    cohorts = [Cohort(group=group, span=Span(0, len(group.devices))) for group in groups]
    total, workers = other_seconds + sum(map(seconds, cohorts)), max(workers, 1)
    longest = max(total / (PIECES * workers), SHORT_SECONDS)
    # The longest first; the rest of the key makes the order that of the devices, not that of the cutting.
    heap: list[tuple[float, int, Span, Cohort]] = []

    def put(cohort: Cohort) -> None:
        heappush(heap, (-seconds(cohort), cohort.group.tier.index, cohort.span, cohort))

    while cohorts:
        cohort = cohorts.pop()
        size = len(cohort.span)
        if size > stack and (seconds(cohort) > longest or (limit is not None and size > limit)):
            cohorts += _halves(cohort)
        else:
            put(cohort)
    # Then the longest that can be cut, until workers who take them in this order end together.
    whole: list[tuple[float, int, Span, Cohort]] = []
    while heap and _span([-x for x, *_ in sorted(heap + whole)], other_seconds, workers) > EVEN * total / workers:
        entry = heappop(heap)
        if len(entry[-1].span) > stack and -entry[0] > SHORTEST_SECONDS:
            for half in _halves(entry[-1]):
                put(half)
        else:
            whole.append(entry)
    return [cohort for *_, cohort in sorted(heap + whole, key=lambda entry: entry[:3])]


def _halves(cohort: Cohort) -> list[Cohort]:
    return [Cohort(group=cohort.group, span=half) for half in cohort.span.halves]


def _span(seconds: Sequence[float], other: float, workers: int) -> float:
    """Return how long ``workers`` take for the jobs in this order, and for other work that fills what is left."""
    ends = [0.0] * workers
    for job in seconds:
        heapreplace(ends, ends[0] + job)
    return max(max(ends), (sum(seconds) + other) / workers)
