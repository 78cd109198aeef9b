"""Extraction of models for deployment: what is written is true, and what goes wrong is told before anything is."""

import json
import tomllib
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from commands import counted_macs, tree
from torch import Tensor, nn
from torch.utils import benchmark

from fedmaestro import lod
from fedmaestro.data import load_dataset
from fedmaestro.deploy.extract import Extraction, Target, extract
from fedmaestro.errors import UserError
from fedmaestro.models.architecture import Architecture, Form, Size
from fedmaestro.runs.model import ModelCard, load_model, read_model, write_model
from fedmaestro.submodel import State
from fedmaestro.training import run, train

DENSE_PARAMS, DENSE_MACS = 26122, 25856


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = benchmark.Timer.blocked_autorange
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda timer, **_: measure(timer, min_run_time=0.002))


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two epochs on a part of the digits in both forms."""
    folder = tmp_path_factory.mktemp("trainings")
    overrides: dict[str, Any] = {
        "train.epochs": 2,
        "data.limit": 700,
        "data.validation": 30,
        "train.batch-size": 32,
        "curve.calibration": 32,
        "curve.fractions": "1 0.3",
        "curve.latency": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cost_figure", lambda *_, **__: None)
        patch.setattr(run, "rank_figure", lambda *_, **__: None)
        patch.setattr(run, "save_figure", lambda *_, **__: None)
        train(overrides={**overrides, "model.keep-dense": "head"}, out=folder / "lod")
        train(overrides={**overrides, "model.form": "dense"}, out=folder / "dense")
    return {name: folder / name for name in ("lod", "dense")}


@cache
def federated(form: Form) -> tuple[Architecture, State]:
    architecture = Architecture(name="mlp", input_shape=(1, 8, 8), num_classes=10, form=form, keep_dense="head")
    return architecture, architecture.initial_state(1)


def write_federation(folder: Path, form: Form = "lod") -> Path:
    """Write what a federation leaves: a model with sizes per tier, and the experiment's settings."""
    architecture, state = federated(form)
    digits = load_dataset("digits")
    lod_tiers = {
        "big": Size(ranks={"fc1": 64, "fc2": 128}),
        "mid": Size(ranks={"fc1": 30, "fc2": 100}),
        "low": Size(ranks={"fc1": 7, "fc2": 1}),
    }
    dense_tiers = {"big": architecture.full_size, "low": architecture.size_at(architecture.fractions()[12])}
    tiers = lod_tiers if form == "lod" else dense_tiers
    card = ModelCard(
        model="mlp",
        form=form,
        keep_dense="head",
        input_shape=[1, 8, 8],
        num_classes=10,
        mean=list(digits.mean),
        std=list(digits.std),
        size=architecture.full_size,
        tiers=tiers,
        round=4,
    )
    write_model(folder, {None: state}, card)
    settings = {"seed": 0, "data": {"name": "digits", "dir": "", "devices": 20}, "train": {"rounds": 4}}
    (folder / "config.toml").write_text(tomli_w.dumps(settings))
    return folder


def images_and_labels(card: dict[str, Any]) -> tuple[Tensor, np.ndarray]:
    """The test set as the card says that it is to be normalised."""
    digits = load_dataset("digits")
    pixels = torch.from_numpy(digits.test_images.astype(np.float32)) / 255
    return (pixels - card["mean"][0]) / card["std"][0], digits.test_labels


def described(module: nn.Module) -> str:
    return f"rank {module.v.shape[0]}" if isinstance(module, lod.LoDLayer) else "dense"


