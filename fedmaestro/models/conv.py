"""HeteroFL's convolutional network: four stages and one linear layer; 1,556,874 parameters on MNIST."""

from collections import OrderedDict

from torch import nn

from fedmaestro.models.shape import InputShape, image_dims
from fedmaestro.models.width import Scale, group_norm

CHANNELS = (64, 128, 256, 512)


def conv(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """3×3 convolutions with norm, ReLU and pooling (but after the last), the mean over positions, a linear layer.

    HeteroFL (2010.01264), "CNN" of its tables: ``model.norm = "static"`` and ``model.scaler = "on"``, as the row
    ``heterofl`` has them, make it the paper's.
    """
    before, *_ = image_dims("conv", input_shape, least=8)
    layers: dict[str, nn.Module] = {}
    for i, channels in enumerate(CHANNELS, start=1):
        after = scale(channels)
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"norm{i}"] = group_norm(after)
        if i < len(CHANNELS):
            # Maximum and ReLU commute: pooling first leaves a quarter of the activations to the rest.
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers[f"relu{i}"] = nn.ReLU()
        before = after
    return nn.Sequential(
        OrderedDict(**layers, mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(before, num_classes))
    )
