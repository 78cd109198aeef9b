"""Every row of the table in a whole federation on hosts in this process."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import JOB, SUBMODEL
from fedmaestro.flower.run import Run
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.method import method_of
from fedmaestro.runs.checkpoint import below, load_checkpoint
from fedmaestro.runs.model import read_model
from fedmaestro.strategies import STRATEGIES, Strategy
from fedmaestro.strategies.base import SUMS
from fedmaestro.strategies.reordered import reorder
from fedmaestro.tasks.task import evaluate

Federate = Callable[..., Any]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_trains_and_what_it_writes_is_what_it_says(federate: Federate, strategy: str) -> None:
    overrides = {"train.strategy": strategy, "train.record-bias": True, "train.cohort-size": 2}
    summary, folder, grid = federate(overrides)
    start, *rounds = folder.read_rounds()
    env = open_environment(load_config(None, overrides))
    trained = sum(record.devices for record in rounds)
    assert trained > 0
    assert all(record.failed == 0 for record in rounds)
    for tier, scores in rounds[-1].tiers.items():
        assert scores["accuracy"] == summary["tiers"][tier]["final_accuracy"]
        model = Run(folder.path).model(tier)
        result = evaluate(model, env.task, env.task.split("test"))
        assert result.accuracy == pytest.approx(scores["accuracy"]), "the artefact is what was evaluated"
    assert rounds[-1].tiers != start.tiers
    whole = env.plan.setting.rule.form == "lod" and not env.plan.setting.rule.separate
    assert (rounds[-1].tail_energy is not None) == whole
    sent: dict[int, int] = {}
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        if message.metadata.message_type == "train":
            job = message.content.config_records[JOB]
            devices = len(job["devices"])  # type: ignore[arg-type]
            tensors = message.content.array_records[SUBMODEL].values()
            number = int(job["round"])  # type: ignore[call-overload]
            sent[number] = sent.get(number, 0) + devices * sum(array.numpy().nbytes for array in tensors)
            assert reply.content.array_records[SUMS]
    if strategy == "fiarse":
        return  # messages of the simulation have zeros where a device's would have nothing (tests/models/test_masks.py)
    traffic = 2 if strategy == "scaffold" else 1  # control variates are as large as the model
    assert [record.download_bytes for record in rounds] == [traffic * sent[record.round] for record in rounds]


@pytest.mark.parametrize("strategy", ["fedmaestro", "exclusive", "fedrolex", "product-svd"])
def test_hosts_change_nothing_and_a_run_goes_on_where_it_was(federate: Federate, strategy: str) -> None:
    overrides = {"train.strategy": strategy, "train.rounds": 3, "server.optimizer": "momentum"}
    one, folder, _ = federate(overrides, nodes=1)
    many, _, _ = federate(overrides, nodes=5)
    assert one["model_sha256"] == many["model_sha256"]
    checkpoint = load_checkpoint(folder.checkpoint)
    assert checkpoint is not None
    assert below(checkpoint.tensors, "memory")


def test_alternating_uploads_one_factor_and_leaves_the_other(federate: Federate) -> None:
    overrides = {"train.strategy": "alternating", "train.cohort-size": 1, "train.rounds": 2}
    _, folder, grid = federate(overrides)
    up = {1: 0, 2: 0}
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        if message.metadata.message_type == "train":
            number = int(message.content.config_records[JOB]["round"])  # type: ignore[arg-type]
            arrays = reply.content.array_records[SUMS]
            names = set(message.content.array_records[SUBMODEL]) - set(arrays)
            frozen = names.pop()[-1]
            assert {name[-1] for name in names} <= {frozen}
            assert frozen == ("v" if number % 2 else "u")
            up[number] += sum(array.numpy().nbytes for array in arrays.values())
    records = folder.read_rounds()
    assert [record.upload_bytes for record in records[1:]] == [up[1], up[2]]
    assert all(record.upload_bytes < record.download_bytes for record in records[1:])


def test_separate_models_have_no_whole_one(federate: Federate) -> None:
    _, folder, _ = federate({"train.strategy": "exclusive"})
    with pytest.raises(UserError, match="separate models: name one of flagship, high"):
        Run(folder.path).model()


def test_reordering_is_the_switch_after_the_server_optimiser(federate: Federate) -> None:
    """With it, the stored factors are their own re-ordering; every second round leaves them alone in between."""
    _, folder, _ = federate({"train.strategy": "nested", "server.reorder-every": 1, "train.rounds": 1})
    state, _ = read_model(folder.path)
    again = reorder(state)
    for name, tensor in state.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
    plain = {"train.strategy": "nested", "train.rounds": 1}
    one, _, _ = federate(plain)
    two, _, _ = federate(plain | {"server.reorder-every": 2})
    assert one["model_sha256"] == two["model_sha256"], "round 1 is not a multiple of 2"


def test_tail_decay_is_a_switch_of_its_own(federate: Federate) -> None:
    """Columns that all tiers hold are the same with and without it; all others have faded after one round."""
    settings = {"train.strategy": "nested", "train.rounds": 1, "train.evaluate-every": 1}
    states = {}
    for rate in (0.0, 0.5):
        _, folder, _ = federate(settings | {"server.tail-decay": rate})
        states[rate], _ = read_model(folder.path)
    smallest = open_environment(load_config(None, settings)).plan.tiers[-1].serves.size.ranks or {}
    for layer, rank in smallest.items():
        plain, faded = (states[rate][f"{layer}.u"] for rate in (0.0, 0.5))
        assert torch.equal(faded[:, :rank], plain[:, :rank])
        assert bool((faded[:, rank:].norm(dim=0) < 0.95 * plain[:, rank:].norm(dim=0)).all())


@pytest.mark.parametrize(
    ("strategy", "key"),
    [
        *((strategy, "server.tail-decay") for strategy in ("exclusive", "fjord", "alternating")),
        *((strategy, "server.tail-start") for strategy in ("exclusive", "alternating")),
    ],
)
def test_tails_need_prefixes_of_one_model(strategy: str, key: str) -> None:
    flat = {"train.strategy": strategy, key: 0.5}
    with pytest.raises(UserError, match=re.escape(f"{key}=0.5 needs")):
        open_environment(load_config(None, flat))
    settings = open_environment(load_config(None, flat | {key: 0.0})).method.settings
    assert settings["server.tail-decay"] == settings["server.tail-start"] == 0.0


def test_tail_start_is_a_switch_of_its_own(federate: Federate) -> None:
    """It takes energy from the columns of few holders before the first round; what all tiers hold is as it was."""
    energies, accuracies = {}, {}
    for threshold in (0.0, 3.0, 9.0):
        settings = {"train.strategy": "nested", "train.rounds": 1, "server.tail-start": threshold}
        _, folder, _ = federate(settings)
        start = folder.read_rounds()[0]
        energies[threshold] = start.tail_energy
        accuracies[threshold] = [scores["accuracy"] for scores in start.tiers.values()]
    assert energies[0.0] > energies[3.0] > energies[9.0] > 0
    assert len({tuple(x[:-1]) for x in accuracies.values()}) == 3
    assert len({x[-1] for x in accuracies.values()}) == 1


def test_a_small_start_happens_once(federate: Federate) -> None:
    """A run that goes on from its checkpoint does not start its tails again."""
    settings = {"train.rounds": 3, "server.tail-start": 9.0}
    whole, _, _ = federate(settings)
    stop = threading.Event()

    def interrupt(message: Message) -> str | None:
        if message.content.config_records[JOB].get("round") == 2:
            stop.set()
            return "lost"
        return None

    _, folder, _ = federate(settings, stop=stop, spoil=interrupt)
    again, _, _ = federate(settings, folder=folder.path)
    assert again["model_sha256"] == whole["model_sha256"]


def test_static_norms_are_calibrated_the_same_on_every_host(federate: Federate) -> None:
    overrides = {
        "train.strategy": "heterofl",
        "model.name": "cnn",
        "train.rounds": 1,
        "train.evaluate-every": 1,
        "train.devices-per-round": 2,
        "train.local-epochs": 1,
    }
    one, _, _ = federate(overrides, nodes=1)
    two, _, _ = federate(overrides, nodes=3)
    assert one["tiers"] == two["tiers"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.submodel": "widht"}, "train.submodel.*widht.*width"),
        ({"train.aggregation": "mean"}, "train.aggregation.*mean"),
        ({"server.optimizer": "sgd"}, "server.optimizer.*sgd"),
    ],
)
def test_switches_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_of(load_config(None, settings))


def test_every_switch_can_be_changed_by_itself() -> None:
    settings = {
        "train.submodel": "width",
        "train.aggregation": "zero-pad",
        "server.optimizer": "adam",
        "server.lr": 0.5,
        "server.momentum": 0.8,
        "server.damping": 3.0,
        "train.objective": "own-prefix",
    }
    method = method_of(load_config(None, settings))
    assert method.submodel.form == "dense"
    assert method.aggregation.name == "zero-pad"
    assert method.objective.name == "own-prefix"
    for key, value in settings.items():
        assert method.settings[key] == value


@pytest.mark.parametrize("row", STRATEGIES.values(), ids=STRATEGIES)
def test_a_row_is_made_of_settings_that_an_experiment_could_have(row: Strategy) -> None:
    """So it can be written into an experiment's file, and says what its properties say."""
    method = method_of(load_config(None, {"train.strategy": row.name}))
    written = method_of(load_config(None, {"train.strategy": "partitioned", **row.settings}))
    assert method.settings == written.settings
    assert (method.submodel, method.objective.name, method.aggregation) == (
        row.submodel,
        row.objective,
        row.aggregation,
    )
    assert [step.name for step in method.server] == [step.name for step in row.server]


