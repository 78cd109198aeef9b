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
    summary: str


MODELS: dict[str, ModelSpec] = {
    "mlp": ModelSpec(build=mlp, summary="perceptron, two hidden layers of 128 (digits)"),
    "lenet": ModelSpec(build=lenet, summary="LeNet-5, 44,426 parameters dense (MNIST)"),
    "cnn": ModelSpec(build=cnn, summary="three convolutions with GroupNorm (CIFAR on a CPU)"),
    "resnet18": ModelSpec(build=resnet18, summary="ResNet-18 for CIFAR with GroupNorm"),
}
