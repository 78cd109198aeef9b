"""Width scaling: how many leading channels a narrower copy of a model keeps."""

import math
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

GROUP_SIZE = 16


@dataclass(frozen=True)
class Scale:
    """Scale channel counts by ``width`` in (0, 1]; called with a full count, returns ``⌈width · channels⌉``."""

    width: Fraction = Fraction(1)

    def __call__(self, channels: int) -> int:
        """Return the number of leading channels, at least 1 (HeteroFL, section 3; FjORD, section 3.1)."""
        return max(1, math.ceil(self.width * channels))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm without running statistics; groups hold 16 channels, or the next size that divides ``channels``.

    A fixed group *size* (instead of a fixed count) keeps leading channels in the same groups at most widths.
    """
    sizes = (size for size in range(min(channels, GROUP_SIZE), channels + 1) if channels % size == 0)
    return nn.GroupNorm(channels // next(sizes), channels)
