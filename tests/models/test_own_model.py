"""A model of the user's: its own initialisation and its constants reach every tier, and it learns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedmaestro
from fedmaestro.models import MODELS, InputShape, ModelSpec
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.width import Scale


class Own(nn.Module):
    """Rows of the image as a sequence: layers that nothing here knows, a constant that no state holds."""

    def __init__(self, input_shape: InputShape, num_classes: int, scale: Scale) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(-1, 1, input_shape[1])[:, None], persistent=False)
        self.embed = nn.Linear(input_shape[2], 24)
        self.prelu = nn.PReLU(24, init=0.125)
        self.rnn = nn.GRU(24, 32, batch_first=True)
        self.gain = nn.Parameter(torch.full((32,), 2.0))
        self.hidden, self.head = nn.Linear(32 * input_shape[1], 48), nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.prelu((self.embed(x[:, 0]) + self.positions).transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.head(self.hidden((self.rnn(rows)[0] * self.gain).flatten(1)).relu())
        return out


def test_an_own_model_keeps_its_start_and_learns(federate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "own", ModelSpec(build=Own, summary=""))
    state = Architecture(name="own", input_shape=(1, 8, 8), num_classes=10).initial_state(5)
    torch.manual_seed(5)
    mine = Own((1, 8, 8), 10, Scale()).state_dict()
    assert {*mine} - {*state} == {"embed.weight", "hidden.weight"}
    assert all(tensor.equal(mine[name]) for name, tensor in state.items() if name in mine)
    torch.testing.assert_close(state["embed.u"] @ state["embed.v"], mine["embed.weight"])

    summary, folder, _ = federate({"model.name": "own", "train.rounds": 12, "train.lr": 0.3})
    assert summary["failed"] == 0
    assert all(tier["final_accuracy"] > 0.4 for tier in summary["tiers"].values())
    small = fedmaestro.load_model(folder.path, "minimal")
    assert small.get_buffer("positions").equal(torch.linspace(-1, 1, 8)[:, None])
