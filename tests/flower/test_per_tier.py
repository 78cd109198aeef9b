"""Tensors that belong to tiers, in whole runs."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedmaestro.config.experiment import load_config
from fedmaestro.deploy.extract import Target, extract
from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import JOB
from fedmaestro.flower.run import Run
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.method import method_of
from fedmaestro.submodel import state_of
from fedmaestro.tasks.task import evaluate

Federate = Callable[..., Any]

OWN = {"train.per-tier": "bias head"}


def test_a_run_serves_each_tier_with_its_copies(federate: Federate) -> None:
    settings = OWN | {"train.strategy": "nested", "train.evaluate-every": 1}
    summary, folder, _ = federate(settings)
    _, plain, _ = federate(settings | {"train.per-tier": "none"})
    records, others = folder.read_rounds(), plain.read_rounds()
    assert [x.download_bytes for x in records] == [x.download_bytes for x in others]
    assert [x.upload_bytes for x in records] == [x.upload_bytes for x in others]
    assert records[0].tiers == others[0].tiers, "copies start equal"
    env = open_environment(load_config(None, settings))
    models = {tier: state_of(Run(folder.path).model(tier)) for tier in summary["tiers"]}
    for tier, model in models.items():
        result = evaluate(Run(folder.path).model(tier), env.task, env.task.split("test"))
        assert result.accuracy == pytest.approx(summary["tiers"][tier]["final_accuracy"])
        assert state_of(extract(folder.path, Target(tier=tier)).model()).keys()
        if tier != "flagship":
            assert not torch.equal(model["fc1.bias"], models["flagship"]["fc1.bias"])
            assert not torch.equal(model["fc3.weight"], models["flagship"]["fc3.weight"])
    whole = state_of(Run(folder.path).model())
    assert all(not torch.equal(whole["fc1.bias"], model["fc1.bias"]) for model in models.values())
    assert torch.equal(whole["fc1.u"], models["flagship"]["fc1.u"])


def test_hosts_change_nothing_and_a_run_goes_on_where_it_was(federate: Federate) -> None:
    settings = OWN | {"train.rounds": 3, "server.optimizer": "momentum", "server.reorder-every": "never"}
    one, _, _ = federate(settings, nodes=1)
    stop = threading.Event()

    def interrupt(message: Message) -> str | None:
        if message.content.config_records[JOB].get("round") == 2:
            stop.set()
            return "lost"
        return None

    _, folder, _ = federate(settings, stop=stop, spoil=interrupt)
    again, _, _ = federate(settings, nodes=5, folder=folder.path)
    assert again["model_sha256"] == one["model_sha256"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train.per-tier": "biases"}, "train.per-tier.*biases.*bias"),
        ({"train.per-tier": "none bias"}, "none goes with no other word"),
        ({"train.per-tier": "norm"}, "model 'mlp' has no norm: leave 'norm' out"),
        (OWN | {"train.strategy": "exclusive"}, "each tier has a model of its own already"),
        (OWN | {"train.strategy": "fedlmt"}, "tiers do not train sizes of their own"),
        (OWN | {"train.strategy": "capable-only"}, "tiers do not train sizes of their own"),
        (OWN | {"train.strategy": "fedrolex"}, "a tier trains other channels in every round"),
        (OWN | {"train.strategy": "scaffold"}, "train.per-tier=none: control variates"),
        (OWN | {"model.keep-dense": "none", "ranks.rule": "learned"}, "its own of 'fc3'"),
        (OWN | {"model.keep-dense": "none", "train.group-lasso": 0.1}, "factors that all tiers share"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_environment(load_config(None, settings))


def test_it_is_a_switch_of_every_row() -> None:
    assert method_of(load_config(None, {})).per_tier == ()
    assert method_of(load_config(None, {"train.per-tier": "norm, bias"})).per_tier == ("bias", "norm")


def test_a_factorised_head_can_be_a_tiers_own(federate: Federate) -> None:
    _, folder, _ = federate(OWN | {"model.keep-dense": "none"})
    low, whole = (state_of(Run(folder.path).model(tier)) for tier in ("low", None))
    assert low["fc3.u"].shape[1] < whole["fc3.u"].shape[1]
    assert not torch.equal(low["fc3.u"], whole["fc3.u"][:, : low["fc3.u"].shape[1]])
