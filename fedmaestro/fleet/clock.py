"""The virtual clock: how long a round would take on the devices themselves.

Formulas as in FedScale (ICML 2022): training = MACs of all local steps / speed, transfer = bytes / bandwidth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmaestro.fleet.cost import Cost
from fedmaestro.fleet.tiers import Tier

REFERENCE_MACS_PER_SECOND = 4.1e9 / 0.059
"""A device of speed 1: 59 ms (5th percentile of 978 phones, AI-Benchmark) for one ResNet inference.

The source does not say which ResNet; we take ResNet-50's 4.1 GMACs. Only ratios between tiers are independent of that.
"""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Virtual seconds of one device in one round."""

    download: float
    compute: float
    upload: float

    @property
    def total(self) -> float:
        """Download, then training, then upload."""
        return self.download + self.compute + self.upload


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Who made it into the round."""

    finished: tuple[int, ...]
    """Positions of the devices whose update arrived in time, ascending."""
    dropped: tuple[int, ...]
    """Positions of those that were too late (deadline) or not needed any more (over-commit)."""
    seconds: float
    """Virtual length of the round."""


def device_timing(tier: Tier, cost: Cost, examples: int, step_macs: int | None = None) -> Timing:
    """Return the time of a device of ``tier`` that trains on ``examples`` (all local epochs together).

    ``step_macs`` are the training MACs per example under the local objective; one pass of the submodel by default.
    """
    macs = cost.train_macs_per_example if step_macs is None else step_macs
    return Timing(
        download=cost.download_bytes * 8 / (1000 * tier.download_kbps),
        compute=macs * examples / (tier.speed * REFERENCE_MACS_PER_SECOND),
        upload=cost.upload_bytes * 8 / (1000 * tier.upload_kbps),
    )


def close_round(seconds: Sequence[float], wanted: int, deadline: float | None = None) -> Outcome:
    """Take the first ``wanted`` of the devices to finish, within ``deadline``.

    Args:
        seconds: virtual seconds of every device that was started; ties go to the lower position.
        wanted: updates that the server waits for; with over-commit fewer than the devices started.
        deadline: virtual seconds after which the server closes the round; None: it waits.
    """
    limit = math.inf if deadline is None else deadline
    order = sorted(range(len(seconds)), key=lambda i: (seconds[i], i))
    finished = [i for i in order[:wanted] if seconds[i] <= limit]
    enough = len(finished) == min(wanted, len(seconds))
    last = seconds[finished[-1]] if finished else 0.0
    return Outcome(
        finished=tuple(sorted(finished)),
        dropped=tuple(sorted(set(range(len(seconds))) - set(finished))),
        seconds=last if enough else limit,
    )
