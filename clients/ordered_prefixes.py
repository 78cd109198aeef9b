"""Ordered dropout over tiers: each step trains one random tier prefix that the device can hold.

FjORD (NeurIPS 2021, section 3.2) draws ``p ≤ p_max`` uniformly from the tiers' widths in each local step; Maestro
(section 3.2) draws ranks. Here the levels are the tiers' submodels, so every tier's own model is trained.

Weight decay and momentum (both 0 by default) also move the columns that a step did not run: their gradient is zero,
not absent.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.fleet.rule import Passes


def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Return ``CE(level(x), y)`` with the level uniform over the own and all smaller tiers."""
    level = int(generator.integers(prefixes.levels))
    return prefixes.label_loss(prefixes(images, level), labels)


ORDERED_PREFIXES = Objective(
    name="ordered-prefixes",
    loss=loss,
    passes=Passes(expected=lambda levels: [1 / levels] * levels),
    choices=lambda levels: levels,
    summary="cross-entropy of one random tier prefix ≤ own in each step",
    source="ordered dropout of FjORD (2102.13451), tiers as levels",
)
