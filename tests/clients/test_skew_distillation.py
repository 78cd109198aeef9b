"""Distillation by skew: self-distillation on balanced labels, mutual distillation on those of one class."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro import extend, lod
from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Prefixes, label_skew
from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.runs.start import code_of
from fedmaestro.submodel import shapes_of

COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)
X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 3, 0, 0])


@pytest.fixture
def prefixes() -> Prefixes:
    torch.manual_seed(0)
    model = lod.factorize(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)))
    small = lod.truncate(model, {"0": 2, "2": 1}).to("meta")
    return Prefixes(model=model, smaller=[(small, shapes_of(small))], num_classes=4)


def loss_of(name: str, prefixes: Prefixes) -> Tensor:
    return OBJECTIVES[name].loss(prefixes, X, Y, np.random.default_rng(0))


@given(counts=COUNTS, times=st.integers(1, 9))
def test_skew_is_a_share_that_order_and_number_of_examples_do_not_change(counts: list[int], times: int) -> None:
    skew = label_skew(torch.tensor(counts))
    assert -1e-6 <= float(skew) <= 1 + 1e-6
    torch.testing.assert_close(label_skew(torch.tensor(sorted(counts)) * times), skew)


def test_skew_is_one_less_the_entropy_in_units_of_the_largest() -> None:
    # ¾ and ¼ of four classes: H = 2 log 2 - ¾ log 3, and log 4 = 2 log 2, so the skew is ¾ log 3 / log 4.
    assert float(label_skew(torch.tensor([3, 1, 0, 0]))) == pytest.approx(0.75 * math.log(3) / math.log(4))
    assert float(label_skew(torch.tensor([5, 5, 5, 5]))) == pytest.approx(0, abs=1e-6)
    assert float(label_skew(torch.tensor([0, 7, 0, 0]))) == 1
    assert float(label_skew(torch.tensor([7]))) == 1, "a single class"


def test_between_self_and_mutual_distillation_by_skew(prefixes: Prefixes) -> None:
    ends = [loss_of(name, prefixes) for name in ("self-distillation", "mutual-distillation")]
    for skew in (0.0, 0.3, 1.0):
        expected = (1 - skew) * ends[0] + skew * ends[1]
        loss = loss_of("skew-distillation", replace(prefixes, skew=torch.tensor(skew)))
        torch.testing.assert_close(loss, expected)
    assert not torch.allclose(*ends)


def test_the_skew_is_that_of_all_labels_of_the_device(prefixes: Prefixes) -> None:
    objective = OBJECTIVES["skew-distillation"]
    of_device = prefixes.of_device(torch.tensor([2, 2, 2, 0]), objective, 1.0)
    assert of_device.skew is not None
    torch.testing.assert_close(of_device.skew, label_skew(torch.tensor([1, 0, 3, 0])))
    assert of_device.offsets is not None
    assert prefixes.of_device(Y, OBJECTIVES["self-distillation"], 0.0) is prefixes, "nothing is read"


def environment(**settings: object) -> Environment:
    config = load_config(None, settings)
    return open_environment(config, code=code_of(config))


@pytest.mark.parametrize("name", ["skew-distillation", "masked-cross-entropy"])
def test_what_reads_classes_is_refused_where_there_are_none(name: str) -> None:
    x = np.linspace(-1, 1, 80, dtype=np.float32).reshape(20, 4)
    extend.dataset("numbers")({"x": x, "y": x @ np.ones(4, np.float32), "task": "regression"})
    settings = {"data.name": "numbers", "data.devices": 5, "data.partition": "iid", "train.devices-per-round": 2}
    with pytest.raises(UserError, match=f"train.objective='{name}' reads the classes of labels, and task 'regression'"):
        environment(**settings, **{"train.objective": name})
    assert environment(**settings).method.objective.name == "self-distillation"
