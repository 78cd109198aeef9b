"""Width scaling: how many leading channels a narrower copy of a model keeps."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

GROUP_SIZE = 16


@dataclass(frozen=True)
class Scale:
    """Scale channel counts by ``width`` in (0, 1]; called with a full count, returns ``⌈width · channels⌉``."""

    width: Fraction = Fraction(1)

    def __call__(self, channels: int) -> int:
        """Return the number of leading channels, at least 1 (HeteroFL, section 3; FjORD, section 3.1)."""
        return max(1, math.ceil(self.width * channels))


def part_of_rank(rank: int, width: Fraction, power: Fraction) -> int:
    """Return ``⌊rank · width ** power⌋``, in integers: a root's rounding may not depend on the machine."""
    p, q = power.as_integer_ratio()
    limit = rank**q * width.numerator**p
    return bisect_right(range(1, rank + 1), limit, key=lambda n: n**q * width.denominator**p)


class LeadingGroupNorm(nn.Module):
    """GroupNorm in groups of 16 channels and an incomplete last one.

    Parameters are those of ``nn.GroupNorm``: ``weight`` and ``bias``, each ``(channels,)``; ``channels`` is above 16
    and no multiple of it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        assert channels > GROUP_SIZE
        assert channels % GROUP_SIZE
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the affine part the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to the same shape."""
        groups, rest = divmod(len(self.weight), GROUP_SIZE)
        complete, last = slice(-rest), slice(-rest, None)
        # Not F.group_norm: it refuses a group of one value, which one channel on one position is.
        parts = [
            torch.group_norm(x[:, part], count, self.weight[part], self.bias[part])
            for part, count in ((complete, groups), (last, 1))
        ]
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"


def group_norm(channels: int) -> nn.Module:
    """Return a GroupNorm without running statistics: groups of 16 channels, the last one with what is left.

    A fixed group *size* (instead of a fixed count) leaves a channel in its group at every width, and only the last
    group of a narrower model lacks channels.
    """
    if channels > GROUP_SIZE and channels % GROUP_SIZE:
        return LeadingGroupNorm(channels)
    return nn.GroupNorm(max(1, channels // GROUP_SIZE), channels)
