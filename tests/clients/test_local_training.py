"""Local optimisers, schedules, FedProx and SCAFFOLD: by their formulas."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Prefixes
from fedmaestro.clients.optimizers import OPTIMIZERS, SCHEDULES, Decay, decay_of
from fedmaestro.clients.scaffold import Control
from fedmaestro.config.experiment import load_config
from fedmaestro.data.own import convert
from fedmaestro.errors import UserError
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.server import start as start_of
from fedmaestro.rounds.server import with_controls
from fedmaestro.rounds.training import Draws, LocalTraining, local_training, train_device
from fedmaestro.tasks.augment import augmented
from fedmaestro.tasks.own import own_task

Federate = Callable[..., Any]
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def trained(settings: LocalTraining, **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    start = {name: x.clone() for name, x in model.state_dict().items()}
    prefixes = Prefixes(model=model, num_classes=3)
    train_device(prefixes, start, OBJECTIVES["own-prefix"], batch(X, Y), settings, Draws(0, ()), **more)
    return start, {name: x.clone() for name, x in model.state_dict().items()}


def settings(**more: Any) -> LocalTraining:
    return LocalTraining(**{"epochs": 1, "batch_size": 12, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, **more})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimiser_is_pytorchs(name: str) -> None:
    start, after = trained(settings(optimizer=OPTIMIZERS[name], lr=0.01, weight_decay=0.1, epochs=3))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict(start)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    order = np.random.default_rng(0)
    for _ in range(3):
        rows = torch.from_numpy(order.permutation(12))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(after[key], tensor)
    slots = sum(x.numel() > 1 for x in optimizer.state[model[0].weight].values())
    assert OPTIMIZERS[name].slots(0.0) == slots, "what the memory budgets count"


@pytest.mark.parametrize("name", SCHEDULES)
@given(rounds=st.integers(2, 50), final=st.floats(0.01, 1.0))
def test_schedules_start_at_one_and_never_rise(name: str, rounds: int, final: float) -> None:
    factors = [SCHEDULES[name].factor(i, rounds, Decay(final=final)) for i in range(1, rounds + 1)]
    assert factors[0] == pytest.approx(1.0)
    assert all(b <= a + 1e-12 for a, b in pairwise(factors))
    if name in ("cosine", "exponential"):
        assert factors[-1] == pytest.approx(final)


def test_steps_are_pytorchs_multi_step_rate() -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 7], gamma=0.5)
    decay = decay_of("steps", 10, 0.05, "7 3", 0.5)
    for server_round in range(1, 11):
        assert SCHEDULES["steps"].factor(server_round, 10, decay) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("schedule", "milestones", "message"),
    [
        ("cosine", "5", "train.lr-milestones='5' has no effect: train.schedule is 'cosine': use steps"),
        ("steps", "5 10", "write rounds from 1 to 9"),
        ("steps", "0", "write rounds from 1 to 9"),
        ("steps", "half", "write rounds from 1 to 9"),
    ],
)
def test_milestones_that_cannot_be_are_refused(schedule: str, milestones: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        decay_of(schedule, 10, 0.05, milestones, 0.1)


def test_warm_up_grows_to_the_schedule() -> None:
    env = open_environment(load_config(None, {"train.warmup-rounds": 3, "train.schedule": "constant", "train.lr": 0.4}))
    assert [round(local_training(env, i).lr, 6) for i in range(1, 6)] == [0.1, 0.2, 0.3, 0.4, 0.4]


def test_the_proximal_terms_gradient_pulls_back_to_the_start() -> None:
    """Two full-batch steps: the second one has the gradient of the loss plus μ (w - w₀)."""
    mu = 3.0
    start, one = trained(settings())
    _, plain = trained(settings(epochs=2))
    _, held = trained(settings(epochs=2, proximal=mu))
    for name in start:
        # Full batches in another order differ by rounding only, so both second steps have the same loss gradient.
        torch.testing.assert_close(plain[name] - held[name], 0.1 * mu * (one[name] - start[name]), atol=1e-5, rtol=1e-4)
    far = sum(float((plain[n] - start[n]).square().sum()) for n in start)
    near = sum(float((held[n] - start[n]).square().sum()) for n in start)
    assert near < far


def test_control_variates_shift_every_step_and_estimate_the_gradient() -> None:
    start, plain = trained(settings())
    server = {name: torch.full_like(x, 0.5) for name, x in start.items()}
    own = {name: torch.full_like(x, 0.2) for name, x in start.items()}
    control = Control(server=server, own=own)
    _, moved = trained(settings(), control=control)
    for name in start:
        torch.testing.assert_close(moved[name], plain[name] - 0.1 * (0.5 - 0.2))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict(moved)
    new = control.after(start, model, steps=1, lr=0.1)
    for name in start:
        # Option II after one step is the plain gradient at the start: c_i - c + (g - c_i + c).
        torch.testing.assert_close(new[name], (start[name] - plain[name]) / 0.1, atol=1e-5, rtol=1e-4)


def test_the_servers_control_variate_is_the_mean_over_holders() -> None:
    env = open_environment(load_config(None, {"train.strategy": "scaffold"}))
    server = start_of(env)
    new = {}
    for device in range(20):
        trains = env.tier(device).trains
        assert trains is not None
        new[device] = {name: torch.full(shape, 1.0) for name, shape in trains.shapes.items()}
    once = with_controls(env, server, new)
    for name, tensor in once.control.items():
        torch.testing.assert_close(tensor, torch.ones_like(tensor), msg=name)
    again = with_controls(env, once, new)
    for name, tensor in again.control.items():
        torch.testing.assert_close(tensor, torch.ones_like(tensor), msg="what has not changed moves nothing: " + name)
    one = with_controls(env, server, {0: new[0]})
    holders = env.devices_of[int(env.tier_of[0])]
    bias = one.control["fc3.bias"]
    torch.testing.assert_close(bias, torch.full_like(bias, 1 / 20), msg=f"all 20 hold it, not only {holders}")


@pytest.mark.parametrize("strategy", ["scaffold", "fedprox"])
def test_rows_train_resume_and_do_not_depend_on_hosts(strategy: str, federate: Federate) -> None:
    overrides = {"train.strategy": strategy, "train.rounds": 4, "train.evaluate-every": 2}
    one, _, _ = federate(overrides, nodes=1)
    many, folder, _ = federate(overrides, nodes=4)
    assert one["model_sha256"] == many["model_sha256"]
    lines = folder.rounds.read_text()
    again, _, _ = federate(overrides, folder=folder.path)
    assert again["model_sha256"] == many["model_sha256"]
    assert folder.rounds.read_text() == lines
    assert one["failed"] == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train.momentum": 0.9}, "train.optimizer=sgd without momentum"),
        ({"train.optimizer": "adam"}, "train.optimizer=sgd without momentum"),
        ({"train.submodel": "separate"}, "one model whose tensors stay in place"),
        ({"server.reorder-every": 2}, "factors that keep their basis"),
        ({"train.aggregation": "product-svd"}, "factors that keep their basis"),
        ({"ranks.rule": "learned"}, "ranks that stay"),
        ({"train.freeze": "v"}, "train.freeze=none"),
    ],
)
def test_what_control_variates_do_not_go_with(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"train.correction=scaffold needs {said}"):
        open_environment(load_config(None, {"train.strategy": "scaffold", **settings}))


def test_augmented_examples_differ_and_runs_stay_the_same(federate: Federate) -> None:
    plain, _, _ = federate()
    one, _, _ = federate({"data.augment": "crop-flip"})
    two, _, _ = federate({"data.augment": "crop-flip"}, nodes=3)
    assert one["model_sha256"] == two["model_sha256"] != plain["model_sha256"]
    numbers = own_task(convert("numbers", {"x": np.eye(20), "y": np.arange(20) % 2}))
    with pytest.raises(UserError, match=r"data\.augment='crop-flip': the examples of 'numbers' are no images"):
        augmented(numbers, "crop-flip")


def test_devices_keep_a_part_of_their_examples_to_be_tested_on(federate: Federate) -> None:
    overrides = {"data.device-test": 0.25, "train.rounds": 4}
    env = open_environment(load_config(None, overrides))
    whole = open_environment(load_config())
    for kept, held, part in zip(env.parts, env.device_tests.examples, whole.parts, strict=True):
        assert sorted([*kept, *held]) == part.tolist()
        assert len(held) == round(0.25 * len(part))
    summary, folder, _ = federate(overrides)
    assert summary["failed"] == 0
    last, lines = folder.read_rounds()[-1], folder.read_devices()
    tested = lines[-1].test
    assert len(tested) == sum(len(x) > 0 for x in env.device_tests.examples)
    for name, row in last.device_test.items():
        values = sorted(
            tested[str(d)]["accuracy"] for d in range(20) if env.tier(d).tier.name == name and str(d) in tested
        )
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["worst_decile"] == values[0], "of four devices, the worst tenth is one"
    assert set(lines[0].loss) | set(lines[-1].loss) <= {str(d) for d in range(20)}
