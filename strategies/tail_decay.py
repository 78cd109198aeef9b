r"""Decay of the factor columns that few devices hold: what is not trained again fades.

With ``p_j`` the weight share of a round's devices that hold column ``j`` and ``ε`` the rate, every round ends with
``σ_j ← (1 - ε (1 - p_j)) σ_j``: both factors' columns are scaled by its root. ``ε = 0`` changes nothing, ``ε = 1`` is
the rank collapse of ``product_svd``. In between, a tail lives as long as its holders train it faster than it fades.

Why: where few devices hold the tail of a factor pair and their labels are skewed, it lags behind the columns before it,
which everybody moves on, and costs the large tiers more than it gives them (experiments/older.md, comparison (b)). The
rules that collapse are good there because they collapse. Source: FedMaestro; the shares are those of raFLoRA (arXiv
2602.13486), which names the collapse.

It breaks the law that idle rounds keep every tier's function, as weight decay does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies.base import AnyPartial, factor_layers, scaled_columns
from fedmaestro.strategies.server_step import Memory, Round, ServerStep, StepRow
from fedmaestro.submodel import State


def decay_tails(state: Mapping[str, Tensor], partial: AnyPartial, rate: float) -> State:
    """Return ``state`` with the columns of every factor pair faded by their devices' share of the round.

    Args:
        state: after the server's step; a layer that no device of the round sent is kept.
        partial: the round's, of devices that train both factors. Without weight, nothing fades.
        rate: ε, from 0 to 1.
    """
    new = dict(state)
    total = partial.weight
    if not (rate and total):
        return new
    for layer in factor_layers(state):
        u = f"{layer}.u"
        share = torch.zeros(state[u].shape[1], dtype=torch.float64)
        sizes = [(shapes[u][1], block.weight) for shapes, block in partial if u in shapes]
        for rank, weight in sizes:
            share[:rank] += weight / total
        if sizes:
            new |= scaled_columns(state, layer, (1 - rate * (1 - share.clamp(max=1))).sqrt())
    return new


def tail_decay(rate: float) -> ServerStep:
    """Return the step that fades columns at ``rate`` ε; 0: it does nothing."""

    def apply(state: State, memory: Memory, server_round: Round) -> tuple[State, Memory]:
        return decay_tails(state, server_round.partial, rate), memory

    return ServerStep(name="tail-decay", apply=apply)


TAIL_DECAY = StepRow(
    name="tail-decay",
    make=tail_decay,
    settings={"rate": "server.tail-decay"},
    summary="factor columns fade by the share of the round's devices that do not hold them",
    source="FedMaestro; the shares of raFLoRA (2602.13486)",
)
