"""Server optimisers on products: they mean the same in every basis of the factors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.rounds.method import method_of
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.product_space import holders, product, with_products
from fedmaestro.strategies.server_optimizers import optimize
from fedmaestro.strategies.server_step import Memory, Round
from fedmaestro.submodel import State, cut

SEEDS = st.integers(0, 2**31)
SHAPES = {"a.u": (4, 4), "a.v": (4, 3, 2, 2), "a.bias": (4,), "head.weight": (2, 4)}
"""A pair of full rank: nothing of a step is cut off."""


def random_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def round_of(before: State, after: State, number: int = 1) -> Round:
    """A round of one device that holds everything and ends at ``after``."""
    partial = COVERAGE_MEAN.add(COVERAGE_MEAN.init(before), after, 3)
    return Round(number=number, before=before, partial=partial, aggregation=COVERAGE_MEAN)


def step(name: str, before: State, after: State, memory: Memory, space: Any = "product") -> tuple[State, Memory]:
    return optimize(name, None, 0.5, 0.0, space).apply(after, memory, round_of(before, after))


def rotated(state: State, seed: int) -> State:
    """The same function in another basis of the pair."""
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3 * torch.eye(4)
    return state | {
        "a.u": state["a.u"] @ g,
        "a.v": torch.linalg.solve(g, state["a.v"].flatten(1)).reshape(state["a.v"].shape),
    }


def close(left: State, right: State) -> None:
    for name, tensor in with_products(left).items():
        torch.testing.assert_close(tensor, with_products(right)[name])


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
@settings(max_examples=20)
@given(seed=SEEDS)
def test_the_basis_makes_no_difference(name: str, seed: int) -> None:
    before, after = random_state(seed), random_state(seed + 1)
    one, memory = step(name, before, after, {})
    other, same = step(name, rotated(before, seed + 2), rotated(after, seed + 3), {})
    close(one, other)
    again, _ = step(name, one, random_state(seed + 4), memory)
    rebased, _ = step(name, rotated(other, seed + 5), rotated(random_state(seed + 4), seed + 6), same)
    close(again, rebased)


@settings(max_examples=20)
@given(seed=SEEDS)
def test_momentum_is_that_of_sgd_on_products(seed: int) -> None:
    state, memory = random_state(seed), dict[str, State]()
    weights = {name: torch.nn.Parameter(x.clone()) for name, x in with_products(state).items()}
    sgd = torch.optim.SGD(weights.values(), lr=1.0, momentum=0.5)
    for number in range(3):
        after = random_state(seed + number + 1)
        for name, x in with_products(after).items():
            weights[name].grad = with_products(state)[name] - x
        sgd.step()
        state, memory = step("momentum", state, after, memory)  # type: ignore[assignment]
        for name, x in with_products(state).items():
            torch.testing.assert_close(x, weights[name].detach())


def test_pairs_come_out_balanced_and_ordered() -> None:
    state, _ = step("momentum", random_state(0), random_state(1), {})
    gram = state["a.u"].T @ state["a.u"]
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()))
    torch.testing.assert_close(gram, state["a.v"].flatten(1) @ state["a.v"].flatten(1).T)
    assert bool((gram.diagonal().diff() <= 0).all())


def test_dense_tensors_take_the_step_of_their_own_space() -> None:
    before, after = random_state(0), random_state(1)
    product_step, memory = step("adam", before, after, {})
    factor_step, _ = step("adam", before, after, {}, space="factors")
    for name in ("a.bias", "head.weight"):
        assert torch.equal(product_step[name], factor_step[name])
    assert memory["momentum"]["a.uv"].shape == (4, 3, 2, 2)


def test_what_nobody_held_keeps_its_bits() -> None:
    before, after = random_state(0), random_state(1)
    sent = {name: after[name] for name in ("a.bias", "head.weight")}
    partial = COVERAGE_MEAN.add(COVERAGE_MEAN.init(before), sent, 3)
    this = Round(number=1, before=before, partial=partial, aggregation=COVERAGE_MEAN)
    state, _ = optimize("momentum", None, 0.5, 0.0, "product").apply(before | sent, {}, this)
    assert torch.equal(state["a.u"], before["a.u"])
    assert torch.equal(state["a.v"], before["a.v"])


def test_an_entry_of_a_product_has_the_devices_that_hold_its_row_and_its_column() -> None:
    """Two devices: one of 3 rows, 2 inputs and rank 1, one of everything; entry by entry by hand."""
    whole = random_state(0)
    small = cut(whole, {"a.u": (3, 1), "a.v": (1, 2, 2, 2)})
    partial = COVERAGE_MEAN.add(COVERAGE_MEAN.add(COVERAGE_MEAN.init(whole), small, 1), whole, 1)
    held = holders(COVERAGE_MEAN.contributors(partial, whole), whole)["a.uv"]
    expected = torch.ones(4, 3, 2, 2)
    expected[:3, :2] = 2
    assert torch.equal(held, expected)


def test_a_product_is_that_of_flattened_factors() -> None:
    state = random_state(0)
    expected = torch.einsum("or,rihw->oihw", state["a.u"], state["a.v"])
    torch.testing.assert_close(product(state["a.u"], state["a.v"]), expected)


@pytest.mark.parametrize(
    ("row", "space"),
    [
        ("reordered", "product"),
        ("partitioned-product", "product"),
        ("block-product", "product"),
        ("product-svd", "product"),
        ("nested", "factors"),
        ("fjord", "factors"),
    ],
)
def test_rules_that_re_order_get_moments_of_products(row: str, space: str) -> None:
    asked = {"train.strategy": row, "server.optimizer": "momentum"}
    assert method_of(load_config(None, asked)).settings["server.space"] == space
    if space == "product":
        with pytest.raises(UserError, match=r"server\.space=factors: .* gives them another basis"):
            method_of(load_config(None, {**asked, "server.space": "factors"}))
