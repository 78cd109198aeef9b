"""Networks as users have them: each trains in a federation, and every tier learns more than chance."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedmaestro
from fedmaestro import extend, lod
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.shape import Input
from fedmaestro.models.static_norm import StaticNorm
from fedmaestro.rounds.environment import Environment
from fedmaestro.submodel import num_elements, state_of

Federate = Callable[..., Any]
Shape = tuple[int, ...]


def _conv(i: int, o: int, **more: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **more), nn.BatchNorm2d(o), nn.ReLU())


class ResNet(nn.Module):
    """Two residual blocks with BatchNorm."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.stem, self.one, self.two = _conv(shape[0], 16), _conv(16, 16), _conv(16, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = F.max_pool2d(x + self.two(x), 2)
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class MobileNet(nn.Module):
    """Depthwise separable convolutions."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.stem = _conv(shape[0], 24)
        self.depthwise, self.pointwise = _conv(24, 24, groups=24), nn.Conv2d(24, 48, 1)
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.stem(x))).relu()
        out: Tensor = self.head(F.max_pool2d(x, 4).mean(dim=(2, 3)))
        return out


class ViT(nn.Module):
    """Patches, registers, PyTorch's encoder; its depth is computed by tensors where it is made, as timm's drop path."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.depth = int(torch.linspace(0, 1, 2)[-1].item())
        self.patch = nn.Conv2d(shape[0], 32, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.register_buffer("position", torch.randn(1, 17, 32) * 0.1, persistent=False)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, self.depth, enable_nested_tensor=False)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return {"features": x, "logits": self.head(self.encoder(x).mean(dim=1))}


class Recurrent(nn.Module):
    """GRU over the rows, then lazy layers."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(shape[2], 32, batch_first=True)
        self.body, self.head = nn.LazyLinear(48), nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.rnn(x[:, 0])[0][:, -1]
        return self.head(self.body(hidden).relu()), hidden


class Waves(nn.Module):
    """Conv1d network over (channels, time), with one layer that is used twice."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.one = nn.Conv1d(shape[0], 24, 5, padding="same")
        self.two, self.norm = nn.Conv1d(24, 24, 5, padding=2, stride=1), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = self.norm(self.two(self.two(x).relu())).relu()
        out: Tensor = self.head(x.amax(dim=2))
        return out


ADAM = {
    "train.optimizer": "adam",
    "train.rounds": 5,
    "train.strategy": "nested",
    "fleet.preset": "phones",
    "data.partition": "iid",
    "data.devices": 4,
    "train.devices-per-round": 4,
}


@pytest.mark.parametrize(
    ("model", "lr"),
    [(ResNet, 0.01), (MobileNet, 0.02), (ViT, 0.01), (Recurrent, 0.01)],
    ids=["resnet", "mobilenet", "vit", "gru"],
)
def test_image_networks_learn_at_every_tier(model: type[nn.Module], lr: float, federate: Federate) -> None:
    overrides = {**extend.given({"model": model}), **ADAM, "train.lr": lr}
    summary, folder, _ = federate(overrides)
    assert summary["failed"] == 0
    finals = {name: tier["final_accuracy"] for name, tier in summary["tiers"].items()}
    assert all(accuracy > 0.2 for accuracy in finals.values()), f"chance is 0.1: {finals}"
    costs = [tier["macs_per_example"] for tier in summary["tiers"].values()]
    assert costs == sorted(costs, reverse=True)
    # What is loaded is what was evaluated, BatchNorm's statistics included.
    for tier in ("flagship", "legacy"):
        small = fedmaestro.load_model(folder.path, tier)
        x, y = digits()
        with torch.inference_mode():
            right = (outputs(small(x)).argmax(dim=1) == y).float().mean()
        assert float(right) == pytest.approx(finals[tier], abs=0.01)


def outputs(result: Any) -> Tensor:
    if isinstance(result, dict):
        result = result["logits"]
    elif isinstance(result, tuple):
        result = result[0]
    assert isinstance(result, Tensor)
    return result


def digits() -> tuple[Tensor, Tensor]:
    from fedmaestro.config.experiment import load_config
    from fedmaestro.rounds.environment import open_environment

    task = open_environment(load_config()).task
    batches = list(task.split("test"))
    return torch.cat([b.inputs[0] for b in batches]), torch.cat([b.targets for b in batches])


