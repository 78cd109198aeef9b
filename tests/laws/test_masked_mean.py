"""Rows count the devices that changed them."""

import math

import pytest
import torch

from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.masked_mean import MASKED_MEAN, changed_rows
from fedmaestro.strategies.server_optimizers import SERVER_OPTIMIZERS
from fedmaestro.submodel import State, cut


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = {"head.weight": (3, 4), "head.bias": (3,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def with_row(state: State, row: int, value: float) -> State:
    new = {name: tensor.clone() for name, tensor in state.items()}
    new["head.weight"][row] = value
    new["head.bias"][row] = value
    return new


def test_a_class_is_averaged_over_the_devices_that_have_it(state: State) -> None:
    """Two devices have class 0, one has class 1 and nobody has class 2."""
    partial = MASKED_MEAN.init(state)
    for (row, value), examples in {(0, 1.0): 10, (0, 4.0): 20, (1, 7.0): 70}.items():
        partial = MASKED_MEAN.add(partial, with_row(state, row, value), examples, start=state)
    new = MASKED_MEAN.finish(partial, state)
    for name in ("head.weight", "head.bias"):
        assert new[name][0].unique().tolist() == [3.0]
        assert new[name][1].unique().tolist() == [7.0]
        assert torch.equal(new[name][2], state[name][2])
    assert torch.equal(new["scale"], state["scale"])


def test_without_a_start_it_is_the_coverage_mean(state: State) -> None:
    devices = [{name: tensor + k for name, tensor in state.items()} for k in range(3)]
    devices.append(cut(devices[0], {"head.weight": (2, 3), "head.bias": (2,), "scale": ()}))
    results = []
    for agg in (MASKED_MEAN, COVERAGE_MEAN):
        partial = agg.init(state)
        for k, device in enumerate(devices):
            partial = agg.add(partial, device, 1 + k)
        results.append(agg.finish(partial, state))
    assert all(torch.equal(results[0][name], results[1][name]) for name in state)


def test_bits_are_compared() -> None:
    start = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [2.0, 3.0], [4.0, 5.0]])
    after = torch.tensor([[-0.0, 1.0], [math.nan, 1.0], [2.0, 3.0], [4.0, math.nextafter(5.0, 9.0)]])
    assert changed_rows(after, start).tolist() == [True, False, False, False]  # the last step is below float32
    after[3, 1] = torch.nextafter(start[3, 1], torch.tensor(9.0))
    assert changed_rows(after, start).tolist() == [True, False, False, True]
    assert changed_rows(after, None).tolist() == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_rows_of_any_type_and_dimension(dtype: torch.dtype) -> None:
    for shape in ((), (3,), (3, 2), (3, 2, 2, 1)):
        whole = torch.ones(5, *shape[1:]).to(dtype) if shape else torch.ones(()).to(dtype)
        start = whole[:3] if shape else whole
        after = start.clone()
        assert not changed_rows(after, start).any()
        after[(1, *(0 for _ in shape[1:])) if shape else ()] = 2
        assert changed_rows(after, start).tolist() == ([False, True, False] if shape else True)
        # A view with gaps, as submodels are.
        if len(shape) > 1:
            assert changed_rows(after[:, :1], start[:, :1]).tolist() == [False, True, False]


def test_a_row_that_no_device_changed_keeps_its_value_under_server_momentum(state: State) -> None:
    """Its holders do not count as contributors: its momentum of earlier rounds would move it otherwise."""
    memory = {"momentum": {name: torch.ones_like(tensor) for name, tensor in state.items()}}
    partial = MASKED_MEAN.add(MASKED_MEAN.init(state), with_row(state, 1, 2.0), 30, start=state)
    devices = MASKED_MEAN.contributors(partial, state)
    new, _ = SERVER_OPTIMIZERS["momentum"].step(state, MASKED_MEAN.finish(partial, state), memory, devices)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(new[name][[0, 2]], state[name][[0, 2]])
        assert not torch.equal(new[name][1], state[name][1])
    assert torch.equal(new["scale"], state["scale"])
