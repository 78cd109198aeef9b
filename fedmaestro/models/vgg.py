"""VGG-19 for 32×32 images with GroupNorm in the place of BatchNorm."""

from collections import OrderedDict

from torch import nn

from fedmaestro.models.shape import InputShape, image_dims
from fedmaestro.models.width import Scale, group_norm

STAGES = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


def vgg19(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """Five stages of 3×3 convolutions, each stage halving the image, then two hidden layers of 512 units.

    Configuration E of Simonyan and Zisserman (ICLR 2015) in the form used for CIFAR (20.56 M parameters, 0.40 GMACs at
    32×32): every convolution is followed by a norm instead of a bias, and 512 units take the place of 4,096. GroupNorm
    needs no statistics, which a server without data could not recompute (Hsieh et al., ICML 2020).
    """
    before, height, width = image_dims("vgg19", input_shape, least=32, advice="use model.name='cnn'")
    layers: dict[str, nn.Module] = {}
    i = 0
    for stage in STAGES:
        for position, channels in enumerate(stage, start=1):
            i, after = i + 1, scale(channels)
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers[f"norm{i}"] = group_norm(after)
            if position == len(stage):
                # Maximum and ReLU commute: pooling first leaves a quarter of the activations to the rest.
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            layers[f"relu{i}"] = nn.ReLU()
            before = after
    hidden = scale(512)
    return nn.Sequential(
        OrderedDict(
            **layers,
            flatten=nn.Flatten(),
            fc1=nn.Linear(before * (height // 32) * (width // 32), hidden),
            relu17=nn.ReLU(),
            fc2=nn.Linear(hidden, hidden),
            relu18=nn.ReLU(),
            fc3=nn.Linear(hidden, num_classes),
        )
    )
