"""Static batch norms and their calibration. ``B`` batch, ``C`` channels."""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.clients.base import Prefixes
from fedmaestro.fleet.cost import trace
from fedmaestro.models.architecture import FULL, Architecture
from fedmaestro.models.static_norm import EPSILON, StaticNorm, calibrate, use_static_norms
from fedmaestro.models.width import group_norm
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


def test_channels_are_normalised_one_by_one_over_examples_and_positions() -> None:
    x = torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    expected = (x - mean) / (var + EPSILON).sqrt()
    torch.testing.assert_close(StaticNorm(5)(x), expected)
    torch.testing.assert_close(StaticNorm(5)(x.to(memory_format=torch.channels_last)), expected)


def test_one_value_per_channel_gives_the_bias() -> None:
    norm = StaticNorm(3)
    load(norm, {"weight": torch.full((3,), 2.0), "bias": torch.tensor([0.0, 1.0, 2.0])})
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    out = norm(x)
    torch.testing.assert_close(out.flatten(), norm.bias.detach(), rtol=0, atol=1e-3)
    out.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


# ---------------------------------------------------------------- in the models


@pytest.mark.parametrize("form", ["dense", "lod"])
@pytest.mark.parametrize("arch", NORMED, ids=name_of)
def test_the_state_is_that_of_the_group_norms_at_every_size(arch: Architecture, form: str) -> None:
    arch = replace(arch, form=form)  # type: ignore[arg-type]
    for width in WIDTHS:
        size = arch.size_at(width)
        assert arch.shapes(size) == replace(arch, norm="group").shapes(size)
        assert list(arch.shapes(size)) == list(replace(arch, norm="group").shapes(size))


@pytest.mark.parametrize("arch", NORMED, ids=name_of)
def test_every_norm_is_static(arch: Architecture) -> None:
    groups = [m for m in replace(arch, norm="group").full.modules() if hasattr(m, "bias") and "Norm" in repr(m)[:20]]
    assert len(norms(arch.full)) == len(groups) > 0


@pytest.mark.parametrize("name", ["mlp", "lenet", "transformer-small"])
def test_models_without_group_norms_are_unaffected(name: str) -> None:
    plain = Architecture(name=name, input_shape=(6,) if "former" in name else (1, 16, 16), num_classes=5)
    static = replace(plain, norm="static")
    assert repr(static.full) == repr(plain.full)
    model = static.materialize(static.full_size).train()
    calibrate(model, torch.zeros(1))  # no forward pass: of this shape, it would fail
    assert not model.training


def test_layer_norms_and_names_stay() -> None:
    model = nn.Sequential(group_norm(40), nn.Sequential(group_norm(16), nn.LayerNorm(3)), nn.BatchNorm2d(2))
    before = shapes_of(model)
    use_static_norms(model)
    assert shapes_of(model) == before
    assert [type(m).__name__ for m in model.modules() if not isinstance(m, nn.Sequential)] == [
        "StaticNorm",
        "StaticNorm",
        "LayerNorm",
        "BatchNorm2d",
    ]


@pytest.mark.parametrize("form", ["dense", "lod"])
def test_the_initial_state_is_that_of_the_group_norms(form: str) -> None:
    arch = replace(CNN, form=form)  # type: ignore[arg-type]
    static, group = arch.initial_state(3), replace(arch, norm="group").initial_state(3)
    assert static.keys() == group.keys()
    assert all(torch.equal(tensor, group[name]) for name, tensor in static.items())


@pytest.mark.parametrize("width", WIDTHS[:2])
def test_a_narrow_model_is_the_leading_block_by_channels(width: Fraction) -> None:
    """Under static norms a channel's output depends on that channel only: the first layers agree exactly."""
    whole, narrow = random_model(CNN, FULL), CNN.materialize(CNN.size_at(width)).double()
    load(narrow, cut(whole.state_dict(), shapes_of(narrow)))
    x = images_of(CNN, 3)
    first = [model.get_submodule("norm1")(model.get_submodule("conv1")(x)) for model in (whole, narrow)]
    torch.testing.assert_close(first[1], first[0][:, : first[1].shape[1]])


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


