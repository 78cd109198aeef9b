"""The scaler: outputs of narrower layers over their width ratio, in training only."""

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedmaestro.fleet.cost import trace
from fedmaestro.models.architecture import FULL, Architecture, Norm
from fedmaestro.models.scaler import Scaler
from fedmaestro.submodel import State, load, shapes_of

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


@pytest.mark.parametrize("arch", [MLP, LENET], ids=name_of)
@pytest.mark.parametrize("width", [Fraction(1, 16), Fraction(1, 5), Fraction(3, 8)])
def test_where_channels_are_interchangeable_the_narrow_model_computes_the_whole_ones_logits(
    arch: Architecture, width: Fraction
) -> None:
    """All weights and biases of a layer are equal, so each channel stands for ``1 / ratio`` of the whole model's."""
    x = images_of(arch)
    values = torch.linspace(0.01, 0.05, len(arch.shapes(arch.full_size)))
    logits = []
    for size in (FULL, width):
        shapes = arch.shapes(arch.size_at(size))
        state = {name: torch.full(shape, float(v)) for (name, shape), v in zip(shapes.items(), values, strict=True)}
        logits.append(model_of(arch, size, state)(x))
    torch.testing.assert_close(logits[0], logits[1])


# ---------------------------------------------------------------- when nothing is scaled


@pytest.mark.parametrize("arch", SCALED, ids=name_of)
def test_evaluation_is_that_of_the_plain_model(arch: Architecture) -> None:
    width, x = Fraction(1, 5), images_of(arch)
    state = random_state(arch, width)
    models = [model_of(a, width, state).eval() for a in (arch, plain(arch))]
    assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize("norm", ["group", "static"])
@pytest.mark.parametrize("arch", SCALED, ids=name_of)
def test_the_whole_model_the_lod_form_and_plain_models_have_no_scalers(arch: Architecture, norm: Norm) -> None:
    arch = replace(arch, norm=norm)
    for other in (plain(arch), replace(arch, form="lod")):
        assert not ratios(other.build(other.size_at(Fraction(1, 5))))
    assert not ratios(arch.full)
    assert not ratios(arch.build(arch.full_size))
    assert not any(m._forward_hooks for m in plain(arch).build(arch.size_at(Fraction(1, 5))).modules())


@pytest.mark.parametrize("norm", ["group", "static"])
@pytest.mark.parametrize("arch", SCALED, ids=name_of)
def test_states_and_sizes_are_those_of_the_plain_model(arch: Architecture, norm: Norm) -> None:
    arch = replace(arch, norm=norm)
    smaller: dict[str, tuple[int, ...]] | None = None
    for width in (Fraction(1, 16), Fraction(2, 5), FULL):
        shapes = arch.shapes(arch.size_at(width))
        assert list(shapes.items()) == list(plain(arch).shapes(arch.size_at(width)).items())
        if smaller is not None:
            assert all(a <= b for name, shape in smaller.items() for a, b in zip(shape, shapes[name], strict=True))
        smaller = shapes
    assert arch.fractions() == plain(arch).fractions()


def test_the_initial_state_is_that_of_the_plain_model() -> None:
    first, second = LENET.initial_state(0), plain(LENET).initial_state(0)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---------------------------------------------------------------- what models go through


def test_scalers_survive_copies_and_moves() -> None:
    width, x = Fraction(1, 5), images_of(CNN)
    model = model_of(CNN, width)
    expected = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    copied.eval()
    assert torch.equal(model(x), expected), "a copy's mode is its own"
    built = copy.deepcopy(CNN.build(CNN.size_at(width))).to_empty(device="cpu").double()
    built.load_state_dict(copied.state_dict())
    assert torch.equal(built(x), expected)
    moved = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(moved(x), expected)  # kernels of this layout round otherwise


def test_a_meta_template_runs_with_scalers() -> None:
    width, x = Fraction(1, 5), images_of(CNN)
    model = model_of(CNN, width)
    template = CNN.build(CNN.size_at(width))
    assert shapes_of(template) == shapes_of(model)
    assert torch.equal(functional_call(template, dict(model.named_parameters()), (x,)), model(x))


@pytest.mark.parametrize("arch", [LENET, RESNET], ids=name_of)
def test_costs_are_those_of_the_plain_model(arch: Architecture) -> None:
    size = arch.size_at(Fraction(1, 5))
    assert trace(arch.build(size), arch.input_shape) == trace(plain(arch).build(size), arch.input_shape)
