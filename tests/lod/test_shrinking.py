"""Cutting for real, optimiser state included. Shapes: ``O`` out, ``I`` in, ``R`` columns held, ``r`` kept."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedmaestro import lod
from fedmaestro.errors import UserError

IMAGES = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
RANKS = st.fixed_dictionaries({}, optional={"conv": st.integers(0, 5), "head": st.integers(0, 4)})

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
}
BUFFERS = {
    "sgd": set(),
    "momentum": {"momentum_buffer"},
    "nesterov": {"momentum_buffer"},
    "adam": {"exp_avg", "exp_avg_sq"},
    "adamw": {"exp_avg", "exp_avg_sq"},
    "amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
}


class Network(nn.Module):
    """conv ``(5, 2, 3, 3)`` with R = 5, norm, head ``(4, 45)`` with R = 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(45, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return lod.factorize(Network().double())


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("u", "v")}


def zero_tail(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    for name, rank in ranks.items():
        layer = lod.layers(model)[name]
        with torch.no_grad():
            layer.u[:, rank:] = 0
            layer.v[rank:] = 0
    return model


def step_with(optimizer: Optimizer, model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Take a step with given gradients, of which each parameter gets the leading block."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name][tuple(map(slice, parameter.shape))].clone()
    optimizer.step()


def random_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the model


@settings(max_examples=25)
@given(ranks=RANKS)
def test_shrinking_is_truncating_in_place(ranks: dict[str, int]) -> None:
    model = network()
    expected = lod.truncate(model, ranks).state_dict()
    lod.shrink(model, ranks)
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert lod.max_ranks(model) == {"conv": 5, "head": 4} | ranks
    for factor in factors(model).values():  # no tail in memory either
        assert factor.untyped_storage().nbytes() == factor.numel() * 8
        assert factor.is_leaf
        assert factor.requires_grad


@settings(max_examples=25)
@given(ranks=RANKS)
def test_cutting_a_tail_of_zeros_keeps_the_function(ranks: dict[str, int]) -> None:
    model = zero_tail(network(), ranks).eval()
    before = model(IMAGES)
    lod.shrink(model, ranks)
    torch.testing.assert_close(model(IMAGES), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("prefix", "kept", "expected"), [(5, 3, 3), (2, 3, 2), (3, 3, 3), (4, 0, 0), (0, 2, 0)])
def test_a_prefix_stays_as_far_as_its_columns_are_left(prefix: int, kept: int, expected: int) -> None:
    model = network()
    lod.set_ranks(model, {"conv": prefix})
    lod.shrink(model, {"conv": kept})
    assert (model.conv.rank, model.conv.max_rank) == (expected, kept)


def test_frozen_factors_stay_frozen_and_need_no_optimizer() -> None:
    model = network()
    model.conv.u.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    lod.shrink(model, {"conv": 3}, optimizer)
    assert not model.conv.u.requires_grad
    assert model.conv.u.shape == (5, 3)
    assert [p.shape for p in optimizer.param_groups[0]["params"] if p is model.conv.v] == [(3, 2, 3, 3)]


# ---------------------------------------------------------------- the optimiser


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_buffers_are_cut_to_their_leading_block(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        step_with(optimizer, model, random_gradients(model, seed))
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    lod.shrink(model, {"conv": 2, "head": 0}, optimizer)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state.keys() == before[name].keys()
        assert {key for key, value in state.items() if isinstance(value, Tensor) and value.dim()} == BUFFERS[kind]
        for key, value in state.items():
            whole = before[name][key]
            expected = whole[tuple(map(slice, parameter.shape))] if key in BUFFERS[kind] else whole
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)), (name, key)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}  # nothing of what is gone


@pytest.mark.parametrize("kind", OPTIMIZERS)
@settings(max_examples=8)
@given(ranks=RANKS, seed=st.integers(0, 99))
def test_the_next_steps_are_those_of_a_model_that_never_had_the_tail(
    kind: str, ranks: dict[str, int], seed: int
) -> None:
    shrunk, never = network(), lod.truncate(network(), ranks)
    optimizers = {id(m): OPTIMIZERS[kind](m.parameters()) for m in (shrunk, never)}
    for step in range(5):
        if step == 3:
            lod.shrink(shrunk, ranks, optimizers[id(shrunk)])
        gradients = random_gradients(network(), seed + step)
        for model in (shrunk, never):
            step_with(optimizers[id(model)], model, gradients)
    for name, tensor in shrunk.state_dict().items():
        assert torch.equal(tensor, never.state_dict()[name]), name