def assert_true(extraction: Extraction) -> nn.Module:
    """Check everything that the card says, and return the model."""
    card = json.loads((extraction.path / "model.json").read_text())
    assert card == extraction.card
    model = extraction.model()
    assert not model.training
    images, labels = images_and_labels(card)
    with torch.inference_mode():
        logits = model(images)
    loss = -logits.log_softmax(1)[torch.arange(len(labels)), torch.from_numpy(labels)].mean()
    assert card["test_accuracy"] == pytest.approx((logits.argmax(1).numpy() == labels).mean())
    assert card["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert card["params"] == sum(p.numel() for p in model.parameters())
    assert card["macs_per_example"] == counted_macs(model, (1, 8, 8))
    assert 0 < card["latency_ms"] < 1000
    assert card["layers"] == {name: described(model.get_submodule(name)) for name in ("fc1", "fc2", "fc3")}
    assert (card["recomposed"], card["tiers"], card["data"]) == (True, {}, "digits")
    assert (card["model"], card["input_shape"], card["num_classes"]) == ("mlp", [1, 8, 8], 10)
    assert not {"round", "epoch"} & card.keys()
    return model


def ranks_of(extraction: Extraction) -> dict[str, int]:
    ranks: dict[str, int] = extraction.card["size"]["ranks"]
    return ranks


# From a training


@pytest.mark.parametrize("form", ["lod", "dense"])
@pytest.mark.parametrize(
    "target",
    [
        Target(max_macs=DENSE_MACS),
        Target(max_macs=0.4 * DENSE_MACS),
        Target(max_macs=2200),
        Target(max_params=DENSE_PARAMS),
        Target(max_params=9000),
        Target(max_latency_ms=1e6),
    ],
    ids=Target.describe,
)
def test_within_a_budget(target: Target, form: str, trainings: dict[str, Path], tmp_path: Path) -> None:
    source = trainings[form]
    extraction = extract(source, target, out=tmp_path / "out", calibration=64, latency_batch=3)
    model, card = assert_true(extraction), extraction.card
    assert card["macs_per_example"] <= (target.max_macs or DENSE_MACS)
    assert card["params"] <= (target.max_params or DENSE_PARAMS)
    assert card["latency_ms"] <= (target.max_latency_ms or 1e6)
    assert (card["form"], card["latency_batch"]) == ("lod", 3)
    assert card["extracted_for"] == {key: value for key, value in asdict(target).items() if value is not None}
    # The same logits as the source at those ranks.
    whole = load_model(source)
    if form == "dense":
        whole = lod.factorize(whole)
    lod.set_ranks(whole, ranks_of(extraction))
    images, _ = images_and_labels(card)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), whole(images), rtol=1e-4, atol=1e-4)
    assert tomllib.loads((source / "config.toml").read_text())["model"]["keep-dense"] == card["keep_dense"]


def test_a_smaller_budget_gives_a_nested_model(trainings: dict[str, Path], tmp_path: Path) -> None:
    budgets = [20_000, 9_000, 4_000, 2_500]
    found = [
        extract(trainings["lod"], Target(max_macs=budget), out=tmp_path / str(budget), calibration=64)
        for budget in budgets
    ]
    for larger, smaller in pairwise(found):
        assert all(smaller_rank <= ranks_of(larger)[name] for name, smaller_rank in ranks_of(smaller).items())
        assert smaller.card["macs_per_example"] < larger.card["macs_per_example"]


# From a federation


@pytest.mark.parametrize("tier", ["big", "mid", "low"])
def test_a_tier(tier: str, tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    extraction = extract(source, Target(tier=tier))
    assert extraction.path == source / "extracted" / f"tier-{tier}"
    model, card = assert_true(extraction), extraction.card
    assert card["extracted_for"] == {"tier": tier}
    state, source_card = read_model(source)
    assert ranks_of(extraction) == source_card.tiers[tier].ranks
    assert (
        card["layers"]
        == {
            "big": {"fc1": "dense", "fc2": "dense", "fc3": "dense"},
            "mid": {"fc1": "rank 30", "fc2": "dense", "fc3": "dense"},
            "low": {"fc1": "rank 7", "fc2": "rank 1", "fc3": "dense"},
        }[tier]
    )
    # By hand: the leading columns of the federation's factors.
    images, _ = images_and_labels(card)
    x = images.flatten(1)
    for name, rank in ranks_of(extraction).items():
        x = x @ (state[f"{name}.u"][:, :rank] @ state[f"{name}.v"][:rank]).T + state[f"{name}.bias"]
        x = x.relu()
    expected = x @ state["fc3.weight"].T + state["fc3.bias"]
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(images), load_model(source, tier)(images), rtol=1e-4, atol=1e-4)


