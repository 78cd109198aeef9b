"""Attackers: who they are, what they send, and that a run with them is as repeatable as any."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedmaestro
from fedmaestro import extend
from fedmaestro.errors import UserError
from fedmaestro.fleet.attacks import ATTACKS, Attackers, Attacking, find_attackers
from fedmaestro.submodel import State, cut

NAMES = ["high", "mid", "low"]
TIER_OF = np.repeat([0, 1, 2], [10, 20, 30])
SMALL: dict[str, Any] = {
    "train.strategy": "nested",
    "data.devices": 10,
    "train.rounds": 3,
    "train.evaluate-every": 3,
    "model.name": "mlp",
}


def attackers(name: str, share: float = 0.3, tiers: str = "all", strength: float | None = None) -> Attackers:
    found = find_attackers(name, share, tiers, strength, tier_of=TIER_OF, names=NAMES, seed=1)
    assert found is not None
    return found


def update() -> tuple[State, State]:
    generator = torch.Generator().manual_seed(0)
    start = {"fc.u": torch.randn(5, 4, generator=generator), "fc.v": torch.randn(4, 3, generator=generator)}
    return start, {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in start.items()}


def length(state: State, start: State) -> float:
    return float(torch.cat([(x - start[name]).flatten() for name, x in state.items()]).norm())


def test_each_tier_has_its_share_of_attackers() -> None:
    found = attackers("scale").devices
    assert [sum(TIER_OF[d] == tier for d in found) for tier in range(3)] == [3, 6, 9]
    assert {int(TIER_OF[d]) for d in attackers("scale", tiers="low, high").devices} == {0, 2}
    assert attackers("noise").devices == found
    assert find_attackers("none", 0.3, "all", None, tier_of=TIER_OF, names=NAMES, seed=1) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "sign"}, "unknown fleet.attack 'sign': did you mean 'sign-flip'"),
        ({"tiers": "low,hihg"}, "unknown fleet.attack-tiers 'hihg': did you mean 'high'"),
        ({"name": "label-flip", "strength": 2.0}, "fleet.attack-strength=2 has no effect: label-flip changes labels"),
        ({"share": 0.01}, "fleet.attackers=0.01 of the devices of each tier is nobody"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    settings = {"name": "sign-flip", "share": 0.3, "tiers": "all"} | given
    with pytest.raises(UserError) as error:
        attackers(**settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "strength", "factor"), [("sign-flip", None, -1.0), ("scale", None, 10.0), ("scale", 3.0, 3.0)]
)
def test_an_update_is_multiplied(name: str, strength: float | None, factor: float) -> None:
    start, trained = update()
    found = attackers(name, strength=strength)
    bad = min(found.devices)
    sent = found.sent(bad, 4, trained, start)
    for key, x in sent.items():
        torch.testing.assert_close(x, start[key] + factor * (trained[key] - start[key]))
        assert x.dtype == trained[key].dtype
    honest = min({*range(60)} - found.devices)
    assert found.sent(honest, 4, trained, start) is trained


def test_noise_is_as_long_as_it_says_and_each_device_has_its_own() -> None:
    start, trained = update()
    found = attackers("noise", strength=100.0)
    one, other, *_ = sorted(found.devices)
    sent = found.sent(one, 4, trained, start)
    assert length(sent, trained) == pytest.approx(100 * length(trained, start), rel=0.5)
    for changed in (found.sent(other, 4, trained, start), found.sent(one, 5, trained, start)):
        assert not torch.equal(changed["fc.u"], sent["fc.u"])
    assert torch.equal(found.sent(one, 4, trained, start)["fc.u"], sent["fc.u"])


def test_colluding_attackers_agree_on_what_their_tiers_share() -> None:
    start, trained = update()
    found = attackers("collude", strength=3.0)
    one, other, *_ = sorted(found.devices)
    sent = found.sent(one, 4, trained, start)
    assert length(sent, start) == pytest.approx(3 * length(trained, start), rel=1e-5)
    assert torch.equal(found.sent(other, 4, trained, start)["fc.v"], sent["fc.v"])
    # A smaller tier: the same direction, cut.
    shapes = {"fc.u": (5, 2), "fc.v": (2, 3)}
    small = found.sent(other, 4, cut(trained, shapes), cut(start, shapes))
    begun = cut(start, shapes)
    whole, part = (
        torch.cat([(x - begun[key]).flatten() for key, x in cut(state, shapes).items()]) for state in (sent, small)
    )
    assert float(torch.nn.functional.cosine_similarity(whole, part, dim=0)) == pytest.approx(1, abs=1e-4)
    assert not torch.equal(found.sent(one, 5, trained, start)["fc.v"], sent["fc.v"])


def test_flipped_labels_are_those_of_attackers_only() -> None:
    found = attackers("label-flip")
    labels = torch.tensor([0, 3, 9])
    assert found.labels(min(found.devices), labels, 10).tolist() == [9, 6, 0]
    assert found.labels(min({*range(60)} - found.devices), labels, 10) is labels
    start, trained = update()
    assert found.sent(min(found.devices), 4, trained, start) is trained


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attacked_run_is_the_same_whoever_does_the_work(name: str, tmp_path: Path) -> None:
    settings = SMALL | {"fleet.attack": name, "fleet.attackers": 0.5}
    models = [
        fedmaestro.run(overrides=settings | more, out=tmp_path / str(i), actors=0).summary["model_sha256"]
        for i, more in enumerate(({}, {"train.cohort-size": 1}, {"fleet.attack": "none"}))
    ]
    assert models[0] == models[1] != models[2]


def test_attackers_are_counted(tmp_path: Path) -> None:
    run = fedmaestro.run(
        overrides=SMALL | {"fleet.attack": "scale", "fleet.attackers": 0.5}, out=tmp_path / "r", actors=0
    )
    assert [record.attackers for record in run.rounds] == [0, 5, 5, 5]


def test_classes_of_a_task_without_classes_cannot_be_flipped(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    data = {"x": x, "y": x.sum(axis=1), "task": "regression"}
    with pytest.raises(UserError, match="changes classes, and task 'regression' has none"):
        fedmaestro.run(
            overrides=SMALL | {"fleet.attack": "label-flip", "train.strategy": "nested"}, data=data, out=tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


def test_an_attack_of_ones_own(tmp_path: Path) -> None:
    @extend.attack("silence", summary="sends what it was sent")
    def silence(update: State, this: Attacking) -> State:
        return {name: Tensor.mul(x, 0 * this.strength) for name, x in update.items()}

    settings = SMALL | {"fleet.attack": "silence", "fleet.attackers": 1.0, "server.reorder-every": "never"}
    run = fedmaestro.run(overrides=settings, out=tmp_path / "r", actors=0)
    accuracies = [record.tiers["flagship"]["accuracy"] for record in run.rounds if record.tiers]
    assert len({*accuracies}) == 1
