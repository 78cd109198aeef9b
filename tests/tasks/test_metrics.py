"""Metrics: what scikit-learn says of the whole test set, whatever parts it was scored in."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from fedmaestro import extend
from fedmaestro.errors import UserError
from fedmaestro.tasks.goal import CLASSIFICATION, REGRESSION, TASKS
from fedmaestro.tasks.metrics import METRICS, Metric, metrics_of, own_metric
from fedmaestro.tasks.task import Score


def scored(metric: Metric, outputs: torch.Tensor, targets: torch.Tensor, loss: float = 0.0) -> Score:
    sums = {name: x.double() for name, x in metric.update(outputs, targets).items()}
    return Score(len(targets), loss, {metric.name: sums})


def in_parts(metric: Metric, outputs: torch.Tensor, targets: torch.Tensor, ends: list[int]) -> float:
    whole: Score | None = None
    for x, y in zip(torch.tensor_split(outputs, ends), torch.tensor_split(targets, ends), strict=True):
        if len(y):
            part = scored(metric, x, y)
            whole = part if whole is None else whole + part
    assert whole is not None
    return whole.value(metric)


CUTS = st.lists(st.integers(1, 59), max_size=3).map(sorted)


@given(seed=st.integers(0, 99), classes=st.integers(2, 7), ends=CUTS)
def test_classification_is_scikit_learns(seed: int, classes: int, ends: list[int]) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(60, classes)) * 3
    labels = generator.permutation(np.arange(60) % classes)
    logits[np.arange(60), labels] += generator.exponential()
    guess, outputs, targets = logits.argmax(axis=1), torch.from_numpy(logits), torch.from_numpy(labels)
    odds = [logits[:, c] - np.logaddexp.reduce(np.delete(logits, c, axis=1), axis=1) for c in range(classes)]
    expected = {
        "accuracy": sk.accuracy_score(labels, guess),
        "balanced-accuracy": sk.balanced_accuracy_score(labels, guess),
        "macro-f1": sk.f1_score(labels, guess, average="macro", zero_division=0),
        "top-5": np.mean([y in np.argsort(x)[-5:] for x, y in zip(logits, labels, strict=True)]),
        "auc": np.mean([sk.roc_auc_score(labels == c, odds[c]) for c in range(classes)]),
    }
    for name, value in expected.items():
        # Pairs of the AUC that fall into one of 4096 bins of log-odds count half.
        tolerance = 5e-3 if name == "auc" else 1e-9
        assert in_parts(METRICS[name], outputs, targets, ends) == pytest.approx(value, abs=tolerance), name


@given(seed=st.integers(0, 99), values=st.integers(1, 3), ends=CUTS)
def test_regression_is_scikit_learns(seed: int, values: int, ends: list[int]) -> None:
    generator = np.random.default_rng(seed)
    y = generator.normal(size=(60, values)) * 5 + 100
    guess = y + generator.normal(size=y.shape)
    expected = {
        "mse": sk.mean_squared_error(y, guess),
        "rmse": math.sqrt(sk.mean_squared_error(y, guess)),
        "mae": sk.mean_absolute_error(y, guess),
        "r2": sk.r2_score(y, guess),
    }
    for name, value in expected.items():
        found = in_parts(METRICS[name], torch.from_numpy(guess), torch.from_numpy(y), ends)
        assert found == pytest.approx(value, rel=1e-6), name


def test_auc_of_sure_models_and_of_one_class() -> None:
    targets = torch.tensor([0, 1, 0, 1])
    sure = torch.tensor([[200.0, 0], [0, 300.0], [100.0, 0], [0, 500.0]])
    assert scored(METRICS["auc"], sure, targets).value(METRICS["auc"]) == 1.0
    assert scored(METRICS["auc"], -sure, targets).value(METRICS["auc"]) == 0.0
    assert scored(METRICS["auc"], torch.zeros(4, 2), targets).value(METRICS["auc"]) == 0.5
    assert math.isnan(scored(METRICS["auc"], sure, targets * 0).value(METRICS["auc"]))


def test_metrics_of_the_loss() -> None:
    score = Score(4, 8.0)
    assert score.value(METRICS["loss"]) == 2.0
    assert score.value(METRICS["perplexity"]) == pytest.approx(math.exp(2))
    assert math.isnan(Score(0, 0.0).value(METRICS["accuracy"]))
    assert math.isfinite(Score(1, 1e9).value(METRICS["perplexity"]))


def test_every_task_names_metrics_that_there_are() -> None:
    for goal in TASKS.values():
        assert metrics_of(goal)[0].name == goal.metrics[0]
    assert [metric.name for metric in metrics_of(CLASSIFICATION, "macro-f1 accuracy")] == ["macro-f1", "accuracy"]
    for names, said in (
        ("accuracy accuracy", "each metric once"),
        ("", "each metric once"),
        ("acc", "unknown data.metrics 'acc'"),
    ):
        with pytest.raises(UserError, match=said):
            metrics_of(CLASSIFICATION, names)


def test_outputs_of_one_value_may_lack_the_dimension() -> None:
    targets = torch.tensor([[1.0], [2.0]])
    flat, column = torch.tensor([1.0, 4.0]), torch.tensor([[1.0], [4.0]])
    assert REGRESSION.loss(flat, targets) == REGRESSION.loss(column, targets) == 2.0
    assert REGRESSION.counted(flat, targets)[0].shape == (2, 1)


def test_torchmetrics_whose_states_are_sums() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    kappa = own_metric("kappa", torchmetrics.CohenKappa(task="multiclass", num_classes=3), "")
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(60, 3, generator=generator), torch.arange(60) % 3
    expected = sk.cohen_kappa_score(targets, outputs.argmax(dim=1))
    assert in_parts(kappa, outputs, targets, [7, 30]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="is no sum"):
        extend.KINDS["metric"].make("auroc", torchmetrics.AUROC(task="multiclass", num_classes=3), {})