def test_a_tier_of_a_dense_federation_is_a_narrow_model(tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run", "dense")
    extraction = extract(source, Target(tier="low"))
    model = assert_true(extraction)
    assert extraction.card["size"] == json.loads((source / "model.json").read_text())["tiers"]["low"]
    assert (extraction.card["form"], lod.layers(model)) == ("dense", {})
    images, _ = images_and_labels(extraction.card)
    with torch.inference_mode():
        assert model(images).equal(load_model(source, "low")(images))


def test_a_layer_of_rank_zero_is_its_bias(tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    state, card = read_model(source)
    write_model(source, {None: state}, card.model_copy(update={"tiers": {"none": Size(ranks={"fc1": 9, "fc2": 0})}}))
    extraction = extract(source, Target(tier="none"))
    assert extraction.card["layers"]["fc2"] == "rank 0"
    assert extraction.card["params"] == 9 * (64 + 128) + 128 + 128 + 128 * 10 + 10
    images, _ = images_and_labels(extraction.card)
    expected = state["fc2.bias"].relu() @ state["fc3.weight"].T + state["fc3.bias"]
    with torch.inference_mode():
        torch.testing.assert_close(extraction.model()(images), expected.expand(len(images), 10))


# Export


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_extracted_model_goes_through_torch_export(tmp_path: Path) -> None:
    architecture = Architecture(name="cnn", input_shape=(3, 16, 16), num_classes=10, keep_dense="first-conv head")
    whole = architecture.with_state(architecture.initial_state(0))
    ranks = {"conv2": 20, "conv3": 64, "fc1": 9}
    lod.set_ranks(whole, ranks)
    card = ModelCard(
        model="cnn",
        form="lod",
        keep_dense="first-conv head",
        input_shape=[3, 16, 16],
        num_classes=10,
        size=Size(ranks=ranks),
        recomposed=True,
    )
    write_model(tmp_path, {None: lod.recompose(lod.truncate(whole, ranks)).state_dict()}, card)
    loaded = load_model(tmp_path)
    assert {described(loaded.get_submodule(name)) for name in ranks} >= {"dense", "rank 9"}
    images = torch.randn(4, 3, 16, 16)
    exported = torch.export.export(loaded, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.inference_mode():
        for inputs in (images, torch.randn(9, 3, 16, 16)):
            torch.testing.assert_close(again(inputs), loaded(inputs))
            torch.testing.assert_close(again(inputs), whole(inputs), rtol=1e-3, atol=1e-3)


# Mistakes


def refused(said: list[str], run_dir: Path, target: Target, **options: Any) -> str:
    """Check that extraction names what is wrong in one line, and writes nothing in or beside the run."""
    options.setdefault("out", run_dir.parent / "not" / "written")
    before = tree(run_dir.parent)
    with pytest.raises(UserError) as error:
        extract(run_dir, target, calibration=32, **options)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in said if part not in message] == [], message
    assert tree(run_dir.parent) == before
    return message


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(), ["exactly one", "--tier", "--max-macs", "--max-params", "--max-latency-ms", "none"]),
        (Target(tier="low", max_macs=1e6), ["exactly one", "got --tier, --max-macs"]),
        (Target(max_params=1e6, max_macs=1e6), ["exactly one", "got --max-macs, --max-params"]),
        (Target(max_macs=-5), ["--max-macs -5", "positive"]),
        (Target(max_params=0), ["--max-params 0", "positive"]),
        (Target(max_latency_ms=float("nan")), ["--max-latency-ms nan", "positive"]),
        (Target(max_macs=float("inf")), ["--max-macs inf", "positive"]),
        (Target(max_macs=100), ["100 MACs", "smallest"]),
        (Target(max_params=200), ["200 parameters", "smallest"]),
        (Target(max_latency_ms=1e-6), ["1e-06 ms", "smallest", "this machine"]),
        (Target(tier="lwo"), ["tier 'lwo'", "did you mean 'low'?", "big"]),
        (Target(tier=""), ["tier ''", "big"]),
    ],
    ids=str,
)
def test_targets_that_cannot_be(target: Target, said: list[str], tmp_path: Path) -> None:
    refused(said, write_federation(tmp_path / "run"), target)


