"""Train the tier's own prefix only: cross-entropy on the device's model."""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.fleet.rule import OWN_PASS


def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Return ``CE(own(x), y)``."""
    return prefixes.label_loss(prefixes(images), labels)


OWN_PREFIX = Objective(
    name="own-prefix",
    loss=loss,
    passes=OWN_PASS,
    choices=lambda _: 0,
    summary="cross-entropy of the device's own submodel",
    source="FedAvg (1602.05629), HeteroFL (2010.01264)",
)
