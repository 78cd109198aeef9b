"""The main metric per tier over rounds and over virtual time, from the lines of ``rounds.jsonl``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fedmaestro.runs.records import ACCURACY, MetricFacts, RoundRecord

_TIMES = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


@dataclass(frozen=True)
class Curve:
    """The main metric of one tier on the test set, at the rounds in which it was evaluated.

    Attributes:
        tier: Name of the tier.
        rounds: Communication rounds; 0 is the initial model.
        virtual_seconds: Simulated time since the start of the run at the end of each of these rounds.
        values: Shares are fractions 0..1; nan where the evaluation gave none.
        metric: The metric.
        epsilons: ε of differential privacy at the end of each of these rounds; nan where there is none.

    """

    tier: str
    rounds: tuple[int, ...]
    virtual_seconds: tuple[float, ...]
    values: tuple[float, ...]
    metric: MetricFacts = ACCURACY
    epsilons: tuple[float, ...] = ()

    @property
    def finite(self) -> tuple[float, ...]:
        return tuple(value for value in self.values if math.isfinite(value))

    @property
    def final(self) -> float:
        """The last value that is a number; nan if there is none."""
        return self.finite[-1] if self.finite else math.nan

    @property
    def best(self) -> float:
        return as_number(self.metric.best(self.finite))


def tier_curves(rounds: Sequence[RoundRecord]) -> tuple[Curve, ...]:
    """Return one curve per tier in the order in which the tiers are listed: largest first."""
    clock, metric = list(accumulate(row.virtual_seconds for row in rounds)), metric_of(rounds)
    names = dict.fromkeys(name for row in rounds for name in row.tiers)
    return tuple(_curve(name, rounds, clock, metric) for name in names)


def metric_of(rounds: Sequence[RoundRecord]) -> MetricFacts:
    """Return the main metric of a run, which its first round says; older runs have accuracies."""
    return next((row.metric for row in rounds if row.metric is not None), ACCURACY)


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit (name, seconds per unit) in which a duration is at least 2: ticks stay readable."""
    return next((unit for unit in _TIMES if seconds >= 2 * unit[1]), _TIMES[-1])


def byte_unit(count: float) -> tuple[str, float]:
    """Return the unit (name, bytes per unit) in which a number of bytes is at least 2."""
    return next((unit for unit in _BYTES if count >= 2 * unit[1]), _BYTES[-1])


def as_number(value: object) -> float:
    """Return a number of a JSON line as float; nan for null, absent or not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _curve(name: str, rounds: Sequence[RoundRecord], clock: Sequence[float], metric: MetricFacts) -> Curve:
    points = [
        (row.round, now, as_number(row.tiers[name].get(metric.name)), as_number(row.epsilon))
        for row, now in zip(rounds, clock, strict=True)
        if name in row.tiers
    ]
    numbers, times, values, epsilons = zip(*points, strict=True)
    return Curve(tier=name, rounds=numbers, virtual_seconds=times, values=values, metric=metric, epsilons=epsilons)