def test_the_smallest_need_is_a_budget_that_works(tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    for kind in ("max_macs", "max_params"):
        message = refused(["rank 1 everywhere"], source, Target(**{kind: 10}))
        least = int(message.rsplit(" ", 1)[1].replace(",", ""))
        refused([f"{least - 1:,}"], source, Target(**{kind: least - 1}))
        extraction = extract(source, Target(**{kind: least}), calibration=32)
        assert ranks_of(extraction) == {"fc1": 1, "fc2": 1}


def test_a_taken_folder(tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    extract(source, Target(tier="low"))
    refused(["tier-low", "already holds a model", "--out"], source, Target(tier="low"), out=None)
    refused(["already holds a model"], source, Target(tier="low"), out=source)
    (tmp_path / "file").write_text("mine")
    refused([str(tmp_path / "file")], source, Target(tier="low"), out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        refused([str(folder), "model.json"], folder, Target(max_macs=1e6))


def test_an_extraction_is_no_run(tmp_path: Path) -> None:
    extraction = extract(write_federation(tmp_path / "run"), Target(tier="low"))
    refused(["config.toml", "folder of a run"], extraction.path, Target(max_macs=1e6))


CARDS: dict[str, Any] = {
    "not JSON": "{",
    "a list": "[]",
    "no form": {"form": None},
    "no size": {"size": None},
    "another model": {"model": "cnn"},
    "other shape": {"input_shape": [1, 8, 9]},
    "unknown layer in the size": {"size": {"ranks": {"fc9": 3}}},
    "too large a size": {"size": {"ranks": {"fc1": 65, "fc2": 128}}},
    "an empty size": {"size": {}},
}


@pytest.mark.parametrize("case", CARDS)
def test_damaged_cards(case: str, tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    change = CARDS[case]
    file = source / "model.json"
    if isinstance(change, dict):
        merged = json.loads(file.read_text()) | change
        change = json.dumps({key: value for key, value in merged.items() if value is not None})
    file.write_text(change)
    # A tier is cut from the whole model: only a budget reads the whole model's size.
    target = Target(tier="low") if case == "a list" else Target(max_macs=6000)
    refused([], source, target)


@pytest.mark.parametrize(
    "content",
    [None, "[data", "seed = 0\n", 'seed = "x"\n[data]\nname = "digits"\ndir = ""\n', "data = 5\nseed = 1\n"],
)
def test_damaged_settings_of_the_run(content: str | None, tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    (source / "config.toml").unlink()
    if content is not None:
        (source / "config.toml").write_text(content)
    refused([str(source), "config.toml"], source, Target(tier="low"))


def test_missing_data(tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    settings = {"seed": 0, "data": {"name": "mnist", "dir": str(tmp_path / "gone")}}
    (source / "config.toml").write_text(tomli_w.dumps(settings))
    refused([str(tmp_path / "gone")], source, Target(tier="low"))
    refused([str(tmp_path / "elsewhere")], source, Target(tier="low"), data_dir=tmp_path / "elsewhere")
    settings["data"] = {"name": "mnits", "dir": ""}
    (source / "config.toml").write_text(tomli_w.dumps(settings))
    refused(["'mnits'", "did you mean 'mnist'?"], source, Target(tier="low"))


def test_data_of_another_shape(tmp_path: Path) -> None:
    source = write_federation(tmp_path / "run")
    architecture = Architecture(name="mlp", input_shape=(3, 8, 8), num_classes=10, keep_dense="head")
    card = read_model(source)[1].model_copy(update={"input_shape": [3, 8, 8]})
    write_model(source, {None: architecture.initial_state(0)}, card)
    refused(["(1, 8, 8)", "(3, 8, 8)"], source, Target(tier="low"))
