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
from fedmaestro.models import MODELS, example_inputs
from fedmaestro.models.architecture import FULL, Architecture, Form, dense_layers
from fedmaestro.models.width import Scale, group_norm
from fedmaestro.submodel import cut, load, num_elements, shapes_of

INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (2, 5, 4),
    "lenet": (2, 17, 16),
    "cnn": (2, 9, 8),
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


@pytest.mark.parametrize(("name", "form"), CELLS)
def test_full_and_built_models_hold_no_memory(name: str, form: Form) -> None:
    arch = Architecture(name=name, input_shape=INPUT_SHAPES[name], num_classes=7, form=form)
    for model in (arch.full, arch.build(arch.size_at(Fraction(1, 2)))):
        assert {p.device.type for p in model.parameters()} == {"meta"}


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


def test_every_width_of_a_dense_model_is_among_the_fractions() -> None:
    arch = architecture("lenet", "dense")
    shapes = [arch.shapes(arch.size_at(fraction)) for fraction in arch.fractions()]
    for numerator in range(1, 1000, 7):
        assert arch.shapes(arch.size_at(Fraction(numerator, 1000))) in shapes


@settings(max_examples=30)
@given(fraction=FRACTIONS)
def test_ranks_are_the_floor_of_the_fraction_and_at_least_1(fraction: Fraction) -> None:
    arch = architecture("mlp", "lod", "none")
    full = lod.max_ranks(arch.full)
    assert full == {"fc1": 40, "fc2": 128, "fc3": 7}
    assert arch.size_at(fraction).ranks == {n: max(1, math.floor(fraction * R)) for n, R in full.items()}


@pytest.mark.parametrize(("side", "R"), [(5, 25), (7, 49)])
def test_fractions_are_exact(side: int, R: int) -> None:  # noqa: N803
    """In floating point, ``49 · (1 / 49)`` is below 1 and ``25 · (7 / 25)`` above 7."""
    arch = Architecture(name="mlp", input_shape=(1, side, side), num_classes=3)
    assert arch.full_size.ranks["fc1"] == R
    for j in range(2, R + 1):
        assert arch.size_at(Fraction(j, R)).ranks["fc1"] == j
        assert arch.size_at(Fraction(j, R) - Fraction(1, 10**20)).ranks["fc1"] == j - 1


def test_sizes_describe_themselves() -> None:
    assert architecture("mlp", "lod").size_at(Fraction(1, 2)).describe() == {"fc1": 20, "fc2": 64}
    assert architecture("mlp", "dense").size_at(Fraction(1, 3)).describe() == {"width": 0.3333}


# ---------------------------------------------------------------- initial state


@pytest.mark.parametrize(("name", "form"), QUICK_CELLS)
def test_the_initial_state_depends_on_the_seed_only(name: str, form: Form) -> None:
    arch = architecture(name, form)
    torch.manual_seed(99)
    first = arch.initial_state(0)
    torch.manual_seed(1)
    second, other = initial_state(name, form), arch.initial_state(6)
    assert shapes_of(first) == arch.shapes(arch.full_size)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key])
        assert not tensor.requires_grad
        if key.endswith(("weight", ".u", ".v")) and tensor.dim() > 1:
            assert not torch.equal(tensor, other[key])


def test_the_initial_state_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    architecture("mlp", "lod").initial_state(5)
    assert torch.equal(torch.random.get_rng_state(), before)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_both_forms_of_a_large_model_start_as_the_same_function(name: str) -> None:
    assert_same_function(name)


@pytest.mark.parametrize(("name", "form"), QUICK_CELLS)
def test_cuts_of_the_initial_state_load(name: str, form: Form) -> None:
    arch = architecture(name, form)
    state = initial_state(name, form)
    for fraction in (Fraction(1, 16), Fraction(1, 2), FULL):
        size = arch.size_at(fraction)
        model = arch.materialize(size)
        load(model, cut(state, arch.shapes(size)))
        assert torch.isfinite(model(*example_inputs(arch.input_shape, 1))).all()


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


def test_keep_dense_without_convolutions_or_linear_layers_is_empty() -> None:
    assert dense_layers(nn.ReLU(), "first-conv head none") == []


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


@pytest.mark.parametrize("channels", [1, 7, 16, 17, 25, 38, 48, 63, 64])
def test_complete_groups_of_a_narrow_model_are_those_of_the_full_one(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    full, narrow = group_norm(64), group_norm(channels)
    state = {name: torch.randn(64, generator=generator) for name in ("weight", "bias")}
    load(full, state)
    load(narrow, cut(state, shapes_of(narrow)))
    images = torch.randn(2, 64, 3, 5, generator=generator)
    complete = channels // 16 * 16
    torch.testing.assert_close(narrow(images[:, :channels])[:, :complete], full(images)[:, :complete])


def test_one_channel_in_the_last_group_may_have_one_position() -> None:
    assert not group_norm(17)(torch.ones(1, 17, 1, 1)).any()


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_narrow_state_is_the_leading_block_by_name(name: str) -> None:
    arch = architecture(name, "dense")
    size = arch.size_at(Fraction(2, 5))  # 32 · 2/5 → 13, 64 · 2/5 → 26: incomplete groups
    state, model = random_state(arch), arch.materialize(size)
    load(model, cut(state, arch.shapes(size)))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key][tuple(slice(n) for n in tensor.shape)])


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
