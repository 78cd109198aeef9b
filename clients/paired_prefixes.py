"""Own prefix and one random smaller prefix in every step, both on the labels.

The pilot's compromise between training only the own prefix (small tiers lag) and random prefixes (the top tier lags);
universally slimmable networks (Yu and Huang, ICCV 2019) train the largest width plus random smaller ones in each step.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import OWN_AND_SMALLER, Objective, Prefixes


def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Return ``CE(own(x), y) + CE(smaller(x), y)``; the smallest tier has the first term only."""
    value = prefixes.label_loss(prefixes(images), labels)
    if prefixes.levels > 1:
        level = 1 + int(generator.integers(prefixes.levels - 1))
        value = value + prefixes.label_loss(prefixes(images, level), labels)
    return value


PAIRED_PREFIXES = Objective(
    name="paired-prefixes",
    loss=loss,
    passes=OWN_AND_SMALLER,
    choices=lambda levels: levels - 1,
    summary="cross-entropy of the own submodel plus that of one random smaller one",
    source="universally slimmable networks (1903.05134), tiers as levels",
)
