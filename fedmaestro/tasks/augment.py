"""Augmentation: what makes training examples anew, the table of it, and the task that trains on it.

Shapes: ``B`` examples, ``C`` channels, ``H``, ``W`` pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmaestro.errors import UserError, check_name
from fedmaestro.tasks.task import Batch, Task

_PADDING = 4


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One row of ``AUGMENTATIONS``."""

    name: str
    apply: Callable[[Any, np.random.Generator], Any]
    """``(x, generator) -> x``: the inputs of some examples, a tensor or a tuple of them; targets stay."""
    summary: str
    images: bool = False
    """Whether it is for images ``(B, C, H, W)`` only."""


def crop_flipped(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Return random crops of the zero-padded ``images (B, C, H, W)``, half of them mirrored (He et al. 2016)."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (_PADDING,) * 4)
    top, left = (torch.from_numpy(generator.integers(2 * _PADDING + 1, size=(count, 1))) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.from_numpy(generator.random((count, 1)) < 0.5)
    columns = torch.where(mirrored, columns.flip(1), columns)
    # Advanced indices around a slice put the channels last, which is also the memory layout that convolutions like.
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Augmentation] = {
    row.name: row
    for row in (
        Augmentation(name="none", apply=lambda x, _: x, summary="examples are as they are"),
        Augmentation(
            name="crop-flip",
            apply=crop_flipped,
            summary="random crops after padding by 4 pixels, and mirror images",
            images=True,
        ),
    )
}
"""What ``data.augment`` can name."""


def augmented(task: Task, name: str) -> Task:
    """Return the task that trains on augmented examples; evaluation and calibration see them as they are.

    Raises:
        UserError: an unknown name, or an augmentation of images for examples that are none.
    """
    check_name("data.augment", name, AUGMENTATIONS)
    row = AUGMENTATIONS[name]
    if name == "none":
        return task
    if row.images and (len(task.inputs) != 1 or len(task.input_shape) != 3):
        raise UserError(f"data.augment={name!r}: the examples of {task.name!r} are no images (C, H, W)")

    def batch(indices: np.ndarray, generator: np.random.Generator) -> Batch:
        examples = task.plain(indices)
        x = row.apply(examples.x, generator)
        return Batch(x if isinstance(x, tuple) else (x,), examples.targets)

    return replace(task, batch=batch)
