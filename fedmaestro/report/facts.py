"""What a page says about a run: from its summary, else from its rounds and configuration."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from fedmaestro.config.base import flatten
from fedmaestro.report.curves import as_number, metric_of, tier_curves
from fedmaestro.report.format import MISSING, Shown
from fedmaestro.report.rank_plot import History
from fedmaestro.runs.reader import RunRecord
from fedmaestro.runs.records import TierSummary

# The keys of summary.json and, for a run without one, where the configuration says the same.
_HEADLINE = {
    "dataset": "data.name",
    "model": "model.name",
    "strategy": "train.strategy",
    "objective": "train.objective",
    "seed": "seed",
}


@dataclass(frozen=True, kw_only=True)
class TierFacts:
    """A tier: its final and best value, nan where there is none, and all metrics in the last evaluated round."""

    name: str
    final: float
    best: float
    values: Mapping[str, float | None]
    summary: TierSummary | None


@dataclass(frozen=True)
class RunFacts:
    """A run as its section of a page tells it.

    Attributes:
        record: the run folder.
        name: what the page calls it.
        anchor: id of the section, and prefix of the ids of its plots: unique in the page.

    """

    record: RunRecord
    name: str = ""
    anchor: str = "run"

    @cached_property
    def config(self) -> dict[str, str]:
        """Nested tables as dotted names, as ``--set`` takes them, with values as text."""
        return {
            key: value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            for key, value in flatten(self.record.config).items()
        }

    @property
    def headline(self) -> dict[str, str]:
        """Dataset, model, strategy, objective and seed."""
        known, summary = self.config, self.record.summary
        return {
            key: str(known.get(dotted, MISSING) if summary is None else getattr(summary, key))
            for key, dotted in _HEADLINE.items()
        }

    @property
    def title(self) -> str:
        """The headline as one line: ``mnist · lenet · nested · own-prefix · seed 0``."""
        facts = {key: value for key, value in self.headline.items() if value != MISSING}
        names = [f"seed {value}" if key == "seed" else value for key, value in facts.items()]
        return " · ".join([*names, *(["validation split, not test"] if self.split == "validation" else [])])

    @property
    def split(self) -> str:
        """What the run's values are of: ``test``, or ``validation`` (``data.validation``)."""
        if self.record.summary is not None:
            return self.record.summary.split
        held_out = as_number(flatten(self.record.config).get("data.validation"))
        return "validation" if held_out > 0 else "test"

    @property
    def show(self) -> Shown:
        """How the run's main metric is shown."""
        return Shown(metric_of(self.record.rounds) if self.record.summary is None else self.record.summary.metric)

    @property
    def last_round(self) -> int:
        return max((row.round for row in self.record.rounds), default=0)

    def total(self, key: str) -> float:
        """Return the sum of a figure over the rounds; of times, what the summary says."""
        known = getattr(self.record.summary, key, None) if key.endswith("seconds") else None
        sums: float = sum(getattr(row, key) for row in self.record.rounds) if known is None else known
        return sums

    @property
    def failed_by(self) -> dict[str, int]:
        """Updates that failed, by kind."""
        return sum((Counter(row.failed_by) for row in self.record.rounds), Counter())

    @property
    def epsilon(self) -> float | None:
        """ε of the rounds so far; None without differential privacy."""
        return next((row.epsilon for row in reversed(self.record.rounds) if row.epsilon is not None), None)

    @cached_property
    def tiers(self) -> list[TierFacts]:
        """Largest tier first; a run without summary has only values."""
        curves = {curve.tier: curve for curve in tier_curves(self.record.rounds)}
        known = self.record.summary.tiers if self.record.summary else {}
        last = next((row.tiers for row in reversed(self.record.rounds) if row.tiers), {})
        found = []
        for name in dict.fromkeys([*curves, *known]):
            final, best = (getattr(known.get(name, curves.get(name)), key) for key in ("final", "best"))
            of: dict[str, Any] = {"values": last.get(name, {}), "summary": known.get(name)}
            found.append(TierFacts(name=name, final=as_number(final), best=as_number(best), **of))
        return found

    @property
    def other_metrics(self) -> dict[str, str]:
        """The metrics beside the main one and the loss, by heading."""
        names = dict.fromkeys(name for tier in self.tiers for name in tier.values)
        return {f"Final {name}": name for name in names if name not in (self.show.name, "loss")}

    @property
    def own_test(self) -> dict[str, dict[str, float | None]]:
        """What the devices of each tier reached on their own tests in the last evaluated round."""
        return next((row.device_test for row in reversed(self.record.rounds) if row.device_test), {})

    @property
    def mean_and_worst(self) -> tuple[float, float]:
        """Mean and worst final value over the tiers; nan where there is none."""
        if self.record.summary is not None:
            return as_number(self.record.summary.mean_tier), as_number(self.record.summary.worst_tier)
        finals = [tier.final for tier in self.tiers if tier.final == tier.final]
        return (fmean(finals) if finals else math.nan), as_number(self.show.metric.worst(finals))

    @property
    def rank_history(self) -> History:
        """Ranks by round where they could change; the last entry is the last round's."""
        changes = [(float(row.round), row.ranks) for row in self.record.rounds if row.ranks]
        return [*changes, (float(self.last_round), changes[-1][1])] if changes else []

    @property
    def full_ranks(self) -> dict[str, int]:
        """The ranks of the whole model at the start; empty where ranks could not change."""
        return next((row.full_ranks for row in self.record.rounds if row.full_ranks), {})
