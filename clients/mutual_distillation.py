"""Distillation both ways: the own prefix and one random smaller one learn from the labels and from each other.

Deep mutual learning (Zhang et al., CVPR 2018) between two nested models: the smaller one is trained by more devices and
keeps the larger one, whose last columns few devices train, from following its own labels too far. That helps as far as
those labels are skewed; where they are not, the larger one is the better teacher, and self-distillation is enough.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import OWN_AND_SMALLER, Objective, Prefixes


def mutual_loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Return ``½ Σ CE(p(x), y) + CE(p(x), softmax(q(x)))`` over own and smaller prefix ``p``, ``q`` being the other.

    The smallest tier has ``CE(own(x), y)`` only. Soft targets carry no gradient.
    """
    return _both_ways(prefixes, images, labels, generator, 0.5)


def by_skew_loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Return the objective between self-distillation and mutual distillation that the device's labels ask for.

    ``(1 - b) (CE(p(x), y) + CE(q(x), softmax(p(x)))) + b (CE(q(x), y) + CE(p(x), softmax(q(x))))`` of own ``p`` and
    smaller ``q``, with half of ``label_skew`` as ``b``: self-distillation where all classes are as frequent, mutual
    distillation where there is one.
    """
    return _both_ways(prefixes, images, labels, generator, 0.0 if prefixes.skew is None else 0.5 * prefixes.skew)


def _both_ways(
    prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator, back: float | Tensor
) -> Tensor:
    own = prefixes(images)
    if prefixes.levels == 1:
        return prefixes.label_loss(own, labels)
    smaller = prefixes(images, 1 + int(generator.integers(prefixes.levels - 1)))
    forth = prefixes.label_loss(own, labels) + prefixes.distillation(smaller, own, labels)
    return (1 - back) * forth + back * (
        prefixes.label_loss(smaller, labels) + prefixes.distillation(own, smaller, labels)
    )


MUTUAL_DISTILLATION = Objective(
    name="mutual-distillation",
    loss=mutual_loss,
    passes=OWN_AND_SMALLER,
    choices=lambda levels: levels - 1,
    summary="cross-entropy of the own submodel and one random smaller one, on labels and on each other's soft targets",
    source="deep mutual learning (1706.00384), tiers as the two networks",
)
SKEW_DISTILLATION = Objective(
    name="skew-distillation",
    loss=by_skew_loss,
    passes=OWN_AND_SMALLER,
    choices=lambda levels: levels - 1,
    by_skew=True,
    summary="self-distillation on balanced labels, mutual distillation on those of one class, by skew in between",
    source="of this project",
)
