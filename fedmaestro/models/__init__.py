"""The models, each defined once as a dense network; ``Architecture`` derives the LoD form and every size of both."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedmaestro.models.cnn import cnn
from fedmaestro.models.conv import conv
from fedmaestro.models.init import initialize
from fedmaestro.models.lenet import lenet
from fedmaestro.models.mlp import mlp
from fedmaestro.models.resnet import resnet18
from fedmaestro.models.shape import InputShape, example_inputs
from fedmaestro.models.transformer import transformer, transformer_small
from fedmaestro.models.vgg import vgg19
from fedmaestro.models.width import Scale

__all__ = ["MODELS", "InputShape", "ModelSpec", "example_inputs", "own_model"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One row of ``MODELS``: ``build(input_shape, num_classes, scale)`` returns the dense network.

    It maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``, source and target tokens ``(B, L)`` to logits
    ``(B, L, num_classes)``, or whatever the task at hand has.
    """

    build: Callable[[InputShape, int, Scale], nn.Module]
    initialize: Callable[[nn.Module, torch.Generator], None] | None = None
    """``(model, generator)``, called on uninitialised tensors; None: the model keeps what ``build`` gave it."""
    scales: bool = True
    """Whether ``build`` makes narrower networks at smaller scales."""
    blocks: tuple[str, ...] = ()
    """Last layer of each block of a sequence of layers, after which an early exit can be (``exits``); none: it has no
    such form."""
    optional: tuple[str, ...] = ()
    """Residual blocks that the network can do without (``steps``)."""
    summary: str


def _drawn(
    build: Callable[[InputShape, int, Scale], nn.Module], summary: str, blocks: str = "", optional: str = ""
) -> ModelSpec:
    """Return the row of a model that starts as ``init.initialize`` draws it."""
    ends, others = tuple(blocks.split()), tuple(optional.split())
    return ModelSpec(build=build, initialize=initialize, summary=summary, blocks=ends, optional=others)


MODELS: dict[str, ModelSpec] = {
    "mlp": _drawn(build=mlp, summary="perceptron, two hidden layers of 128 (digits)", blocks="relu1 relu2"),
    "lenet": _drawn(build=lenet, summary="LeNet-5, 44,426 parameters dense (MNIST)", blocks="relu1 relu2 relu3 relu4"),
    "cnn": _drawn(
        build=cnn, summary="three convolutions with GroupNorm (CIFAR on a CPU)", blocks="relu1 relu2 relu3 relu4"
    ),
    "conv": _drawn(
        build=conv,
        summary="HeteroFL's four convolutions, 1,556,874 parameters dense (MNIST)",
        blocks="relu1 relu2 relu3 relu4",
    ),
    "resnet18": _drawn(
        build=resnet18,
        summary="ResNet-18 for CIFAR with GroupNorm",
        blocks="block1b block2b block3b block4b",
        optional="block1b block2b block3b block4b",
    ),
    "vgg19": _drawn(build=vgg19, summary="VGG-19 for CIFAR with GroupNorm", blocks="relu2 relu4 relu8 relu12 relu16"),
    "transformer": _drawn(build=transformer, summary="encoder-decoder Transformer, 6 + 6 layers of 512 (Multi30k)"),
    "transformer-small": _drawn(build=transformer_small, summary="3 + 3 layers of 96 (Multi30k on a CPU)"),
}


def own_model(made: Any, summary: str) -> ModelSpec:
    """Return the row of a user's model, which keeps its own initialisation.

    Args:
        made: a class or a function that is called with the shape of an example and the number of outputs, as far as it
            takes them, and with ``scale`` if it has such a parameter (``scale(channels)`` is the number of channels of
            a narrower network); or a module, of which every run starts from a copy.
        summary: what it is.
    """
    if isinstance(made, nn.Module):
        return ModelSpec(build=lambda _shape, _outputs, _scale: copy.deepcopy(made), scales=False, summary=summary)
    try:
        parameters = list(inspect.signature(made).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "scale"]
    many = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    taken = 2 if many or len(places) > 2 else len(places)
    scales = any(p.name == "scale" for p in parameters)

    def build(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
        more = {"scale": scale} if scales else {}
        model: nn.Module = made(*(input_shape, num_classes)[:taken], **more)
        return model

    return ModelSpec(build=build, scales=scales, summary=summary)
