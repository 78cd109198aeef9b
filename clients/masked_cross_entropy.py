"""Train the tier's own prefix, and leave the classifier's rows of classes alone that the device does not have.

HeteroFL (arXiv 2010.01264, masked loss for non-IID data): local training replaces the logits of absent classes by 0,
as its release does; evaluation is over all classes. Under the plain loss a device pushes every absent class down in
each step, which undoes what the devices that have it learn.

With ``z`` the logits and ``A`` absent classes, the loss is ``-z_y + ln(A + Σ_present exp z_c)``. So an absent class
stays as a constant competitor with logit 0 instead of leaving the softmax (logit -∞), where a device with one class
would have a loss of 0 and learn nothing. Its row of the head, weights and bias, gets a gradient of exactly 0.

SGD then leaves these rows as they were sent, also with momentum, which starts at 0 on every device. Weight decay does
not: it is added to every gradient, so each step shrinks them by ``lr · weight_decay``, as it does all parameters. The
aggregation of HeteroFL, which goes by labels, ignores that; here the device puts such rows back at its end
(``rounds.training.UntrainedRows``), which comes to the same for an aggregation that goes by what has changed.

With a logit adjustment (``train.logit-adjustment``) the constant is ``τ log π_c`` instead of 0: the smaller it is, the
less a device with one class learns.
"""

import numpy as np
from torch import Tensor

from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.fleet.rule import OWN_PASS


def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:  # noqa: ARG001
    """Return ``CE(z, y)`` of the own submodel, ``z`` with 0 for absent classes; plain where classes are unknown."""
    logits = prefixes(images)
    if prefixes.classes is not None:
        logits = logits.masked_fill(~prefixes.classes, 0)
    return prefixes.label_loss(logits, labels)


MASKED_CROSS_ENTROPY = Objective(
    name="masked-cross-entropy",
    loss=loss,
    passes=OWN_PASS,
    choices=lambda _: 0,
    summary="cross-entropy of the own submodel, logits of classes that the device lacks set to 0",
    source="HeteroFL (2010.01264)",
    masked=True,
)