def test_param_groups_keep_their_members_order_and_settings() -> None:
    model = network()
    groups = [
        {"params": [model.conv.v, model.conv.u], "lr": 0.5, "weight_decay": 0.0},
        {"params": [model.head.u, model.head.bias, model.head.v], "lr": 0.25},
    ]
    optimizer = SGD(groups, lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    step_with(optimizer, model, random_gradients(model, 0))
    lod.shrink(model, {"conv": 2, "head": 1}, optimizer)
    members = [[model.conv.v, model.conv.u], [model.head.u, model.head.bias, model.head.v]]
    for group, expected in zip(optimizer.param_groups, members, strict=True):
        assert len(group["params"]) == len(expected)
        assert all(found is wanted for found, wanted in zip(group["params"], expected, strict=True))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    before = model.head.v.detach().clone()
    optimizer.state.clear()
    step_with(optimizer, model, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    torch.testing.assert_close(model.head.v.detach(), before - 0.125)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("wrong", [{"head": 5}, {"head": -1}, {"head": 1.0}, {"head": True}, {"haed": 1}, {"norm": 1}])
def test_nothing_is_cut_on_bad_input(wrong: dict[str, int]) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step_with(optimizer, model, random_gradients(model, 0))
    parameters, buffers = factors(model), {id(p): optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
    with pytest.raises(UserError):
        lod.shrink(model, {"conv": 2, **wrong}, optimizer)
    assert all(p is parameters[name] for name, p in factors(model).items())
    assert lod.max_ranks(model) == {"conv": 5, "head": 4}
    assert all(optimizer.state[p]["momentum_buffer"] is buffers[id(p)] for p in model.parameters())


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = network()
    with pytest.raises(UserError, match="does not hold"):
        lod.shrink(model, {"conv": 2}, SGD(network().parameters(), lr=0.1))
    assert lod.max_ranks(model) == {"conv": 5, "head": 4}


@pytest.mark.parametrize("missing", ["conv.v", "head.u", "head.v"])
def test_nothing_is_cut_if_the_optimizer_lacks_one_of_the_factors(missing: str) -> None:
    model = network()
    optimizer = SGD([p for name, p in model.named_parameters() if name != missing], lr=0.1)
    with pytest.raises(UserError, match="does not hold"):
        lod.shrink(model, {"conv": 2, "head": 2}, optimizer)
    assert lod.max_ranks(model) == {"conv": 5, "head": 4}
    model(IMAGES)  # factors that fit each other


# ---------------------------------------------------------------- kept_ranks


@settings(max_examples=60)
@given(
    scores=st.lists(st.floats(0, 2, width=32), max_size=9).map(lambda s: sorted(s, reverse=True)),
    threshold=st.floats(0, 2.5, width=32),
)
def test_kept_ranks_is_the_longest_prefix_at_or_above_the_threshold(scores: list[float], threshold: float) -> None:
    found = lod.kept_ranks({"a": torch.tensor(scores)}, threshold)["a"]
    assert type(found) is int
    assert all(score >= threshold for score in scores[:found])
    assert all(score < threshold for score in scores[found:])


def test_kept_ranks_of_golden_values() -> None:
    """The paper's and the release's threshold; equality keeps; 0 keeps even exact zeros."""
    scores = {"a": torch.tensor([1.0, 1e-5, 9e-6, 1e-7, 0.0], dtype=torch.float64), "b": torch.zeros(0)}
    assert lod.kept_ranks(scores, 1e-7) == {"a": 4, "b": 0}
    assert lod.kept_ranks(scores, 1e-5) == {"a": 2, "b": 0}
    assert lod.kept_ranks(scores, 0.0) == {"a": 5, "b": 0}
    assert lod.kept_ranks(scores, 2.0) == {"a": 0, "b": 0}
