"""The models, each defined once as a dense network; ``Architecture`` derives the LoD form and every size of both."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fedmaestro.models.cnn import cnn
from fedmaestro.models.init import initialize
from fedmaestro.models.lenet import lenet
from fedmaestro.models.mlp import mlp
from fedmaestro.models.resnet import resnet18
from fedmaestro.models.shape import InputShape, example_inputs
from fedmaestro.models.transformer import transformer, transformer_small
from fedmaestro.models.vgg import vgg19
from fedmaestro.models.width import Scale

__all__ = ["MODELS", "InputShape", "ModelSpec", "example_inputs"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One row of ``MODELS``: ``build(input_shape, num_classes, scale)`` returns the dense network.

    It maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``, or source and target tokens ``(B, L)`` to logits
    ``(B, L, num_classes)``.
    """

    build: Callable[[InputShape, int, Scale], nn.Module]
    initialize: Callable[[nn.Module, torch.Generator], None] | None = None
    """``(model, generator)``, called on uninitialised tensors; None: the model keeps what ``build`` gave it."""
    summary: str


def _drawn(build: Callable[[InputShape, int, Scale], nn.Module], summary: str) -> ModelSpec:
    """Return the row of a model that starts as ``init.initialize`` draws it."""
    return ModelSpec(build=build, initialize=initialize, summary=summary)


MODELS: dict[str, ModelSpec] = {
    "mlp": _drawn(build=mlp, summary="perceptron, two hidden layers of 128 (digits)"),
    "lenet": _drawn(build=lenet, summary="LeNet-5, 44,426 parameters dense (MNIST)"),
    "cnn": _drawn(build=cnn, summary="three convolutions with GroupNorm (CIFAR on a CPU)"),
    "resnet18": _drawn(build=resnet18, summary="ResNet-18 for CIFAR with GroupNorm"),
    "vgg19": _drawn(build=vgg19, summary="VGG-19 for CIFAR with GroupNorm"),
    "transformer": _drawn(build=transformer, summary="encoder-decoder Transformer, 6 + 6 layers of 512 (Multi30k)"),
    "transformer-small": _drawn(build=transformer_small, summary="3 + 3 layers of 96 (Multi30k on a CPU)"),
}
