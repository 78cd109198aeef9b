"""A small convolutional network for CIFAR-sized images that trains on a CPU."""

from collections import OrderedDict

from torch import nn

from fedmaestro.models.shape import InputShape, image_dims
from fedmaestro.models.width import Scale, group_norm


def cnn(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """Three 3×3 convolutions (32, 64, 64 channels) with GroupNorm, pooling and ReLU, then 128 units."""
    channels, height, width = image_dims("cnn", input_shape, least=8)
    stages = (scale(32), scale(64), scale(64))
    layers: dict[str, nn.Module] = {}
    for i, (before, after) in enumerate(zip((channels, *stages), stages, strict=False), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"norm{i}"] = group_norm(after)
        # Maximum and ReLU commute: pooling first leaves a quarter of the activations to the rest.
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers[f"relu{i}"] = nn.ReLU()
    flat = stages[-1] * (height // 8) * (width // 8)
    return nn.Sequential(
        OrderedDict(
            **layers,
            flatten=nn.Flatten(),
            fc1=nn.Linear(flat, scale(128)),
            relu4=nn.ReLU(),
            fc2=nn.Linear(scale(128), num_classes),
        )
    )
