"""Models in both forms and all of their sizes. ``R`` full rank of a layer."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import FULL, Architecture, Form
from fedmaestro.models.width import Scale, group_norm
from fedmaestro.submodel import cut, load, num_elements, shapes_of

INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (2, 5, 4),
    "lenet": (2, 17, 16),
    "cnn": (2, 9, 8),
    "conv": (2, 9, 8),
    "resnet18": (2, 8, 7),
    "vgg19": (2, 33, 32),
    "transformer": (4,),
    "transformer-small": (6,),
}
WIDTHLESS = ("transformer", "transformer-small")  # dense, they have one size
LARGE = ("resnet18", "vgg19", "transformer")  # their SVDs take half a minute
FORMS: tuple[Form, ...] = ("lod", "dense")
CELLS = [(name, form) for name in MODELS for form in FORMS if form == "lod" or name not in WIDTHLESS]
QUICK_CELLS = [cell for cell in CELLS if cell[0] not in LARGE]
FRACTIONS = st.fractions(min_value=Fraction(1, 600), max_value=1, max_denominator=600)


@cache
def architecture(name: str, form: Form, keep_dense: str = "first-conv head") -> Architecture:
    return Architecture(name=name, input_shape=INPUT_SHAPES[name], num_classes=7, form=form, keep_dense=keep_dense)


def examples(arch: Architecture, batch: int) -> tuple[Tensor, ...]:
    """Random images, or random tokens that are no padding."""
    generator = torch.Generator().manual_seed(1)
    if len(arch.input_shape) == 1:
        return tuple(torch.randint(1, 7, (batch, *arch.input_shape), generator=generator) for _ in range(2))
    return (torch.randn(batch, *arch.input_shape, generator=generator),)


@cache
def random_state(arch: Architecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(s, generator=generator) for name, s in arch.shapes(arch.full_size).items()}


@cache
def initial_state(name: str, form: Form) -> dict[str, Tensor]:
    """Under seed 0; the SVDs are most of the time of these tests."""
    return architecture(name, form).initial_state(0)


def test_every_model_has_an_input_shape_here() -> None:
    assert INPUT_SHAPES.keys() == MODELS.keys()


# ---------------------------------------------------------------- parameter counts


@pytest.mark.parametrize(
    ("name", "input_shape", "form", "keep_dense", "params"),
    [
        ("lenet", (1, 28, 28), "dense", "none", 44_426),
        ("resnet18", (3, 32, 32), "dense", "none", 11_173_962),
        ("resnet18", (3, 32, 32), "lod", "none", 12_653_447),
        # Layer by layer, r·(O + I) + O: 6·31+6, 16·166+16, 120·376+120, 84·204+84, 10·94+10.
        ("lenet", (1, 28, 28), "lod", "none", 192 + 2672 + 45_240 + 17_220 + 950),
        ("lenet", (1, 28, 28), "lod", "first-conv head", (150 + 6) + 2672 + 45_240 + 17_220 + (840 + 10)),
    ],
)
def test_parameters_at_full_size(
    name: str, input_shape: tuple[int, ...], form: Form, keep_dense: str, params: int
) -> None:
    arch = Architecture(name=name, input_shape=input_shape, num_classes=10, form=form, keep_dense=keep_dense)
    assert num_elements(arch.shapes(arch.full_size)) == params


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(("name", "form"), CELLS)
@settings(max_examples=6)
@given(pair=st.tuples(FRACTIONS, FRACTIONS))
def test_sizes_form_a_chain_of_leading_blocks(name: str, form: Form, pair: tuple[Fraction, Fraction]) -> None:
    arch = architecture(name, form)
    small, large = (arch.shapes(arch.size_at(fraction)) for fraction in sorted(pair))
    full = arch.shapes(arch.full_size)
    assert small.keys() == large.keys() == full.keys()
    for tensor, shape in small.items():
        assert all(a <= b <= c for a, b, c in zip(shape, large[tensor], full[tensor], strict=True))


@pytest.mark.parametrize(
    ("name", "form", "fraction"),
    [(*cell, fraction) for cell in QUICK_CELLS for fraction in (Fraction(1, 9), Fraction(3, 7), FULL)]
    + [(name, form, Fraction(1, 9)) for name in LARGE for form in FORMS if (name, form) in CELLS],
)
def test_a_size_is_built_loaded_and_run(name: str, form: Form, fraction: Fraction) -> None:
    arch = architecture(name, form)
    size = arch.size_at(fraction)
    shapes = arch.shapes(size)
    assert shapes_of(arch.build(size)) == shapes
    model = arch.materialize(size)
    assert shapes_of(model) == shapes
    part = cut(random_state(arch), shapes)
    load(model, part)
    assert all(torch.equal(tensor, part[key]) for key, tensor in model.state_dict().items())
    logits = model(*examples(arch, 2))
    assert logits.shape == (2, *(arch.input_shape if name in WIDTHLESS else ()), 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_lod_submodel_is_the_prefix_of_the_whole_model(name: str) -> None:
    arch = architecture(name, "lod")
    size = arch.size_at(Fraction(1, 5))
    whole, part = arch.materialize(arch.full_size).eval(), arch.materialize(size).eval()
    state = random_state(arch)
    load(whole, state)
    load(part, cut(state, arch.shapes(size)))
    lod.set_ranks(whole, size.ranks)
    inputs = examples(arch, 2)
    torch.testing.assert_close(part(*inputs), whole(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_fractions_are_where_a_lod_size_changes(name: str) -> None:
    arch = architecture(name, "lod")
    fractions = arch.fractions()
    assert fractions == sorted(set(fractions))
    assert fractions[-1] == FULL
    for fraction, following in pairwise(fractions):
        assert arch.size_at(following - Fraction(1, 10**9)) == arch.size_at(fraction)


@settings(max_examples=30)
@given(fraction=FRACTIONS)
def test_ranks_are_the_floor_of_the_fraction_and_at_least_1(fraction: Fraction) -> None:
    arch = architecture("mlp", "lod", "none")
    full = lod.max_ranks(arch.full)
    assert full == {"fc1": 40, "fc2": 128, "fc3": 7}
    assert arch.size_at(fraction).ranks == {n: max(1, math.floor(fraction * R)) for n, R in full.items()}


# ---------------------------------------------------------------- initial state


def assert_same_function(name: str) -> None:
    logits = []
    for form in FORMS:
        arch = architecture(name, form)
        model = arch.materialize(arch.full_size).eval()
        load(model, initial_state(name, form))
        logits.append(model(*examples(arch, 3)).detach())
    assert float(logits[0].std()) > 1e-3
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LARGE])
def test_both_forms_start_as_the_same_function(name: str) -> None:
    assert_same_function(name)


# ---------------------------------------------------------------- keep_dense


@pytest.mark.parametrize(
    ("keep_dense", "factorised"),
    [
        ("none", ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        ("", ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        ("first-conv", ["conv2", "fc1", "fc2", "fc3"]),
        ("head", ["conv1", "conv2", "fc1", "fc2"]),
        ("first-conv head", ["conv2", "fc1", "fc2"]),
        ("fc1, conv2", ["conv1", "fc2", "fc3"]),
        ("head fc3 fc3", ["conv1", "conv2", "fc1", "fc2"]),
    ],
)
def test_keep_dense_names_layers_and_groups(keep_dense: str, factorised: list[str]) -> None:
    assert list(lod.layers(architecture("lenet", "lod", keep_dense).full)) == factorised


def test_keep_dense_takes_qualified_names() -> None:
    kept = architecture("resnet18", "lod", "block2a.shortcut.0 head").full
    assert not {"block2a.shortcut.0", "fc"} & lod.layers(kept).keys()
    assert "block3a.shortcut.0" in lod.layers(kept)


def test_an_unknown_layer_to_keep_dense_is_named_with_its_nearest_neighbour() -> None:
    with pytest.raises(UserError, match=r"model.keep-dense 'fist-conv': did you mean 'first-conv'"):
        _ = architecture("lenet", "lod", "fist-conv").full


def test_a_model_that_is_kept_dense_altogether_has_one_size() -> None:
    arch = architecture("mlp", "lod", "fc1 fc2 fc3")
    assert arch.fractions() == [FULL]
    assert arch.shapes(arch.size_at(Fraction(1, 2))) == arch.shapes(arch.full_size)


# ---------------------------------------------------------------- widths


@pytest.mark.parametrize("channels", range(1, 131))
def test_group_norm_takes_any_number_of_channels(channels: int) -> None:
    norm = group_norm(channels)
    assert shapes_of(norm) == {"weight": (channels,), "bias": (channels,)}
    images = torch.randn(3, channels, 2, 5, generator=torch.Generator().manual_seed(0))
    groups = [group.flatten(1) for group in images.split(16, 1)]
    mean = torch.stack([group.mean(1) for group in groups], 1).repeat_interleave(16, 1)[:, :channels, None, None]
    var = torch.stack([group.var(1, correction=0) for group in groups], 1).repeat_interleave(16, 1)[:, :channels]
    expected = (images - mean) / (var[:, :, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(norm(images), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=50)
@given(fraction=FRACTIONS, channels=st.integers(1, 512))
def test_scaled_channels_round_up(fraction: Fraction, channels: int) -> None:
    scaled = Scale(fraction)(channels)
    assert 1 <= scaled <= channels
    assert scaled - 1 < fraction * channels <= scaled


@pytest.mark.parametrize(("name", "least"), [("lenet", 16), ("cnn", 8), ("vgg19", 32)])
def test_images_that_are_too_small_are_refused(name: str, least: int) -> None:
    build: Callable[..., nn.Module] = MODELS[name].build
    for shape in ((1, least - 1, 40), (1, 40, least - 1)):
        with pytest.raises(UserError, match=f"model.name='{name}' needs images of at least {least}×{least}"):
            build(shape, 10, Scale())
    assert build((1, least, least), 10, Scale())(torch.zeros(1, 1, least, least)).shape == (1, 10)
