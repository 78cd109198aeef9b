"""Maestro on one machine with a model, data and a task of the user's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmaestro
from fedmaestro.errors import UserError


class Net(nn.Module):
    """A perceptron with BatchNorm."""

    def __init__(self, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(shape[0], 24), nn.BatchNorm1d(24), nn.Linear(24, 24)
        self.head = nn.Linear(24, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.two(self.norm(self.one(x)).relu()).relu())
        return out


def plane() -> dict[str, Any]:
    """A noisy linear function of six numbers."""
    r = np.random.default_rng(0)
    x = r.normal(size=(500, 6))
    return {"x": x, "y": x @ np.arange(6.0) / 5 + 0.1 * r.normal(size=500)}


def test_a_regression_is_trained_resumed_extracted_and_loaded(tmp_path: Path) -> None:
    overrides = {"train.epochs": 6, "train.lr": 0.05, "curve.latency": False, "train.sampling": "independent"}
    done = fedmaestro.train(model=Net, data=plane, overrides=overrides, out=tmp_path / "t")
    assert done.summary["metric"] == "rmse"
    assert done.summary["best_value"] <= done.summary["final_value"] < 0.5, "the targets' spread is 1.5"
    assert done.curve["facts"]["higher_is_better"] is False
    again = fedmaestro.train(out=tmp_path / "t", resume=True)
    assert again.summary["model_sha256"] == done.summary["model_sha256"]
    model = fedmaestro.load_model(tmp_path / "t")
    one, many = torch.ones(1, 6), torch.cat([torch.ones(1, 6), 5 * torch.randn(9, 6)])
    torch.testing.assert_close(model(one)[0], model(many)[0], msg="the statistics are in the artefact")
    from fedmaestro.deploy.extract import Target

    card = fedmaestro.extract(tmp_path / "t", Target(max_macs=500)).card
    assert card["test_rmse"] > 0
    with pytest.raises(UserError, match=r"dataset plane has changed|other code|own data"):
        fedmaestro.train(model=Net, data={"x": np.eye(6), "y": np.ones(6)}, out=tmp_path / "t", resume=True)


def test_label_smoothing_is_for_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.label-smoothing=0\.1: task 'regression' has no classes"):
        fedmaestro.train(model=Net, data=plane, overrides={"train.label-smoothing": 0.1}, out=tmp_path / "t")
