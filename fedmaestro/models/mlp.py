"""Multi-layer perceptron for small images and other examples of a fixed shape."""

import math
from collections import OrderedDict

from torch import nn

from fedmaestro.models.shape import InputShape
from fedmaestro.models.width import Scale


def mlp(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """Two hidden layers of 128 units with ReLU."""
    hidden = scale(128)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(input_shape), hidden),
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            fc3=nn.Linear(hidden, num_classes),
        )
    )
