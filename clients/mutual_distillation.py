"""Mutual distillation: the own prefix and one random smaller one learn from the labels and from each other.

Deep mutual learning (Zhang et al., CVPR 2018) between two nested models: the smaller one is trained by more devices and
keeps the larger one, whose last columns few devices train, from following its own labels too far.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import OWN_AND_SMALLER, Objective, Prefixes


def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Return ``½ Σ CE(p(x), y) + CE(p(x), softmax(q(x)))`` over own and smaller prefix ``p``, ``q`` being the other.

    The smallest tier has ``CE(own(x), y)`` only. Soft targets carry no gradient.
    """
    own = prefixes(images)
    if prefixes.levels == 1:
        return prefixes.label_loss(own, labels)
    smaller = prefixes(images, 1 + int(generator.integers(prefixes.levels - 1)))
    of_labels = prefixes.label_loss(own, labels) + prefixes.label_loss(smaller, labels)
    of_each_other = prefixes.distillation(smaller, own, labels), prefixes.distillation(own, smaller, labels)
    return 0.5 * (of_labels + of_each_other[0] + of_each_other[1])


MUTUAL_DISTILLATION = Objective(
    name="mutual-distillation",
    loss=loss,
    passes=OWN_AND_SMALLER,
    choices=lambda levels: levels - 1,
    summary="cross-entropy of the own submodel and one random smaller one, on labels and on each other's soft targets",
    source="deep mutual learning (1706.00384), tiers as the two networks",
)
