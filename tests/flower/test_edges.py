"""Where the federation meets the outside: names that look like paths, and tensors that become messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedmaestro
from fedmaestro.flower import client_app, tiered_strategy

FLEET = """
[tiers.a]
share = 0.5
rank-fraction = 1.0
[tiers."{small}"]
share = 0.5
rank-fraction = 0.25
"""


def test_under_exclusive_a_tier_trains_whose_name_is_the_beginning_of_anothers(
    federate: Callable[..., Any], tmp_path: Path
) -> None:
    finals: dict[str, list[float]] = {}
    for small in ("a/b", "b"):
        fleet = tmp_path / f"{len(small)}.toml"
        fleet.write_text(FLEET.format(small=small))
        settings = {"fleet.file": str(fleet), "train.strategy": "exclusive", "train.evaluate-every": 1}
        summary, folder, _ = federate(settings)
        assert list(summary["tiers"]) == ["a", small]
        finals[small] = [tier["final_accuracy"] for tier in summary["tiers"].values()]
        first, *_, last = (json.loads(line)["tiers"] for line in folder.rounds.read_text().splitlines())
        assert all(last[tier]["loss"] < first[tier]["loss"] for tier in ("a", small)), "both were trained"
        large, little = (fedmaestro.load_model(folder.path, tier) for tier in ("a", small))
        assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in little.parameters())
        assert not torch.equal(large.get_parameter("fc3.bias"), little.get_parameter("fc3.bias"))
    assert finals["a/b"] == finals["b"], "names change nothing"


def test_a_tensor_is_decoded_and_encoded_once_per_message(
    federate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"to_state": 0, "to_arrays": 0}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(client_app, name)

        def call(argument: Any) -> Any:
            calls[name] += len(argument) > 0
            return original(argument)

        return call

    for name in calls:
        replacement = counted(name)
        for module in (client_app, tiered_strategy):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    _, _, grid = federate({"train.rounds": 1, "train.evaluate-every": 1, "train.devices-per-round": 20})
    kinds = [message.metadata.message_type for message in grid.sent]
    train, evaluate = kinds.count("train"), kinds.count("evaluate")
    assert train >= 4
    assert evaluate >= 4
    assert calls["to_state"] == 2 * train + 2 * evaluate, "on the host, and of what it replied"
    sizes = 5
    replies = train + evaluate
    assert calls["to_arrays"] <= replies + 3 * sizes, "of a reply, and of what is sent once per size and phase"
