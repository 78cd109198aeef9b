"""Weights by the norm of the products."""

import pytest
import torch

from fedmaestro.strategies.hetlora import HETLORA, product_norm
from fedmaestro.submodel import State


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_norm_is_that_of_the_dense_products() -> None:
    state = {"a.u": normal((7, 3), 0), "a.v": normal((3, 5), 1), "a.bias": 100 * normal((7,), 2)}
    state |= {"b.u": normal((4, 2), 3), "b.v": normal((2, 3, 2, 2), 4)}
    dense = [(state[f"{x}.u"] @ state[f"{x}.v"].flatten(1)).double().square().sum() for x in "ab"]
    assert product_norm(state) == pytest.approx(float(sum(dense)) ** 0.5, rel=1e-6)


def test_a_model_without_pairs_takes_all_weights() -> None:
    assert product_norm({"a.weight": torch.tensor([[3.0, 0.0]]), "a.bias": torch.tensor([4.0])}) == pytest.approx(5.0)


def test_products_that_cancel_have_no_norm() -> None:
    """Rounding may leave the sum that is the square below zero, where a root would be NaN."""
    a, b, c = 61 / 7, 29 / 3, 70 / 11
    assert product_norm({"a.u": torch.tensor([[a, b]]), "a.v": torch.tensor([[c], [-a * c / b]])}) == pytest.approx(
        0, abs=1e-4
    )


def test_a_weight_does_not_depend_on_the_number_of_threads() -> None:
    """As it would: in the last bit of the sum over this tensor."""
    before, norms = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.add(product_norm({"weight": normal((700, 300), 0)}))
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


def test_devices_count_by_norm_and_not_by_examples() -> None:
    """``‖u v‖`` is 1 for the one and 3 for the other: means are 1/4 and 3/4, whatever their examples."""
    state: State = {"a.u": torch.zeros(2, 1), "a.v": torch.zeros(1, 1)}
    partial = HETLORA.init(state)
    for (u, v), examples in zip((([1.0, 0.0], 1.0), ([0.0, 1.0], 3.0)), (900, 1), strict=True):
        partial = HETLORA.add(partial, {"a.u": torch.tensor([u]).T, "a.v": torch.tensor([[v]])}, examples)
    new = HETLORA.finish(partial, state)
    assert new["a.u"].flatten().tolist() == [0.25, 0.75]
    assert new["a.v"].item() == 0.25 * 1 + 0.75 * 3
