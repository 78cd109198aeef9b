"""Columns fade by the share of the devices that lack them."""

import pytest
import torch

from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.product_svd import PRODUCT_SVD
from fedmaestro.strategies.tail_decay import decay_tails
from fedmaestro.submodel import State, cut

O, I, R = 7, 5, 4  # noqa: E741 (shape letters)
DEVICES = {1: 50, 2: 30, 4: 20}  # rank: examples, so columns are held by 1, 0.5, 0.2 and 0.2 of the weight


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.linalg.qr(torch.randn(n, R, generator=generator, dtype=torch.float64))[0] for n in (O, I))
    root = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64).sqrt()
    factors = {"a.u": (p * root).float(), "a.v": (root[:, None] * q.T).float().reshape(R, I, 1, 1)}
    return factors | {"a.bias": torch.ones(O), "b.weight": torch.ones(3, 2)}


def partial_of(state: State, rule=COVERAGE_MEAN):  # type: ignore[no-untyped-def]
    partial = rule.init(state)
    for rank, examples in DEVICES.items():
        shapes = {"a.u": (O, rank), "a.v": (rank, I, 1, 1), "a.bias": (O,), "b.weight": (3, 2)}
        partial = rule.add(partial, cut(state, shapes), examples)
    return partial


def singular_values(state: State) -> torch.Tensor:
    return torch.linalg.svdvals(state["a.u"].double() @ state["a.v"].flatten(1).double())[:R]


def test_a_column_loses_what_its_devices_lack(state: State) -> None:
    new = decay_tails(state, partial_of(state), 0.25)
    factors = torch.tensor([1.0, 1 - 0.25 * 0.5, 1 - 0.25 * 0.8, 1 - 0.25 * 0.8], dtype=torch.float64)
    torch.testing.assert_close(singular_values(new), factors * singular_values(state), rtol=1e-5, atol=1e-6)
    gram = new["a.u"].T @ new["a.u"]
    torch.testing.assert_close(gram, new["a.v"].flatten(1) @ new["a.v"].flatten(1).T)  # still balanced
    assert all(torch.equal(new[name], state[name]) for name in ("a.bias", "b.weight"))
    assert torch.equal(new["a.u"][:, 0], state["a.u"][:, 0])
    assert {name: (x.shape, x.dtype) for name, x in new.items()} == {n: (x.shape, x.dtype) for n, x in state.items()}


def test_at_rate_1_it_is_the_collapse_of_product_svd(state: State) -> None:
    collapsed = PRODUCT_SVD.finish(partial_of(state, PRODUCT_SVD), state)
    new = decay_tails(state, partial_of(state), 1.0)
    torch.testing.assert_close(singular_values(new), singular_values(collapsed), rtol=1e-5, atol=1e-5)


def test_without_a_rate_or_devices_nothing_changes(state: State) -> None:
    for new in (decay_tails(state, partial_of(state), 0.0), decay_tails(state, COVERAGE_MEAN.init(state), 0.5)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in new.items())


def test_a_column_that_nobody_of_the_round_holds_loses_the_whole_rate(state: State) -> None:
    shapes = {"a.u": (O, 2), "a.v": (2, I, 1, 1), "a.bias": (O,), "b.weight": (3, 2)}
    new = decay_tails(state, COVERAGE_MEAN.add(COVERAGE_MEAN.init(state), cut(state, shapes), 5), 0.25)
    factors = torch.tensor([1.0, 1.0, 0.75, 0.75], dtype=torch.float64)
    torch.testing.assert_close(singular_values(new), factors * singular_values(state), rtol=1e-5, atol=1e-6)
