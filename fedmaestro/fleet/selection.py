"""Who is asked to train in a round, of those that can be reached: the table of client selections."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmaestro import rng
from fedmaestro.errors import UserError

Numbers = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class History:
    """What the server knows of the devices. Kept in the checkpoint, where it grows with those that took part only.

    Selections read ``loss``, ``last_round`` and ``times``, each ``(devices,)`` by number.
    """

    devices: int
    """How many the fleet has."""
    known: Ids
    """Those that took part, ascending: ``(n,)`` as the rest."""
    losses: Numbers
    rounds: Ids
    counts: Ids

    @staticmethod
    def empty(devices: int) -> "History":
        """Return what is known before the first round."""
        none = np.empty(0, np.int64)
        return History(devices=devices, known=none, losses=np.empty(0), rounds=none, counts=none)

    @cached_property
    def loss(self) -> Numbers:
        """Mean training loss of the last round that a device took part in; nan before the first."""
        dense = np.full(self.devices, np.nan)
        dense[self.known] = self.losses
        return dense

    @cached_property
    def last_round(self) -> Ids:
        """That round; 0 before the first."""
        dense = np.zeros(self.devices, np.int64)
        dense[self.known] = self.rounds
        return dense

    @cached_property
    def times(self) -> Ids:
        """Rounds that a device took part in."""
        dense = np.zeros(self.devices, np.int64)
        dense[self.known] = self.counts
        return dense

    def after(self, server_round: int, losses: Mapping[int, float]) -> "History":
        """Return the history after a round: the training loss of every device that took part."""
        now = np.array(sorted(losses), np.int64)
        known = np.union1d(self.known, now)
        before, at = np.searchsorted(known, self.known), np.searchsorted(known, now)
        loss, last, times = np.empty(len(known)), np.zeros(len(known), np.int64), np.zeros(len(known), np.int64)
        loss[before], last[before], times[before] = self.losses, self.rounds, self.counts
        loss[at], last[at] = [losses[device] for device in now.tolist()], server_round
        times[at] += 1
        return History(devices=self.devices, known=known, losses=loss, rounds=last, counts=times)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        arrays = {"known": self.known, "loss": self.losses, "last_round": self.rounds, "times": self.counts}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor], devices: int) -> "History":
        """Return what ``tensors`` made of the history of so many devices."""
        known, losses, rounds, counts = (tensors[x].numpy().copy() for x in ("known", "loss", "last_round", "times"))
        return History(devices=devices, known=known, losses=losses, rounds=rounds, counts=counts)


@dataclass(frozen=True, kw_only=True)
class Round:
    """The round that devices are selected for.

    Attributes:
        number: from 1 on.
        wanted: how many devices to select; there are as many candidates at least (or, for a selection that is not
            exact, in expectation of all devices).
        tiers: ``(devices,)``, position in the fleet of every device's tier.
        examples: ``(devices,)``, training examples.
        seconds: ``(devices,)``, virtual seconds that the round takes each device; nan of those that are no candidates.
    """

    number: int
    wanted: int
    tiers: Ids
    examples: Ids
    seconds: Numbers


Select = Callable[[Round, Ids, History, np.random.Generator], Sequence[int]]
"""``(round, candidates, history, generator) -> ids``: as many candidates as are wanted, in any order."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One row of ``SELECTIONS``."""

    name: str
    select: Select
    exact: bool = True
    """Whether it returns as many as are wanted; otherwise as many in expectation."""
    summary: str
    source: str = ""


def selected(row: Selection, this: Round, candidates: Ids, history: History, seed: int) -> list[int]:
    """Return the devices of a round, ascending; UserError unless they are as many candidates as are wanted."""
    if not this.wanted or not len(candidates):
        return []
    chosen = [int(i) for i in row.select(this, candidates, history, rng.generator(seed, "sample", this.number))]
    # Candidates ascend.
    places = np.minimum(np.searchsorted(candidates, chosen), len(candidates) - 1)
    right = bool((candidates[places] == np.array(chosen, np.int64)).all())
    wrong_number = row.exact and len(chosen) != this.wanted
    if len(set(chosen)) != len(chosen) or wrong_number or not right:
        raise UserError(
            f"train.selection={row.name!r} must return {this.wanted} different candidates in round {this.number}, "
            f"returned {chosen[:10]}{'…' if len(chosen) > 10 else ''}"
        )
    return sorted(chosen)


def _uniform(this: Round, candidates: Ids, history: History, generator: np.random.Generator) -> Sequence[int]:  # noqa: ARG001
    drawn = generator.choice(len(candidates), this.wanted, replace=False)
    return [int(candidates[i]) for i in drawn]


def _poisson(this: Round, candidates: Ids, history: History, generator: np.random.Generator) -> Sequence[int]:  # noqa: ARG001
    """Let every device decide for itself, with the same probability: wanted over all devices of the fleet."""
    chosen = generator.random(len(this.tiers)) < this.wanted / len(this.tiers)
    return [int(i) for i in candidates[chosen[candidates]]]


