r"""Objectives of networks with early exits (``models.exits``): every classifier of a device learns from the labels.

*exit-distillation*, DepthFL (Kim et al., ICLR 2023): the ``d`` classifiers of a device teach each other.

    ``Σ_i CE(z_i, y) + 1/(d-1) Σ_i Σ_{j≠i} CE(z_i, softmax(z_j))``

whose gradient is that of the paper's ``KL(p_j ‖ p_i)``, for soft targets carry none. Departures: the second sum has its
whole weight from the first round on, where Flower's baseline of DepthFL lets it grow over the rounds; FedAvg instead
of FedDyn, which the paper has too.

*exits-from-last*, ScaleFL (Ilhan et al., CVPR 2023): early classifiers also learn from the last one.

    ``2/(d (d+1)) (d · CE(z_d, y) + Σ_{i<d} i · ½ (CE(z_i, y) + CE(z_i, softmax(z_d))))``

with the weights of the release, by the exit's number. Departures: half of an early exit's loss is distillation, at
temperature 1, from the first round on; the release has a weight and a temperature as options and starts it later.

A model without early exits has ``d = 1``: the cross-entropy of its outputs, under both.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.fleet.rule import OWN_PASS


def mutual(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Return the loss of *exit-distillation*."""
    exits = prefixes.exits(images)
    value = sum(prefixes.label_loss(own, labels) for own in exits)
    for own in exits:
        for other in exits:
            if other is not own:
                value = value + prefixes.distillation(own, other, labels) / (len(exits) - 1)
    return value  # type: ignore[return-value]


def from_last(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Return the loss of *exits-from-last*."""
    *early, last = prefixes.exits(images)
    count = len(early) + 1
    value = count * prefixes.label_loss(last, labels)
    for number, own in enumerate(early, start=1):
        both = prefixes.label_loss(own, labels) + prefixes.distillation(own, last, labels)
        value = value + number * both / 2
    return value * 2 / (count * (count + 1))


EXIT_DISTILLATION = Objective(
    name="exit-distillation",
    loss=mutual,
    passes=OWN_PASS,
    choices=lambda _: 0,
    summary="cross-entropy of every classifier of the own submodel, on labels and on the others' soft targets",
    source="DepthFL (ICLR 2023)",
)

EXITS_FROM_LAST = Objective(
    name="exits-from-last",
    loss=from_last,
    passes=OWN_PASS,
    choices=lambda _: 0,
    summary="cross-entropy of every classifier of the own submodel, early ones also on the last one's soft targets",
    source="ScaleFL (CVPR 2023)",
)