@pytest.mark.parametrize("width", [Fraction(1, 16), FULL])
@pytest.mark.parametrize("form", ["dense", "lod"])
def test_costs_are_those_of_the_group_norms(form: str, width: Fraction) -> None:
    """ResNet-18 normalises 1×1 maps here: with one example, one value per channel."""
    if form == "dense" and width == FULL:
        width = Fraction(1, 8)
    arch = replace(RESNET, form=form)  # type: ignore[arg-type]
    static, group = (trace(a.build(a.size_at(width)), a.input_shape) for a in (arch, replace(arch, norm="group")))
    assert static.layers == group.layers
    assert static.fixed_params == group.fixed_params
    assert 0.9 * group.fixed_activation_bytes < static.fixed_activation_bytes <= group.fixed_activation_bytes


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("arch", NORMED, ids=name_of)
@pytest.mark.parametrize("width", [Fraction(1, 16), Fraction(3, 16)])
def test_calibrated_on_the_whole_set_its_evaluation_is_one_training_batch(arch: Architecture, width: Fraction) -> None:
    model, x = random_model(arch, width), images_of(arch, 12)
    in_training = model(x).detach()
    calibrate(model, x)
    for batch in (12, 5, 1):
        parts = [model(part).detach() for part in torch.split(x, batch)]
        torch.testing.assert_close(torch.cat(parts), in_training, rtol=1e-6, atol=1e-8)


def test_calibration_follows_the_evaluated_function_without_scalers() -> None:
    arch = replace(CNN, scaler=True)
    scaled, plain = random_model(arch, Fraction(1, 4)), random_model(CNN, Fraction(1, 4))
    x, other = images_of(CNN, 6), images_of(CNN, 3, seed=1)
    for model in (scaled, plain):
        calibrate(model, x)
    assert torch.equal(scaled(other), plain(other))


def test_before_calibration_evaluation_takes_the_batch() -> None:
    model, x = random_model(CNN, Fraction(1, 4)), images_of(CNN, 6)
    in_training = model(x)
    assert torch.equal(model.eval()(x), in_training)
    assert not torch.allclose(model(x[:3]), in_training[:3])


def test_a_second_calibration_replaces_the_first() -> None:
    model, x = random_model(CNN, Fraction(1, 4)), images_of(CNN, 6)
    calibrate(model, x)
    expected = model(x)
    calibrate(model, images_of(CNN, 6, seed=1) + 3)
    assert not torch.allclose(model(x), expected)
    calibrate(model, x)
    assert torch.equal(model(x), expected)


def test_training_voids_the_statistics() -> None:
    model, x = random_model(CNN, Fraction(1, 4)), images_of(CNN, 6)
    calibrate(model, x)
    assert all(norm.mean is not None for norm in norms(model.eval()))
    assert all(norm.mean is None and norm.var is None for norm in norms(model.train()))


def test_calibration_leaves_state_gradients_and_generator_alone() -> None:
    torch.manual_seed(0)
    model, x = random_model(CNN, Fraction(1, 4)), images_of(CNN, 6)
    before, generator = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    calibrate(model, x)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(norm.mean is None or norm.mean.requires_grad for norm in norms(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_copies_keep_the_calibration() -> None:
    model, x = random_model(CNN, Fraction(1, 4)), images_of(CNN, 6)
    calibrate(model, x)
    assert torch.equal(copy.deepcopy(model)(x[:2]), model(x[:2]))


def test_the_lod_form_is_calibrated_like_the_dense_one() -> None:
    dense, x = random_model(CNN, Fraction(1, 4)), images_of(CNN, 6)
    factors = lod.factorize(dense)
    for model in (dense, factors):
        calibrate(model, x)
    torch.testing.assert_close(factors(x[:2]), dense(x[:2]), rtol=1e-6, atol=1e-8)
