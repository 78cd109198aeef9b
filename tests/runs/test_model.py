"""Model artefacts as modules: what was written comes back, whole, as a tier, shrunken or recomposed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.models.architecture import Architecture, Form, Size
from fedmaestro.runs.model import ModelCard, filled, load_model, read_model, write_model
from fedmaestro.submodel import State

SHAPES = {"mlp": (1, 4, 5), "lenet": (1, 16, 16), "cnn": (3, 8, 8)}


def architecture(name: str = "mlp", form: Form = "lod", keep_dense: str = "head") -> Architecture:
    return Architecture(name=name, input_shape=SHAPES[name], num_classes=7, form=form, keep_dense=keep_dense)


def card_of(source: Architecture, size: Size, **more: Any) -> ModelCard:
    return ModelCard(
        model=source.name,
        form=source.form,
        keep_dense=source.keep_dense,
        input_shape=list(source.input_shape),
        num_classes=source.num_classes,
        size=size,
        **more,
    )


def write(folder: Path, state: State, card: ModelCard) -> str:
    return write_model(folder, {None: state}, card)


def outputs(model: nn.Module, source: Architecture) -> Tensor:
    images = torch.randn(5, *source.input_shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        result: Tensor = model.eval()(images)
    return result


@pytest.mark.parametrize("form", ["lod", "dense"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_whole_model_comes_back(name: str, form: Form, tmp_path: Path) -> None:
    source = architecture(name, form)
    state = source.initial_state(0)
    write(tmp_path, state, card_of(source, source.full_size))
    model = load_model(str(tmp_path))
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[key]) for key, tensor in model.state_dict().items())
    assert outputs(model, source).equal(outputs(source.with_state(state), source))


@given(ranks=st.fixed_dictionaries({"fc1": st.integers(0, 20), "fc2": st.integers(0, 128)}), recomposed=st.booleans())
@settings(max_examples=20)
def test_a_smaller_model_comes_back_as_factors_or_recomposed(
    ranks: dict[str, int], recomposed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, folder = architecture(), tmp_path_factory.mktemp("model")
    small = lod.truncate(source.with_state(source.initial_state(0)), ranks)
    model = lod.recompose(small) if recomposed else small
    more = {"recomposed": True} if recomposed else {}
    write(folder, model.state_dict(), card_of(source, Size(ranks=ranks), **more))
    loaded = load_model(folder)
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert outputs(loaded, source).equal(outputs(model, source))


def test_recomposed_models_are_dense_where_that_is_smaller(tmp_path: Path) -> None:
    source = architecture(keep_dense="none")
    ranks = {"fc1": 17, "fc2": 64, "fc3": 6}  # break-even at 17.3, 64 and 6.6
    model = lod.recompose(lod.truncate(source.with_state(source.initial_state(0)), ranks))
    write(tmp_path, model.state_dict(), card_of(source, Size(ranks=ranks), recomposed=True))
    loaded = load_model(tmp_path)
    assert lod.max_ranks(loaded) == {"fc1": 17, "fc3": 6}
    assert type(loaded.get_submodule("fc2")) is nn.Linear


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("form", ["lod", "dense"])
def test_a_tier_is_the_leading_block(name: str, form: Form, tmp_path: Path) -> None:
    source = architecture(name, form)
    state = source.initial_state(0)
    tiers = {str(i): source.size_at(fraction) for i, fraction in enumerate(source.fractions()[10:60:20])}
    card = card_of(source, source.full_size, tiers=tiers)
    write(tmp_path, state, card)
    for tier, size in tiers.items():
        model = load_model(tmp_path, tier)
        shapes = source.shapes(size)
        assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == shapes
        for key, tensor in model.state_dict().items():
            assert tensor.equal(state[key][tuple(slice(n) for n in shapes[key])])


def test_a_loaded_model_is_a_copy_of_its_own(tmp_path: Path) -> None:
    source = architecture()
    write(tmp_path, source.initial_state(0), card_of(source, source.full_size))
    first, second = load_model(tmp_path), load_model(tmp_path)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in second.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())


# Mistakes


@pytest.fixture
def written(tmp_path: Path) -> Path:
    source = architecture()
    low = Size(ranks={"fc1": 2, "fc2": 3})
    write(tmp_path, source.initial_state(0), card_of(source, source.full_size, tiers={"low": low}))
    return tmp_path


def expect_error(folder: Path, *said: str, tier: str | None = None) -> None:
    with pytest.raises(UserError) as error:
        load_model(folder, tier)
    assert [part for part in said if part not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)


def change(folder: Path, **values: Any) -> None:
    card = json.loads((folder / "model.json").read_text()) | values
    (folder / "model.json").write_text(json.dumps({k: v for k, v in card.items() if v is not ...}, default=str))


def test_an_unknown_tier(written: Path) -> None:
    expect_error(written, "tier 'lwo'", "did you mean 'low'?", tier="lwo")


def test_a_model_without_tiers_has_none(written: Path) -> None:
    change(written, tiers={})
    expect_error(written, "has no tiers", tier="low")


@pytest.mark.parametrize("card", [[], 7, None, "mlp"], ids=str)
def test_a_card_of_another_form(card: Any, written: Path) -> None:
    (written / "model.json").write_text(json.dumps(card))
    expect_error(written, "expected a JSON object", str(written))


@pytest.mark.parametrize(
    "values",
    [
        {"num_classes": 8},
        {"input_shape": [1, 4, 6]},
        {"form": "dense"},
        {"keep_dense": "none"},
        {"model": "cnn", "input_shape": [1, 8, 8], "size": {"ranks": {}}},
        {"size": {"ranks": {"fc1": 5, "fc2": 128}}},
        {"recomposed": True},
    ],
    ids=str,
)
def test_tensors_of_another_model(values: dict[str, Any], written: Path) -> None:
    change(written, **values)
    expect_error(written, "does not belong to its model.json", str(written))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": {"ranks": {"fc1": 21, "fc2": 9}}}, ["'fc1'", "20", "21"]),
        ({"size": {"width": "1/0"}}, ["no usable size", "ZeroDivisionError"]),
        ({"size": {"ranks": ["fc1"]}}, ["no usable size"]),
        ({"size": 4}, ["no usable size"]),
        ({"format": 9}, ["format 9 is not one that this version reads"]),
        ({"size": {"ranks": {"fc7": 2}}}, ["'fc7'"]),
        ({"keep_dense": "fc7"}, ["'fc7'"]),
        ({"input_shape": [4, 6]}, ["does not belong to its model.json"]),
    ],
    ids=str,
)
def test_values_that_cannot_be(values: dict[str, Any], said: list[str], written: Path) -> None:
    change(written, **values)
    expect_error(written, *said)


def test_a_tier_whose_tensors_are_missing(written: Path) -> None:
    source = architecture()
    with torch.device("meta"):
        small = source.build(Size(ranks={"fc1": 2, "fc2": 3}))
    state = source.initial_state(0)
    del state["fc2.v"]
    with pytest.raises(UserError, match=r"does not belong.*fc2\.v"):
        filled(small, state, written, cut_to_size=True)


def test_the_hash_is_that_of_the_tensors(tmp_path: Path) -> None:
    source = architecture()
    state, card = source.initial_state(0), card_of(source, source.full_size)
    digest = write(tmp_path / "a", state, card)
    assert digest == hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    again = card_of(source, source.full_size, note="another card")
    assert write(tmp_path / "b", dict(reversed(state.items())), again) == digest
    assert read_model(tmp_path / "b")[1].model_extra == {"note": "another card"}
    assert write(tmp_path / "c", {**state, "fc3.bias": torch.ones(7)}, card) != digest


def test_separate_models_lie_side_by_side_whatever_their_names(tmp_path: Path) -> None:
    source = architecture()
    owners = ("a", "a/b", "a%2Fb")
    models = {owner: source.initial_state(seed) for seed, owner in enumerate(owners)}
    sizes = dict.fromkeys(owners, source.full_size)
    write_model(tmp_path, models, card_of(source, source.full_size, tiers=sizes, separate={x: x for x in owners}))
    for owner, state in models.items():
        loaded = load_model(tmp_path, owner).state_dict()
        assert loaded.keys() == state.keys()
        assert all(tensor.equal(state[name]) for name, tensor in loaded.items())
