"""The coverage mean entry by entry, and partial results of several sizes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.strategies.base import Partial, add_to_leading_block
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.submodel import Shapes, State, shapes_of, signature

O1, I1, R1 = 5, 4, 4
O2, I2, R2 = 3, 7, 3


def shapes(r1: int, r2: int, width: int) -> Shapes:
    """Two LoD layers with ranks of their own and a dense layer of some width."""
    return {
        "a.u": (O1, r1),
        "a.v": (r1, I1),
        "b.u": (O2, r2),
        "b.v": (r2, I2, 2, 1),
        "c.weight": (width + 1, 2 * width),
        "scale": (),
    }


FULL = shapes(R1, R2, 3)


def state_of(shapes: Shapes, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def entry_by_entry(global_state: State, submodels: list[State], weights: list[int]) -> dict[str, np.ndarray]:
    """``Σ_{k∈C_e} n_k x_{k,e} / Σ_{k∈C_e} n_k`` in plain Python; the old value where ``C_e`` is empty."""
    result = {}
    for name, old in global_state.items():
        new = old.numpy().astype(np.float64)
        for index in itertools.product(*map(range, old.shape)):
            holders = [
                (n, float(s[name][index]))
                for n, s in zip(weights, submodels, strict=True)
                if all(i < length for i, length in zip(index, s[name].shape, strict=True))
            ]
            if holders:
                new[index] = sum(n * x for n, x in holders) / sum(n for n, _ in holders)
        result[name] = new
    return result


DEVICES = st.lists(
    st.tuples(st.integers(0, R1), st.integers(0, R2), st.integers(1, 3), st.integers(1, 900)), max_size=5
)


@settings(max_examples=30)
@given(devices=DEVICES, seed=st.integers(0, 99))
def test_every_entry_is_the_mean_over_its_holders(devices: list[tuple[int, int, int, int]], seed: int) -> None:
    state = state_of(FULL, seed)
    submodels = [state_of(shapes(*sizes), 100 + seed + k) for k, (*sizes, _) in enumerate(devices)]
    weights = [n for *_, n in devices]
    partial = COVERAGE_MEAN.init(state)
    for submodel, weight in zip(submodels, weights, strict=True):
        partial = COVERAGE_MEAN.add(partial, submodel, weight)
    expected = entry_by_entry(state, submodels, weights)
    for name, tensor in COVERAGE_MEAN.finish(partial, state).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_sizes_are_kept_apart_until_the_end() -> None:
    """A partial result has one block per size, whatever the number of devices."""
    small, large = state_of(shapes(1, 2, 1), 1), state_of(FULL, 2)
    left = COVERAGE_MEAN.add(COVERAGE_MEAN.add(Partial(), small, 2), small, 3)
    right = COVERAGE_MEAN.add(COVERAGE_MEAN.add(Partial(), large, 4), small, 5)
    merged = COVERAGE_MEAN.merge(left, right)
    assert {key: block.weight for key, block in merged.blocks.items()} == {
        signature(shapes_of(small)): 10.0,
        signature(shapes_of(large)): 4.0,
    }
    torch.testing.assert_close(merged.blocks[signature(shapes_of(small))].sums["a.u"], 10.0 * small["a.u"].double())
    torch.testing.assert_close(merged.blocks[signature(shapes_of(large))].sums["a.u"], 4.0 * large["a.u"].double())


def test_a_device_without_examples_covers_nothing() -> None:
    state = state_of(FULL, 0)
    new = COVERAGE_MEAN.finish(COVERAGE_MEAN.add(Partial(), state_of(FULL, 1), 0), state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in new.items())


def test_integer_weights_keep_equal_tensors_bit_for_bit() -> None:
    """``n·x`` is exact in float64 and so is the division by ``Σ n``: idle devices give the state back."""
    state = state_of(FULL, 3)
    partial = COVERAGE_MEAN.init(state)
    for weight in (1, 7, 333, 60_000, 999_983):
        partial = COVERAGE_MEAN.add(partial, state, weight)
    assert all(torch.equal(tensor, state[name]) for name, tensor in COVERAGE_MEAN.finish(partial, state).items())


def test_adding_to_a_leading_block_leaves_the_rest() -> None:
    total = torch.zeros(3, 4, dtype=torch.float64)
    add_to_leading_block(total, torch.ones(2, 1), (2, 1))
    add_to_leading_block(total, 2.5, (1, 3))
    assert total.tolist() == [[3.5, 2.5, 2.5, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="does not lead"):
        add_to_leading_block(total, 1.0, (4, 1))
