"""Multi-layer perceptron for small images."""

import math
from collections import OrderedDict

from torch import nn

from fedmaestro.models.shape import InputShape, image_dims
from fedmaestro.models.width import Scale


def mlp(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """Two hidden layers of 128 units with ReLU."""
    hidden = scale(128)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(image_dims("mlp", input_shape)), hidden),
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            fc3=nn.Linear(hidden, num_classes),
        )
    )