def waves() -> dict[str, Any]:
    """Sines of three frequencies in two channels, ten users."""
    r = np.random.default_rng(0)
    y, user, t = r.integers(3, size=500), r.integers(10, size=500), np.arange(40)
    x = np.sin(0.25 * t * (y[:, None, None] + 1) + r.normal(size=(500, 2, 1))) + 0.3 * r.normal(size=(500, 2, 40))
    return {"x": x[:400], "y": y[:400], "groups": user[:400], "x_test": x[400:], "y_test": y[400:]}


def test_a_conv1d_network_learns(federate: Federate) -> None:
    overrides = {
        **extend.given({"model": Waves, "dataset": waves}),
        "data.partition": "natural",
        "model.keep-dense": "none",
    }
    summary, _, _ = federate({**overrides, "train.rounds": 12, "train.devices-per-round": 8, "train.lr": 0.1})
    assert summary["failed"] == 0
    assert sum(tier["devices"] for tier in summary["tiers"].values()) == 10
    assert all(tier["final_accuracy"] > 0.6 for tier in summary["tiers"].values()), "chance is 0.33"
    assert all(set(tier["ranks"]) == {"one", "two", "head"} for tier in summary["tiers"].values())


def test_a_regression_learns(federate: Federate) -> None:
    def friedman() -> dict[str, Any]:
        r = np.random.default_rng(0)
        x = r.random((800, 5))
        y = np.sin(np.pi * x[:, 0] * x[:, 1]) + 2 * (x[:, 2] - 0.5) ** 2 + x[:, 3] + 0.5 * x[:, 4]
        return {"x": x, "y": y, "standardize": True}

    chosen = extend.given({"dataset": friedman})
    summary, folder, _ = federate(
        {**chosen, "data.partition": "quantity", "train.rounds": 15, "train.lr": 0.05, "train.strategy": "nested"}
    )
    assert summary["failed"] == 0
    assert summary["metric"] == {"name": "rmse", "higher_is_better": False, "percent": False}
    spread = 0.6
    for tier in summary["tiers"].values():
        assert tier["best_rmse"] <= tier["final_rmse"] < 0.8 * spread, "the targets' standard deviation"
    assert summary["worst_tier_rmse"] == max(tier["final_rmse"] for tier in summary["tiers"].values())
    assert list(folder.read_rounds()[-1].tiers["low"]) == ["rmse", "r2", "loss"]


class TinyLM(nn.Module):
    """Next token from an embedding that the head shares."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 32)
        self.rnn, self.mix = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 32)
        self.head = nn.Linear(32, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.rnn(self.embed(tokens))[0]).relu())
        return out


def sentences() -> dict[str, Any]:
    """Counting sequences of unequal length over 9 tokens: each next one follows from the one before it."""
    r = np.random.default_rng(0)
    x = [
        [1 + (int(s) + i * int(d)) % 9 for i in range(int(n))]
        for s, d, n in r.integers([0, 1, 4], [9, 3, 12], (300, 3))
    ]
    return {"x": x, "groups": np.arange(300) % 12}


def test_next_tokens_are_learnt_and_tied_weights_stay_tied(federate: Federate) -> None:
    chosen = {**extend.given({"model": TinyLM, "dataset": sentences}), "data.partition": "natural"}
    summary, folder, _ = federate({**chosen, "train.rounds": 12, "train.lr": 0.5, "train.strategy": "nested"})
    assert summary["failed"] == 0
    assert summary["metric"]["name"] == "perplexity"
    assert all(tier["final_perplexity"] < 5 for tier in summary["tiers"].values()), "guessing has 9"
    model = fedmaestro.load_model(folder.path, "low")
    assert model.head.weight is model.embed.weight
    assert summary["tiers"]["flagship"]["params"] == sum(
        p.numel() for p in fedmaestro.load_model(folder.path).parameters()
    )
    assert summary["tiers"]["flagship"]["download_bytes"] == 4 * summary["tiers"]["flagship"]["params"]


def test_what_cannot_be_factorised_stays_dense_and_is_listed() -> None:
    extend.model("net")(MobileNet)
    architecture = Architecture(name="net", input_shape=(1, 8, 8), num_classes=10, keep_dense="none")
    assert architecture.kept_dense == {"depthwise.0": "groups=24"}
    assert set(lod.layers(architecture.full)) == {"stem.0", "pointwise", "head"}
    extend.model("tied")(TinyLM)
    tied = Architecture(
        name="tied", input_shape=(9,), num_classes=12, inputs=(Input((9,), "int64"),), keep_dense="none"
    )
    assert tied.kept_dense["rnn"] == "LSTM has no LoD form"
    assert "shares a weight with embed" in tied.kept_dense["head"]
    assert set(lod.layers(tied.full)) == {"mix"}


def test_no_layer_costs_nothing() -> None:
    """MACs of what has no closed form are those that PyTorch's FLOP counter sees; by hand here."""

    class Odd(nn.Module):
        def __init__(self, shape: Shape, classes: int) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 4, 2, 2)
            self.own = nn.Parameter(torch.randn(256, 6) / 16)
            self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, classes)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.up(x).flatten(2) @ self.own
            out: Tensor = self.head(self.lstm(rows)[0][:, -1])
            return out

    extend.model("odd")(Odd)
    from fedmaestro.fleet.plan import trace_of

    traced = trace_of(Architecture(name="odd", input_shape=(1, 8, 8), num_classes=3))
    up, own, lstm = 64 * 4 * 4, 4 * 256 * 6, 4 * 4 * 5 * (6 + 5)
    assert traced.fixed_macs == up + own + lstm


