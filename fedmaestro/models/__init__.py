"""The models, each defined once as a dense network; ``Architecture`` derives the LoD form and every size of both."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedmaestro.models.cnn import cnn
from fedmaestro.models.lenet import lenet
from fedmaestro.models.mlp import mlp
from fedmaestro.models.resnet import resnet18
from fedmaestro.models.width import Scale

ImageShape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One row of ``MODELS``: ``build(image_shape (C, H, W), num_classes, scale)`` returns the dense network."""

    build: Callable[[ImageShape, int, Scale], nn.Module]
    channels: int
    """Largest scaled channel count: widths are multiples of its inverse."""
    summary: str


MODELS: dict[str, ModelSpec] = {
    "mlp": ModelSpec(build=mlp, channels=128, summary="perceptron, two hidden layers of 128 (digits)"),
    "lenet": ModelSpec(build=lenet, channels=120, summary="LeNet-5, 44,426 parameters dense (MNIST)"),
    "cnn": ModelSpec(build=cnn, channels=128, summary="three convolutions with GroupNorm (CIFAR on a CPU)"),
    "resnet18": ModelSpec(build=resnet18, channels=512, summary="ResNet-18 for CIFAR with GroupNorm"),
}
