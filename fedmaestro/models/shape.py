"""What a model takes: the shapes of one example's inputs, without the batch."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmaestro.errors import UserError

InputShape = tuple[int, ...]
"""``(C, H, W)`` of images, ``(L,)`` of sequences of at most ``L`` tokens, or whatever shape an example has."""

_SOME_TOKEN = 1


@dataclass(frozen=True)
class Input:
    """One input of a model."""

    shape: InputShape
    dtype: Literal["float32", "int64"] = "float32"
    """Numbers, or tokens and other indices."""


Inputs = tuple[Input, ...]


def inputs_of(input_shape: InputShape) -> Inputs:
    """Return the inputs of the built-in tasks: images, or source and target tokens of one length."""
    if len(input_shape) == 1:
        return (Input(input_shape, "int64"),) * 2
    return (Input(input_shape),)


def example_inputs(inputs: Inputs | InputShape, batch: int) -> tuple[Tensor, ...]:
    """Return what a model is called with, for measuring: values do not matter.

    Zeros ``(batch, …)``, or tokens, none of them padding. A plain shape stands for ``inputs_of`` it.
    """
    if not all(isinstance(x, Input) for x in inputs):
        inputs = inputs_of(tuple(int(x) for x in inputs))  # type: ignore[arg-type]
    return tuple(
        torch.full((batch, *x.shape), _SOME_TOKEN) if x.dtype == "int64" else torch.zeros(batch, *x.shape)
        for x in inputs
        if isinstance(x, Input)
    )


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