def test_batch_norm_sends_no_statistics() -> None:
    extend.model("net")(ResNet)
    architecture = Architecture(name="net", input_shape=(1, 8, 8), num_classes=10)
    state = architecture.initial_state(0)
    norms = [name for name, module in architecture.full.named_modules() if isinstance(module, StaticNorm)]
    assert len(norms) == 3
    assert {name for name in state if name.startswith("one.1")} == {"one.1.weight", "one.1.bias"}
    plain = ResNet((1, 8, 8), 10)
    expected = sum(p.numel() for p in plain.parameters())
    factors = lod.layers(architecture.full).values()
    more = sum(x.u.numel() + x.v.numel() - x.u.shape[0] * math.prod(x.v.shape[1:]) for x in factors)
    assert num_elements({name: tuple(x.shape) for name, x in state.items()}) == expected + more
    one = architecture.measurable()
    one.train()(torch.randn(1, 1, 8, 8))  # a batch of one example


def test_several_inputs(federate: Federate) -> None:
    class Both(nn.Module):
        def __init__(self, shape: Shape, classes: int) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(4, 8), nn.Linear(shape[0] + 8, 32)
            self.head = nn.Linear(32, classes)

        def forward(self, numbers: Tensor, kind: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(torch.cat([numbers, self.embed(kind[:, 0])], dim=1)).relu())
            return out

    def both() -> dict[str, Any]:
        r = np.random.default_rng(0)
        x, kind = r.normal(size=(600, 6)), r.integers(4, size=(600, 1))
        return {"x": (x, kind), "y": ((x[:, 0] > 0) ^ (kind[:, 0] > 1)).astype(int)}

    chosen = extend.given({"model": Both, "dataset": both})
    summary, _, _ = federate({**chosen, "train.rounds": 15, "train.lr": 0.5, "data.alpha": 10.0})
    assert summary["failed"] == 0
    assert all(tier["final_accuracy"] > 0.7 for tier in summary["tiers"].values()), "chance is 0.5"


def test_pictures_without_a_channel_reach_models_that_need_one(federate: Federate) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = extend.given({"dataset": {"x": bunch.images / 16, "y": bunch.target}})
    summary, folder, _ = federate({**chosen, "model.name": "cnn", "train.rounds": 1})
    assert summary["failed"] == 0
    assert fedmaestro.load_model(folder.path)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_models_are_built_where_nothing_else_is_drawn() -> None:
    extend.model("net")(ViT)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one = Architecture(name="net", input_shape=(1, 8, 8), num_classes=10)
    first, second = one.initial_state(1), one.initial_state(2)
    assert torch.random.get_rng_state().equal(before), "the caller's generator stays"
    assert not first["head.weight"].equal(second["head.weight"])
    assert all(x.equal(one.initial_state(1)[name]) for name, x in first.items())
    assert Environment is not None
    assert {*state_of(one.materialize(one.full_size))} == {*first}
    assert MODELS["net"].summary.startswith("Patches")
