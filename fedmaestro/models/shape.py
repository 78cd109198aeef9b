"""What a model takes: the shape of one example, without the batch."""

import torch
from torch import Tensor

from fedmaestro.errors import UserError

InputShape = tuple[int, ...]
"""``(C, H, W)`` of images, or ``(L,)``: the longest pair of token sequences."""

_SOME_TOKEN = 1


def example_inputs(input_shape: InputShape, batch: int) -> tuple[Tensor, ...]:
    """Return what a model of this shape is called with, for measuring: values do not matter.

    Zero images ``(batch, C, H, W)``, or source and target tokens ``(batch, L)``, none of them padding.
    """
    if len(input_shape) == 1:
        tokens = torch.full((batch, *input_shape), _SOME_TOKEN)
        return tokens, tokens.clone()
    return (torch.zeros(batch, *input_shape),)


def image_dims(model: str, input_shape: InputShape, least: int = 1, advice: str = "") -> tuple[int, int, int]:
    """Return ``(C, H, W)`` after checking that it is the shape of images of at least ``least × least`` pixels."""
    if len(input_shape) != 3:
        raise UserError(f"model.name={model!r} needs images (C, H, W), got the input shape {tuple(input_shape)}")
    channels, height, width = input_shape
    if min(height, width) < least:
        needs = f"model.name={model!r} needs images of at least {least}×{least} pixels, got {height}×{width}"
        raise UserError(f"{needs}: {advice}" if advice else needs)
    return channels, height, width


def sequence_length(model: str, input_shape: InputShape) -> int:
    """Return ``L`` after checking that this is the shape of token sequences."""
    if len(input_shape) != 1:
        raise UserError(f"model.name={model!r} needs token sequences (L,), got the input shape {tuple(input_shape)}")
    return input_shape[0]
