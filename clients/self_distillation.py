"""Self-distillation: the own prefix learns from labels, a smaller one from the own prefix's soft targets.

FjORD (NeurIPS 2021, section 3.3) and Maestro's optional second pass (section 3.2); temperature 1, equal weights.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import OWN_AND_SMALLER, Objective, Prefixes


def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Return ``CE(own(x), y) + CE(smaller(x), softmax(own(x)))``; the smallest tier has the first term only."""
    own = prefixes(images)
    value = prefixes.label_loss(own, labels)
    if prefixes.levels > 1:
        level = 1 + int(generator.integers(prefixes.levels - 1))
        value = value + prefixes.distillation(prefixes(images, level), own, labels)
    return value


SELF_DISTILLATION = Objective(
    name="self-distillation",
    loss=loss,
    passes=OWN_AND_SMALLER,
    choices=lambda levels: levels - 1,
    summary="cross-entropy of the own submodel, and of one random smaller one against its soft targets",
    source="FjORD (2102.13451), Maestro (2308.14929)",
)