def test_a_rows_own_value_stands_until_the_experiment_sets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting's default must not go before a row's own β₁."""
    row = Strategy(
        name="mine",
        settings={"server.optimizer": "momentum", "server.momentum": 0.5, "server.lr": 0.25},
        summary="",
        source="",
    )
    monkeypatch.setitem(STRATEGIES, "mine", row)
    own = method_of(load_config(None, {"train.strategy": "mine"})).settings
    assert (own["server.momentum"], own["server.lr"]) == (0.5, 0.25)
    changed = method_of(load_config(None, {"train.strategy": "mine", "server.momentum": 0.8})).settings
    assert (changed["server.momentum"], changed["server.lr"]) == (0.8, 0.25)


def test_a_chain_is_what_the_settings_name(federate: Federate) -> None:
    """Steps come in the named order; what a chain leaves out does not happen, though the row has it."""
    assert [step.name for step in method_of(load_config(None, {"server.steps": "reorder optimizer"})).server] == [
        "reorder",
        "optimizer",
    ]
    settings = {"train.objective": "self-distillation", "train.logit-adjustment": 0.0, "train.rounds": 1}
    plain, _, _ = federate(settings | {"train.strategy": "nested"})
    ours = {"train.strategy": "fedmaestro", "train.submodel": "own", "server.optimizer": "none"}
    without, _, _ = federate(settings | ours | {"server.steps": "optimizer"})
    assert plain["model_sha256"] == without["model_sha256"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"server.steps": "reordr"}, r"server\.steps.*reordr.*reorder"),
        ({"server.steps": "optimizer optimizer"}, "server.steps='optimizer optimizer' names optimizer twice"),
        ({"server.steps": "", "server.tail-decay": 0.1}, "server.tail-decay=0.1 has no effect: .* lacks tail-decay"),
        ({"train.strategy": "nested", "server.lr": 0.5}, "server.lr=0.5 has no effect: server.optimizer is none"),
        ({"server.steps": "reorder", "server.lr": 0.5}, "server.lr=0.5 has no effect: .* lacks optimizer"),
    ],
    ids=str,
)
def test_chains_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        method_of(load_config(None, settings))
    assert method_of(load_config(None, {"server.steps": "optimizer", "server.reorder-every": "never"}))
