"""What the SVD after a mean keeps and changes."""

import torch

from fedmaestro.strategies.base import Partial
from fedmaestro.strategies.reordered import REORDERED, reorder
from fedmaestro.submodel import State, cut


def random_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.u": (7, 4), "a.v": (4, 5), "a.bias": (7,), "b.u": (3, 3), "b.v": (3, 2, 2, 1), "c.weight": (2, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def products(state: State) -> dict[str, torch.Tensor]:
    return {x: state[f"{x}.u"].double() @ state[f"{x}.v"].flatten(1).double() for x in "ab"}


def test_a_state_keeps_its_function_and_a_second_time_is_rounding() -> None:
    state = random_state()
    once = reorder(state)
    twice = reorder(once)
    for x, matrix in products(state).items():
        torch.testing.assert_close(products(once)[x], matrix, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(once[f"{x}.u"], state[f"{x}.u"], rtol=1e-2)
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, twice[name], rtol=1e-5, atol=1e-5)
        assert tensor.data_ptr() != state[name].data_ptr()
        if "." not in name or name.split(".")[1] not in "uv":
            assert torch.equal(tensor, state[name])


def test_the_aggregation_is_the_mean_and_then_that() -> None:
    """One device that holds all of it: the mean is its state."""
    state, device = random_state(0), random_state(1)
    new = REORDERED.finish(REORDERED.add(Partial(), device, 5), state)
    assert all(torch.equal(tensor, reorder(device)[name]) for name, tensor in new.items())


def test_a_pair_with_one_frozen_factor_is_ordered_too() -> None:
    state, device = random_state(0), random_state(1)
    sent = {name: tensor for name, tensor in device.items() if not name.endswith(".v") and name != "b.u"}
    new = REORDERED.finish(REORDERED.add(Partial(), sent, 5), state)
    torch.testing.assert_close(products(new)["a"], device["a.u"].double() @ state["a.v"].double(), rtol=1e-5, atol=1e-5)
    gram = new["a.u"].double().T @ new["a.u"].double()
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-5)
    assert torch.equal(new["b.u"], state["b.u"])
    assert torch.equal(new["b.v"], state["b.v"])


def test_devices_without_examples_change_nothing() -> None:
    state = random_state(0)
    small = cut(random_state(1), {"a.u": (7, 2), "a.v": (2, 5)})
    new = REORDERED.finish(REORDERED.add(Partial(), small, 0), state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in new.items())
