"""Static batch norms and their calibration. ``B`` batch, ``C`` channels."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from fedmaestro.clients.base import Prefixes
from fedmaestro.models.architecture import FULL, Architecture
from fedmaestro.models.static_norm import EPSILON, StaticNorm, calibrate
from fedmaestro.submodel import cut, load, shapes_of

CNN = Architecture(name="cnn", input_shape=(2, 9, 8), num_classes=5, form="dense", norm="static")
RESNET = replace(CNN, name="resnet18", input_shape=(2, 8, 7))
VGG = replace(CNN, name="vgg19", input_shape=(2, 32, 32))
NORMED = [CNN, RESNET, VGG]
WIDTHS = [Fraction(1, 16), Fraction(2, 5), FULL]


def name_of(arch: Architecture) -> str:
    return arch.name


def images_of(arch: Architecture, batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *arch.input_shape, generator=torch.Generator().manual_seed(seed)).double()


def random_model(arch: Architecture, width: Fraction) -> nn.Module:
    """In double precision, with norms that are no identities."""
    generator = torch.Generator().manual_seed(0)
    size = arch.size_at(width)
    model = arch.materialize(size)
    load(model, {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in arch.shapes(size).items()})
    return model.double()


def norms(model: nn.Module) -> list[StaticNorm]:
    return [module for module in model.modules() if isinstance(module, StaticNorm)]


# ---------------------------------------------------------------- one layer, by hand


def test_training_normalises_by_the_batch() -> None:
    """Values 1 and 3: mean 2, biased variance 1; then weight 2 and bias 1."""
    norm = StaticNorm(1)
    load(norm, {"weight": torch.tensor([2.0]), "bias": torch.tensor([1.0])})
    step = 2 / math.sqrt(1 + EPSILON)
    expected = torch.tensor([1 - step, 1 + step]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(norm(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)), expected)


def test_evaluation_normalises_by_what_was_calibrated() -> None:
    """Values 0 and 4: mean 2, variance 4. So 8 becomes (8 - 2) / 2 = 3, alone or beside any other value."""
    norm = StaticNorm(1)
    calibrate(norm, torch.tensor([0.0, 4.0]).reshape(2, 1, 1, 1))
    scale = 1 / math.sqrt(4 + EPSILON)
    for values in ([8.0], [8.0, -100.0]):
        x = torch.tensor(values).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(norm(x), (x - 2) * scale)


def test_each_layer_is_calibrated_on_what_calibrated_layers_make_of_the_images() -> None:
    """Values 0 and 4 become -1 and 1, after the ReLU 0 and 1: mean ½, variance ¼ (not 2 and 4)."""
    model = nn.Sequential(StaticNorm(1), nn.ReLU(), StaticNorm(1))
    calibrate(model, torch.tensor([0.0, 4.0]).reshape(2, 1, 1, 1))
    first, last = norms(model)
    expected = torch.tensor([2.0, 4.0, 0.5, 0.25])
    assert first.mean is not None
    torch.testing.assert_close(torch.cat([first.mean, first.var, last.mean, last.var]), expected, rtol=1e-4, atol=0)  # type: ignore[list-item]


# ---------------------------------------------------------------- in the models


@pytest.mark.parametrize("form", ["dense", "lod"])
@pytest.mark.parametrize("arch", NORMED, ids=name_of)
def test_the_state_is_that_of_the_group_norms_at_every_size(arch: Architecture, form: str) -> None:
    arch = replace(arch, form=form)  # type: ignore[arg-type]
    for width in WIDTHS:
        size = arch.size_at(width)
        assert arch.shapes(size) == replace(arch, norm="group").shapes(size)
        assert list(arch.shapes(size)) == list(replace(arch, norm="group").shapes(size))


@pytest.mark.parametrize("scaler", [False, True])
def test_a_smaller_level_computes_what_the_cut_model_does(scaler: bool) -> None:
    arch = replace(CNN, scaler=scaler)
    model, size = random_model(arch, FULL), arch.size_at(Fraction(2, 5))
    template = arch.build(size)
    small = arch.materialize(size).double()
    load(small, cut(model.state_dict(), shapes_of(small)))
    x = images_of(arch, 4)
    torch.testing.assert_close(
        Prefixes(model=model, smaller=[(template, shapes_of(template))], num_classes=10)(x, 1), small(x)
    )


# ---------------------------------------------------------------- calibration
