"""The scaler: outputs of narrower layers over their width ratio, in training only."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro.models.architecture import Architecture
from fedmaestro.models.scaler import Scaler
from fedmaestro.submodel import State, load

MLP = Architecture(name="mlp", input_shape=(1, 3, 3), num_classes=5, form="dense", scaler=True)
LENET = replace(MLP, name="lenet", input_shape=(1, 16, 16))
CNN = replace(MLP, name="cnn", input_shape=(2, 9, 8))
RESNET = replace(MLP, name="resnet18", input_shape=(2, 8, 7))
VGG = replace(MLP, name="vgg19", input_shape=(2, 32, 32))
SCALED = [MLP, LENET, CNN, RESNET, VGG]


def name_of(arch: Architecture) -> str:
    return arch.name


def plain(arch: Architecture) -> Architecture:
    return replace(arch, scaler=False)


def random_state(arch: Architecture, width: Fraction) -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = arch.shapes(arch.size_at(width))
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def model_of(arch: Architecture, width: Fraction, state: State | None = None) -> nn.Module:
    """In double precision."""
    model = arch.materialize(arch.size_at(width))
    load(model, random_state(arch, width) if state is None else state)
    return model.double()


def images_of(arch: Architecture, batch: int = 3) -> Tensor:
    return torch.randn(batch, *arch.input_shape, generator=torch.Generator().manual_seed(1)).double()


def ratios(model: nn.Module) -> dict[str, float]:
    """The divisors of all layers that have one."""
    return {
        name: hook.ratio
        for name, layer in model.named_modules()
        for hook in layer._forward_hooks.values()
        if isinstance(hook, Scaler)
    }


# ---------------------------------------------------------------- by hand


def test_ratios_are_those_of_the_channels_that_are_kept() -> None:
    """LeNet at 1/16 keeps 1 of 6, 1 of 16, 8 of 120 and 6 of 84 outputs, and all of the head's."""
    expected = {"conv1": 1 / 6, "conv2": 1 / 16, "fc1": 8 / 120, "fc2": 6 / 84}
    assert ratios(LENET.build(LENET.size_at(Fraction(1, 16)))) == expected


def test_a_narrow_perceptron_by_hand() -> None:
    """At 3/8, 48 of 128: every hidden layer over 48/128, the head not."""
    x = images_of(MLP)
    model = model_of(MLP, Fraction(3, 8))
    w = dict(model.named_parameters())
    hidden = x.flatten(1)
    for layer in ("fc1", "fc2"):
        hidden = F.relu(F.linear(hidden, w[f"{layer}.weight"], w[f"{layer}.bias"]) * 128 / 48)
    torch.testing.assert_close(model(x), F.linear(hidden, w["fc3.weight"], w["fc3.bias"]))


@pytest.mark.parametrize("arch", SCALED, ids=name_of)
def test_training_is_that_of_a_plain_model_whose_weights_are_divided(arch: Architecture) -> None:
    """``(W x + b) / ratio`` is a layer with ``W / ratio`` and ``b / ratio``; every ratio from the layers' own sizes."""
    width = Fraction(1, 5)
    state, whole = random_state(arch, width), arch.shapes(arch.full_size)
    layers = {n for n, m in plain(arch).full.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    divided = {
        name: tensor * whole[name][0] / len(tensor) if name.rsplit(".", 1)[0] in layers else tensor
        for name, tensor in state.items()
    }
    x = images_of(arch)
    expected = model_of(plain(arch), width, divided)(x)
    torch.testing.assert_close(model_of(arch, width, state)(x), expected, rtol=1e-4, atol=1e-4)
    if arch in (MLP, LENET, CNN):  # elsewhere norms hide most of a factor
        assert not torch.allclose(model_of(plain(arch), width, state)(x), expected, rtol=1e-2)


# ---------------------------------------------------------------- when nothing is scaled


# ---------------------------------------------------------------- what models go through
