"""LeNet-5 with ReLU and max pooling, without padding: 44,426 parameters on MNIST."""

from collections import OrderedDict

from torch import nn

from fedmaestro.models.shape import InputShape, image_dims
from fedmaestro.models.width import Scale


def lenet(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """Two 5×5 convolutions (6 and 16 channels), then 120 and 84 units (LeCun et al. 1998, as Maestro has it)."""
    channels, height, width = image_dims("lenet", input_shape, least=16, advice="use model.name='mlp'")
    flat = scale(16) * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, scale(6), 5),
            # Maximum and ReLU commute: pooling first leaves a quarter of the activations to the rest.
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(scale(6), scale(16), 5),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(flat, scale(120)),
            relu3=nn.ReLU(),
            fc2=nn.Linear(scale(120), scale(84)),
            relu4=nn.ReLU(),
            fc3=nn.Linear(scale(84), num_classes),
        )
    )
