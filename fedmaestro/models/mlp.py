"""Multi-layer perceptron for small images."""

import math
from collections import OrderedDict

from torch import nn

from fedmaestro.models.width import Scale


def mlp(image_shape: tuple[int, int, int], num_classes: int, scale: Scale) -> nn.Module:
    """Two hidden layers of 128 units with ReLU."""
    hidden = scale(128)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(image_shape), hidden),
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            fc3=nn.Linear(hidden, num_classes),
        )
    )
