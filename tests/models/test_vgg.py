"""VGG-19. Other tests of all models: ``test_architecture``, ``test_cost``."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import cost, trace
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.init import initialize
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


def test_layers_are_named_and_ordered_as_in_the_other_models() -> None:
    names = list(dict(CIFAR.full.named_children()))
    assert [n for n in names if n.startswith("conv")] == [f"conv{i}" for i in range(1, 17)]
    assert [n for n in names if n.startswith("pool")] == ["pool2", "pool4", "pool8", "pool12", "pool16"]
    assert names[-6:] == ["flatten", "fc1", "relu17", "fc2", "relu18", "fc3"]
    for i in range(1, 17):
        assert names.index(f"norm{i}") == names.index(f"conv{i}") + 1
        assert CIFAR.full.get_submodule(f"conv{i}").bias is None
    lod_form = Architecture(name="vgg19", input_shape=(3, 32, 32), num_classes=10)
    assert lod.max_ranks(lod_form.full) == {
        **{f"conv{i}": rank for i, rank in enumerate(CHANNELS[1:], start=2)},
        "fc1": 512,
        "fc2": 512,
    }


@pytest.mark.parametrize("width", [Fraction(1, 8), Fraction(1, 4)])
def test_a_narrow_model_scales_every_hidden_layer(width: Fraction) -> None:
    model = MODELS["vgg19"].build((3, 32, 32), 10, Scale(width))
    assert [model.get_submodule(f"conv{i}").out_channels for i in range(1, 17)] == [int(width * c) for c in CHANNELS]
    assert isinstance(model.get_submodule("fc3"), nn.Linear)
    assert model.get_submodule("fc3").weight.shape == (10, 512 * width)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_larger_images_are_taken_too() -> None:
    model = MODELS["vgg19"].build((1, 70, 64), 5, Scale(Fraction(1, 32)))
    assert model(torch.randn(2, 1, 70, 64)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(3, 31, 32), (3, 32, 31), (1, 28, 28)])
def test_smaller_images_are_refused(shape: tuple[int, ...]) -> None:
    message = f"'vgg19' needs images of at least 32×32 pixels, got {shape[1]}×{shape[2]}: use model.name='cnn'"
    with pytest.raises(UserError, match=message):
        MODELS["vgg19"].build(shape, 10, Scale())


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn", "resnet18", "vgg19"])
def test_token_sequences_are_refused_by_every_image_model(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.name='{name}' needs images \(C, H, W\), got the input shape \(32,\)"):
        MODELS[name].build((32,), 10, Scale())


def test_signals_neither_fade_nor_grow_at_the_start() -> None:
    with torch.device("meta"):
        model = MODELS["vgg19"].build((3, 32, 32), 10, Scale(Fraction(1, 4)))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, torch.Generator().manual_seed(0))
    logits = model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert 0.1 < float(logits.detach().std()) < 10
