"""The accuracy–cost curve: every figure is that of a real model, budgets hold, models are nested."""

import math
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from commands import counted_macs
from torch import nn
from torch.utils import benchmark

from fedmaestro import lod
from fedmaestro.config.base import read
from fedmaestro.config.training import Curve, TrainingConfig
from fedmaestro.deploy.curve import accuracy_cost_curve, budget_fractions, lod_form
from fedmaestro.errors import UserError
from fedmaestro.models.architecture import Architecture
from fedmaestro.submodel import State
from fedmaestro.tasks.opening import open_task
from fedmaestro.tasks.task import Task, evaluate
from fedmaestro.training.trainer import Trainer

FRACTIONS = [1.0, 0.6, 0.3, 0.15, 0.08]
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"model.name": "mlp"},
    "mlp with a dense head": {"model.name": "mlp", "model.keep-dense": "head"},
    "cnn": {"model.name": "cnn", "model.keep-dense": "first-conv head", "data.limit": 200},
    "shrunken mlp": {"model.name": "mlp", "train.shrink-threshold": 2.0},
    "dense mlp": {"model.name": "mlp", "model.form": "dense"},
    "dense cnn": {"model.name": "cnn", "model.form": "dense", "data.limit": 200},
}
Setting = tuple[TrainingConfig, Task, Architecture, nn.Module, dict[str, Any]]


@cache
def setting(case: str) -> Setting:
    """A model that was trained for an epoch, and its curve."""
    flat = {
        "curve.fractions": " ".join(map(str, FRACTIONS)),
        "curve.calibration": 48,
        "curve.latency": False,
        **CASES[case],
    }
    config = read(TrainingConfig, None, flat)
    task = open_task(config)
    architecture = Architecture(
        name=config.model.name,
        input_shape=task.input_shape,
        num_classes=task.num_classes,
        form=config.model.form,
        keep_dense=config.model.keep_dense,
    )
    trainer = Trainer(config, task, architecture)
    for batch in task.epoch(0, 0, config.train.batch_size):
        trainer.train_step(batch)
    trainer.end_epoch()
    model = trainer.model
    return config, task, architecture, model, curve_of(config, task, architecture, model)


def curve_of(*arguments: Any) -> dict[str, Any]:
    """The curve as ``curve.json`` holds it."""
    return accuracy_cost_curve(*arguments).to_dict()


def all_points(curve: dict[str, Any]) -> list[dict[str, Any]]:
    return [point for points in curve["series"].values() for point in points]


def deployed(case: str, point: dict[str, Any]) -> nn.Module:
    _, _, architecture, model, _ = setting(case)
    return lod.recompose(lod.truncate(lod_form(architecture, model), point["ranks"])).eval()


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_that_of_the_real_model(case: str) -> None:
    config, task, _, _, curve = setting(case)
    test_set = list(task.split("test"))
    seen: dict[str, tuple[int, int, float, float, float]] = {}
    for point in all_points(curve):
        if (key := str(point["ranks"])) not in seen:
            model = deployed(case, point)
            params, macs = sum(p.numel() for p in model.parameters()), counted_macs(model, task.input_shape)
            result = evaluate(model, task, test_set)
            calibrated = evaluate(model, task, task.calibration(config.seed, 48))
            seen[key] = (params, macs, result.accuracy, result.loss, calibrated.loss)
        params, macs, accuracy, loss, calibration_loss = seen[key]
        assert (point["params"], point["macs"], point["value"]) == (params, macs, accuracy)
        assert point["loss"] == pytest.approx(loss, rel=1e-5)
        assert point["calibration_loss"] == pytest.approx(calibration_loss, rel=1e-4)
        assert point["latency_ms"] is None
    assert len(seen) > 4


@pytest.mark.parametrize("case", CASES)
def test_budgets_hold_and_the_smallest_model_comes_last(case: str) -> None:
    *_, curve = setting(case)
    for points in curve["series"].values():
        budgets = [point["budget"] for point in points]
        assert budgets == sorted(budgets, reverse=True)
        assert all(point["macs"] <= point["budget"] * curve["dense_macs"] for point in points)
        smallest = points[-1]
        assert smallest["macs"] == min(point["macs"] for point in points)
        assert budgets[:-1] == [f for f in FRACTIONS if f * curve["dense_macs"] >= smallest["macs"]]
        assert smallest["budget"] == smallest["macs"] / curve["dense_macs"]
    assert set(points_named(curve, "searched")[-1]["ranks"].values()) <= {0, 1}