def _stratified(this: Round, candidates: Ids, history: History, generator: np.random.Generator) -> Sequence[int]:  # noqa: ARG001
    """Give each tier its share of the candidates, by largest remainder; ties go to a tier at random."""
    tiers, counts = np.unique(this.tiers[candidates], return_counts=True)
    exact = counts * this.wanted / len(candidates)
    seats = np.floor(exact).astype(int)
    order = np.lexsort((generator.random(len(tiers)), -(exact - seats)))
    seats[order[: this.wanted - seats.sum()]] += 1
    chosen: list[int] = []
    for tier, count in zip(tiers, seats, strict=True):
        members = candidates[this.tiers[candidates] == tier]
        chosen += [int(i) for i in generator.choice(members, count, replace=False)]
    return chosen


_CHOICES = 2


def _power_of_choice(this: Round, candidates: Ids, history: History, generator: np.random.Generator) -> Sequence[int]:
    """Draw twice as many as are wanted and take those of the highest loss; unknown losses go first.

    Cho et al., arXiv 2010.01243 (π_pow-d with d = 2 m). Departure: the loss is that of the device's last training
    instead of the current model's, which would cost every drawn device a pass.
    """
    drawn = generator.choice(candidates, min(_CHOICES * this.wanted, len(candidates)), replace=False)
    losses = np.where(np.isnan(history.loss[drawn]), np.inf, history.loss[drawn])
    return [int(drawn[i]) for i in np.argsort(-losses, kind="stable")[: this.wanted]]


_EXPLORE, _EXPLORE_DECAY, _EXPLORE_LEAST = 0.9, 0.98, 0.2
_PENALTY, _CUTOFF, _PREFERRED = 2.0, 0.95, 80.0


def _oort(this: Round, candidates: Ids, history: History, generator: np.random.Generator) -> Sequence[int]:
    """Prefer devices whose examples the model has yet to learn and that are fast; explore others.

    Oort (Lai et al., OSDI 2021, equation 1 and algorithm 1): utility ``n · loss + √(0.1 ln R / last round)``, times
    ``(T / t)^α`` for devices slower than the preferred duration ``T``; a share of the round, 0.9 at first and 0.2 at
    least, goes to devices that never took part, the fastest ones first; the others are drawn by utility from all above
    95 % of the last one's that would be in. Departures: the mean training loss stands for the root mean square of
    examples' losses; ``T`` is the 80th percentile of the candidates' durations, without a pacer; no blacklist.
    """
    known = candidates[history.times[candidates] > 0]
    new = candidates[history.times[candidates] == 0]
    share = max(_EXPLORE_LEAST, _EXPLORE * _EXPLORE_DECAY ** (this.number - 1))
    explored = min(len(new), max(round(share * this.wanted), this.wanted - len(known)))
    fastest = new[np.argsort(this.seconds[new] * (1 + 0.1 * generator.random(len(new))), kind="stable")]
    chosen = [int(i) for i in fastest[:explored]]
    wanted = this.wanted - explored
    if not wanted:
        return chosen
    statistical = this.examples[known] * np.nan_to_num(history.loss[known])
    uncertainty = np.sqrt(0.1 * math.log(max(this.number, 2)) / np.maximum(history.last_round[known], 1))
    span = statistical.max() - statistical.min()
    utility = (statistical - statistical.min()) / (span or 1.0) + uncertainty
    preferred = np.percentile(this.seconds[candidates], _PREFERRED)
    utility *= np.where(this.seconds[known] > preferred, (preferred / this.seconds[known]) ** _PENALTY, 1.0)
    last_in = np.sort(utility)[-wanted]
    pool = np.nonzero(utility >= _CUTOFF * last_in)[0]
    weights = np.maximum(utility[pool], 1e-12)
    drawn = generator.choice(pool, wanted, replace=False, p=weights / weights.sum())
    return chosen + [int(known[i]) for i in drawn]


SELECTIONS: dict[str, Selection] = {
    row.name: row
    for row in (
        Selection(name="uniform", select=_uniform, summary="all candidates alike", source="FedAvg (1602.05629)"),
        Selection(
            name="poisson",
            select=_poisson,
            exact=False,
            summary="every device by itself, as many as wanted in expectation (for differential privacy)",
            source="Poisson sampling (1908.10530)",
        ),
        Selection(name="stratified", select=_stratified, summary="each tier by its share of the candidates"),
        Selection(
            name="power-of-choice",
            select=_power_of_choice,
            summary="of twice as many at random, those of the highest last training loss",
            source="Power-of-Choice (2010.01243)",
        ),
        Selection(
            name="oort",
            select=_oort,
            summary="by examples times loss and by speed, with exploration",
            source="Oort (OSDI 2021), simplified",
        ),
    )
}
"""Who is asked to train."""
