"""``data.validation`` of a federation: what is held out, from whom, and that the test set is not looked at."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro import extend
from fedmaestro.config.base import read
from fedmaestro.config.experiment import load_config
from fedmaestro.config.training import TrainingConfig
from fedmaestro.data.holdout import hold_out
from fedmaestro.errors import UserError
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.runs.start import code_of
from fedmaestro.tasks.opening import open_task

Federate = Callable[..., Any]

AMOUNTS = st.one_of(st.integers(0, 30), st.floats(0.05, 0.9))


@given(count=st.integers(31, 80), amount=AMOUNTS, seed=st.integers(0, 99), users=st.integers(1, 30))
def test_every_example_is_on_one_side_and_users_keep_one(count: int, amount: float, seed: int, users: int) -> None:
    user_of = np.random.default_rng(seed).integers(users, size=count)
    rest, held = hold_out(count, amount, seed)
    assert sorted([*rest, *held]) == list(range(count))
    assert len(held) == (round(amount * count) if isinstance(amount, float) else amount)
    np.testing.assert_array_equal(hold_out(count, amount, seed)[1], held)
    if len(held) > count - len(np.unique(user_of)):
        with pytest.raises(UserError, match="leaves a user nothing"):
            hold_out(count, amount, seed, user_of)
        return
    kept, out = hold_out(count, amount, seed, user_of)
    assert sorted([*kept, *out]) == list(range(count))
    assert len(out) == len(held)
    assert set(user_of[kept]) == set(user_of)


@pytest.mark.parametrize(
    ("amount", "said"),
    [(100, "data.validation=100 leaves nothing of 100"), (0.999, "leaves nothing"), (0.001, "is none: raise it")],
)
def test_what_cannot_be_held_out_is_one_line(amount: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        hold_out(100, amount, 0)


@pytest.mark.parametrize("value", [-1, 1.5, True, "many"])
def test_settings_are_a_number_or_a_share(value: Any) -> None:
    with pytest.raises(UserError, match=r"data\.validation"):
        load_config(None, {"data.validation": value})


def environment(**settings: Any) -> Environment:
    config = load_config(None, settings)
    return open_environment(config, code=code_of(config))


def test_devices_get_what_a_training_on_one_machine_would_learn_from() -> None:
    env = environment(**{"data.validation": 0.2, "seed": 3})
    alone = open_task(read(TrainingConfig, None, {"data.validation": 287, "seed": 3}))
    assert (env.task.examples, env.task.test_examples) == (alone.examples, 287) == (1150, 287)
    assert sorted(np.concatenate(list(env.parts))) == list(range(1150))
    for ours, theirs in zip(env.task.split("test"), alone.split("validation"), strict=True):
        assert ours.targets.equal(theirs.targets)
        assert ours.inputs[0].equal(theirs.inputs[0])
    whole, less = environment(seed=3), environment(**{"data.validation": 0.1, "seed": 3})
    assert whole.task.test_examples == 360
    assert len({whole.fingerprint, env.fingerprint, less.fingerprint}) == 3


def test_too_little_for_the_devices_says_that_the_split_is_the_cause() -> None:
    with pytest.raises(UserError, match=r"data.validation=1430 leaves 7 training examples, and 20 devices need 20"):
        environment(**{"data.validation": 1430})
    with pytest.raises(UserError, match=r"data.validation=0.9 leaves 144 .* need 500 \(.*data.share-examples\)"):
        environment(**{"data.validation": 0.9, "data.share-examples": 500})


def own(kind: str, test: np.random.Generator) -> dict[str, Any]:
    """Data of six users; ``test`` draws what the test set is."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(6), [1, 30, 30, 30, 30, 30])
    x, x_test = generator.normal(size=(151, 4)), test.normal(size=(40, 4))
    groups = {"groups": users, "groups_test": test.integers(6, size=40)}
    if kind == "classification":
        return {"x": x, "y": (x.sum(axis=1) > 0) * 1, "x_test": x_test, "y_test": test.permutation(40) % 2, **groups}
    if kind == "regression":
        return {"x": x, "y": x @ np.ones(4), "x_test": x_test, "y_test": test.normal(size=40), "task": kind, **groups}
    return {"x": generator.integers(5, size=(151, 6)), "x_test": test.integers(5, size=(40, 6)), "task": kind, **groups}


def language_model(input_shape: tuple[int, ...], num_classes: int) -> Any:
    from torch import nn

    return nn.Sequential(nn.Embedding(num_classes, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, num_classes))


@pytest.mark.parametrize("kind", ["classification", "regression", "next-token"])
@pytest.mark.parametrize("partition", ["natural", "iid"])
def test_whatever_is_learnt_the_test_set_is_not_looked_at(kind: str, partition: str, federate: Federate) -> None:
    """Two datasets that differ in their test sets only: the same run, to the bit."""
    extend.model("tiny-language")(language_model)
    settings = {
        "data.name": "mine",
        "data.partition": partition,
        "data.devices": 6,
        "data.validation": 0.2,
        "train.devices-per-round": 4,
        "train.strategy": "nested",
        "model.name": "tiny-language" if kind == "next-token" else "mlp",
        "model.keep-dense": "none",
    }
    found = []
    for seed in (1, 2):
        extend.dataset("mine")(lambda seed=seed: own(kind, np.random.default_rng(seed)))
        summary, folder, _ = federate(settings)
        assert summary["split"] == "validation"
        assert summary["failed"] == 0
        found.append([(record.tiers, record.device_test) for record in folder.read_rounds()])
        if partition == "natural":  # of every user but the first, who keeps the one example that there is
            assert sum(tier["devices"] for tier in found[-1][-1][1].values()) == 5
    assert found[0] == found[1]
    extend.dataset("mine")(lambda: own(kind, np.random.default_rng(2)))
    tested, folder, _ = federate({**settings, "data.validation": 0})
    assert tested["split"] == "test"
    assert folder.read_rounds()[0].tiers != found[0][0][0]
