"""Zero-padding breaks the idle law by known factors (strategies.md, "Weighting bias")."""
# ruff: noqa: E741 (O, I, R, k, l are the shape letters)

import pytest
import torch

from fedmaestro.strategies.base import Partial
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.zero_pad import ZERO_PAD
from fedmaestro.submodel import State, cut

O, I, R = 7, 5, 4
# Rank and examples of each device; the weight shares p_j of the holders of column j are exact in binary.
DEVICES = ((1, 4), (2, 4), (4, 8))
SHARES = (1.0, 0.75, 0.5, 0.5)


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {"u": torch.randn(O, R, generator=generator), "v": torch.randn(R, I, generator=generator)}


def idle_round(aggregation: object, state: State) -> State:
    partial = aggregation.init(state)  # type: ignore[attr-defined]
    for rank, examples in DEVICES:
        partial = aggregation.add(partial, cut(state, {"u": (O, rank), "v": (rank, I)}), examples)  # type: ignore[attr-defined]
    return aggregation.finish(partial, state)  # type: ignore[attr-defined, no-any-return]


def test_an_idle_round_shrinks_every_column_to_its_share(state: State) -> None:
    new = idle_round(ZERO_PAD, state)
    share = torch.tensor(SHARES)
    assert torch.equal(new["u"], state["u"] * share)
    assert torch.equal(new["v"], share[:, None] * state["v"])


def test_an_idle_round_shrinks_the_products_terms_to_their_squared_share(state: State) -> None:
    new = idle_round(ZERO_PAD, state)
    for j, share in enumerate(SHARES):
        before = torch.outer(state["u"][:, j], state["v"][j]).double()
        after = torch.outer(new["u"][:, j].double(), new["v"][j].double())
        torch.testing.assert_close(after, share**2 * before, rtol=1e-6, atol=0)


def test_a_coverage_mean_does_not_shrink_anything(state: State) -> None:
    new = idle_round(COVERAGE_MEAN, state)
    assert torch.equal(new["u"], state["u"])
    assert torch.equal(new["v"], state["v"])


def test_what_nobody_holds_becomes_zero(state: State) -> None:
    new = ZERO_PAD.finish(ZERO_PAD.add(Partial(), cut(state, {"u": (O, 2), "v": (2, I)}), 3), state)
    assert torch.equal(new["u"][:, :2], state["u"][:, :2])
    assert not new["u"][:, 2:].any()
    assert not new["v"][2:].any()
