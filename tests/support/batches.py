"""Batches as devices get them."""

from torch import Tensor

from fedmaestro.tasks.task import Batch


def batch(images: Tensor, labels: Tensor) -> Batch:
    """Return a batch of one input."""
    return Batch((images,), labels)
