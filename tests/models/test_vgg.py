"""VGG-19. Other tests of all models: ``test_architecture``, ``test_cost``."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import cost, trace
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.width import Scale
from fedmaestro.submodel import num_elements

CIFAR = Architecture(name="vgg19", input_shape=(3, 32, 32), num_classes=10, form="dense")
CHANNELS = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
SIDES = [32] * 2 + [16] * 2 + [8] * 4 + [4] * 4 + [2] * 4


def test_the_parameters_are_those_of_the_paper() -> None:
    convs = sum(after * before * 9 for before, after in zip([3, *CHANNELS], CHANNELS, strict=False))
    norms, hidden, head = 2 * sum(CHANNELS), 2 * (512 * 512 + 512), 5130
    assert num_elements(CIFAR.shapes(CIFAR.full_size)) == convs + norms + hidden + head == 20_560_330


def test_it_takes_0_40_gmacs() -> None:
    convs = zip([3, *CHANNELS], CHANNELS, SIDES, strict=False)
    expected = sum(side**2 * after * before * 9 for before, after, side in convs) + 2 * 512 * 512 + 5120
    macs = cost(trace(CIFAR.full, CIFAR.input_shape), {}, batch_size=1).macs_per_example
    assert macs == expected == 398_660_608
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        CIFAR.full(torch.zeros(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("shape", [(3, 31, 32), (3, 32, 31), (1, 28, 28)])
def test_smaller_images_are_refused(shape: tuple[int, ...]) -> None:
    message = f"'vgg19' needs images of at least 32×32 pixels, got {shape[1]}×{shape[2]}: use model.name='cnn'"
    with pytest.raises(UserError, match=message):
        MODELS["vgg19"].build(shape, 10, Scale())


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn", "resnet18", "vgg19"])
def test_token_sequences_are_refused_by_every_image_model(name: str) -> None:
    if name == "mlp":
        MODELS[name].build((32,), 10, Scale())  # numbers of any shape
        return
    with pytest.raises(UserError, match=rf"model.name='{name}' needs images \(C, H, W\), got the input shape \(32,\)"):
        MODELS[name].build((32,), 10, Scale())