def points_named(curve: dict[str, Any], how: str) -> list[dict[str, Any]]:
    (points,) = (points for name, points in curve["series"].items() if f"{how} ranks" in name)
    assert isinstance(points, list)
    return points


@pytest.mark.parametrize("case", CASES)
def test_the_first_model_is_the_trained_one(case: str) -> None:
    _, task, architecture, model, curve = setting(case)
    own = evaluate(model, task, task.split("test"))
    for points in curve["series"].values():
        assert points[0]["ranks"] == lod.max_ranks(lod_form(architecture, model))
        # For a dense model this is its SVD at full rank.
        assert points[0]["value"] == own.accuracy
        assert points[0]["loss"] == pytest.approx(own.loss, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_dense_model_is_the_measure(case: str) -> None:
    config, task, architecture, model, curve = setting(case)
    plain = Architecture(
        name=architecture.name, input_shape=task.input_shape, num_classes=task.num_classes, form="dense"
    )
    dense = plain.with_state(plain.initial_state(0))
    assert curve["dense_params"] == sum(p.numel() for p in dense.parameters())
    assert curve["dense_macs"] == counted_macs(dense, task.input_shape)
    if config.model.form == "lod":
        assert curve["dense"] is None
    else:
        result = evaluate(model, task, task.split("test"))
        dense = curve["dense"]
        assert (dense["params"], dense["macs"]) == (curve["dense_params"], curve["dense_macs"])
        assert (dense["value"], dense["loss"], dense["latency_ms"]) == (result.accuracy, result.loss, None)


@pytest.mark.parametrize("case", ["mlp", "cnn", "shrunken mlp", "dense mlp"])
def test_uniform_ranks_are_one_fraction_of_the_models_own(case: str) -> None:
    """Each is the largest of the 40 fractions that fits, and no layer falls below rank 1."""
    _, _, architecture, model, curve = setting(case)
    full = lod.max_ranks(lod_form(architecture, model))

    def at(step: int) -> dict[str, int]:
        return {name: max(min(1, top), math.floor(Fraction(step, 40) * top)) for name, top in full.items()}

    def macs_at(step: int) -> int:
        return counted_macs(deployed(case, {"ranks": at(step)}), architecture.input_shape)

    points = points_named(curve, "uniform")
    for point in points[:-1]:
        step = max(step for step in range(1, 41) if at(step) == point["ranks"])
        assert step == 40 or macs_at(step + 1) > point["budget"] * curve["dense_macs"]
    assert points[-1]["ranks"] == at(1)


def test_the_model_stays_as_it_is() -> None:
    config, task, architecture, model, curve = setting("shrunken mlp")
    before: State = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    notes: list[str] = []
    again = curve_of(config, task, architecture, model, notes.append)
    assert again == curve
    assert before.keys() == model.state_dict().keys()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.rank == layer.max_rank for layer in lod.layers(model).values())
    assert any("searched ranks on 48 training examples" in note for note in notes)


def test_latency_is_measured_of_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = benchmark.Timer.blocked_autorange
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda timer, **_: measure(timer, min_run_time=0.002))
    config, task, architecture, model, _ = setting("dense mlp")
    settings = config.curve.model_copy(update={"latency": True, "latency_batch": 3, "fractions": "1 0.2"})
    config = config.model_copy(update={"curve": settings})
    curve = curve_of(config, task, architecture, model)
    assert curve["device"] == "cpu, 1 thread, batch 3"
    for point in [*all_points(curve), curve["dense"]]:
        assert 0 < point["latency_ms"] < 1000


# curve.fractions


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1 0.5", [1.0, 0.5]), ("0.25, 1,.5", [1.0, 0.5, 0.25]), (" 1e-3 ", [0.001]), ("0.5 0.5 0.50", [0.5])],
)
def test_fractions(text: str, expected: list[float]) -> None:
    assert budget_fractions(Curve(fractions=text)) == expected


@pytest.mark.parametrize("text", ["", ",", "0", "1 -0.5", "1.01", "nan", "inf", "half", "1/2", "50%"])
def test_fractions_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"curve\.fractions") as error:
        budget_fractions(Curve(fractions=text))
    assert repr(text) in str(error.value)
