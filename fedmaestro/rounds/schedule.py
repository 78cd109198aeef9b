"""One round before it starts: who is sampled, and who finishes in time.

Everything here follows from the seed, the round and closed-form costs, so the server knows the outcome of the virtual
clock before any training; devices that would be too late are not trained at all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedmaestro import rng
from fedmaestro.fleet.clock import close_round, device_timing
from fedmaestro.fleet.plan import Plan, Submodel, TierPlan
from fedmaestro.fleet.selection import SELECTIONS, History, Round, Selection, selected


@dataclass(frozen=True, kw_only=True)
class Group:
    """The devices that train the submodel of one tier and finish a round: those of the tier, as a rule."""

    tier: TierPlan
    devices: tuple[int, ...]
    """Ascending."""
    work: tuple[int, ...]
    """Training MACs of each of them."""

    @property
    def submodel(self) -> Submodel:
        """What they train."""
        assert self.tier.trains is not None
        return self.tier.trains


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A round's plan."""

    groups: tuple[Group, ...]
    """Of the tiers that have such devices, largest tier first."""
    dropped: tuple[int, ...]
    """Devices that were sampled but come too late (deadline) or are not needed (over-commit)."""
    download_bytes: int
    """Of all sampled devices, dropped ones included."""
    virtual_seconds: float


def schedule_round(
    *,
    plan: Plan,
    tier_of: npt.ArrayLike,
    examples: npt.ArrayLike,
    seed: int,
    server_round: int,
    devices_per_round: int,
    local_epochs: int = 1,
    over_commit: float = 1.0,
    deadline_seconds: float | None = None,
    step_macs: Callable[[TierPlan], int] = lambda tier: tier.step_macs,
    upload_bytes: Callable[[Submodel], int] = lambda submodel: submodel.cost.upload_bytes,
    more_download_bytes: Callable[[Submodel], int] = lambda submodel: 0,  # noqa: ARG005
    selection: Selection = SELECTIONS["uniform"],
    history: History | None = None,
) -> Schedule:
    """Sample the devices of a round and group those that finish by tier.

    Args:
        plan: submodels and costs of the tiers.
        tier_of: tier index of every device.
        examples: training examples of every device.
        seed: the run's seed.
        server_round: from 1 on.
        devices_per_round: updates that the server waits for.
        local_epochs: passes over a device's examples.
        over_commit: sample this many times more devices.
        deadline_seconds: virtual limit of the round; None: there is none.
        step_macs: training MACs per example of a tier's local step.
        upload_bytes: of a device that trained this submodel; less than all where it does not train every tensor.
        more_download_bytes: what a device downloads besides the submodel.
        selection: who is asked, of those that can be reached and have examples.
        history: what is known of the devices; None: nothing yet.

    Returns:
        The schedule; without groups when no device is available.
    """
    tiers, counts = np.asarray(tier_of, np.int64), np.asarray(examples, np.int64)
    reachable = rng.generator(seed, "availability", server_round).random(len(tiers))
    seconds = np.full(len(tiers), np.nan)
    downloads = dict.fromkeys((tier.index for tier in plan.tiers), 0)
    # Fleets may have a million devices: whole arrays, by tier.
    for tier in plan.tiers:
        if not (trained := plan.trained_by(tier)):
            continue
        costs = {
            part.index: replace(
                part.trains.cost,
                upload_bytes=upload_bytes(part.trains),
                download_bytes=part.trains.cost.download_bytes + more_download_bytes(part.trains),
            )
            for part in trained
            if part.trains is not None
        }
        downloads[tier.index] = sum(cost.download_bytes for cost in costs.values())
        able = np.nonzero((tiers == tier.index) & (reachable < tier.tier.availability) & (counts > 0))[0]
        sizes, which = np.unique(counts[able], return_inverse=True)
        takes = [
            sum(device_timing(tier.tier, costs[x.index], n * local_epochs, step_macs(x)).total for x in trained)
            for n in sizes.tolist()
        ]
        seconds[able] = np.array(takes)[which]
    candidates = np.nonzero(~np.isnan(seconds))[0]
    wanted = math.ceil(round(devices_per_round * over_commit, 9))
    this = Round(
        number=server_round,
        # Where every device decides for itself, how many others there are makes no difference.
        wanted=min(wanted, len(candidates)) if selection.exact else wanted,
        tiers=tiers,
        examples=counts,
        seconds=seconds,
    )
    known = History.empty(len(tiers)) if history is None else history
    sampled = selected(selection, this, candidates, known, seed)
    awaited = devices_per_round if selection.exact else len(sampled)
    outcome = close_round([float(seconds[d]) for d in sampled], awaited, deadline_seconds)
    trainers = {
        tier.index: [other.index for other in plan.tiers if tier in plan.trained_by(other)] for tier in plan.tiers
    }
    finished = np.array([sampled[i] for i in outcome.finished], np.int64)
    return Schedule(
        groups=tuple(
            Group(
                tier=tier,
                devices=tuple(members.tolist()),
                work=tuple(step_macs(tier) * local_epochs * n for n in counts[members].tolist()),
            )
            for tier in plan.tiers
            if len(members := np.sort(finished[np.isin(tiers[finished], trainers[tier.index])]))
        ),
        dropped=tuple(sampled[i] for i in outcome.dropped),
        download_bytes=sum(downloads[int(tiers[d])] for d in sampled),
        virtual_seconds=outcome.seconds,
    )
