"""Energy beyond rank 2 after ten rounds without training, as in strategies.md ("Weighting bias").

Five devices of equal weight have ranks 2, 4, 8, 16 and 16, so column ``j`` is held by the share
``p_j = 1 (j ≤ 2), 4/5 (j ≤ 4), 3/5 (j ≤ 8), 2/5 (j ≤ 16)``. With balanced factors ``√σ_j`` on each side, a round of
zero-padding gives ``σ_j ← p_j² σ_j``, hence after ten rounds energies ``p_j^40 σ_j²``.

The note says 63.6 % at the start and does not say of which spectrum. It is not a flat one (14/16 = 87.5 %); a power law
``σ_j = j^-0.4`` has ``1 - (1 + 2^-0.8) / Σ_{j≤16} j^-0.8 = 63.57 %`` and is used here. Then::

    p = [1, 1] + [.8] * 2 + [.6] * 4 + [.4] * 8
    e = [p[j - 1] ** 40 * j ** -0.8 for j in range(1, 17)]
    sum(e[2:]) / sum(e)  # 6.3e-05: the note's 0.01 %
"""
# ruff: noqa: E741 (O, I, R, k, l are the shape letters)

import pytest
import torch
from torch import Tensor

from fedmaestro.strategies import STRATEGIES
from fedmaestro.submodel import State, cut

O, I, R = 24, 19, 16
RANKS = (2, 4, 8, 16, 16)


def initial_state() -> State:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.linalg.qr(torch.randn(n, R, generator=generator, dtype=torch.float64))[0] for n in (O, I))
    root = torch.arange(1, R + 1).double().pow(-0.2)  # √σ
    return {"u": (p * root).float(), "v": (root[:, None] * q.T).float()}


def energy_beyond_rank_2(state: State) -> float:
    product: Tensor = state["u"].double() @ state["v"].double()
    energy = torch.linalg.svdvals(product).square()
    return float(energy[2:].sum() / energy.sum())


def idle_rounds(strategy: str, state: State, rounds: int = 10) -> State:
    aggregation = STRATEGIES[strategy].aggregation
    for _ in range(rounds):
        partial = aggregation.init(state)
        for rank in RANKS:
            partial = aggregation.add(partial, cut(state, {"u": (O, rank), "v": (rank, I)}), 50)
        state = aggregation.finish(partial, state)
    return state


def test_the_spectrum_starts_with_63_6_percent_beyond_rank_2() -> None:
    assert energy_beyond_rank_2(initial_state()) == pytest.approx(0.6357, abs=5e-5)


def test_zero_padding_collapses_to_the_smallest_rank() -> None:
    after = energy_beyond_rank_2(idle_rounds("zero-pad", initial_state()))
    assert after == pytest.approx(6.291e-5, rel=1e-3)
    assert f"{after:.2%}" == "0.01%"


def test_the_nested_mean_keeps_the_spectrum() -> None:
    state = initial_state()
    after = idle_rounds("nested", state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert energy_beyond_rank_2(after) == pytest.approx(0.6357, abs=5e-5)
