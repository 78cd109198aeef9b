r"""Coverage mean, then every factor pair ordered anew by the SVD of its product.

``Ū, V̄`` are the coverage mean; ``Ū V̄ = P Σ Qᵀ``, ``new U = P √Σ``, ``new V = √Σ Qᵀ``, columns descending. The full-rank
function is that of the coverage mean, but now every prefix is the best approximation of its rank (Eckart and Young), so
a small tier is served the most that its rank can hold. The best rule of our pilot: 1 to 4 points more for small tiers.

Source: the re-ordering is the truncated SVD of FlexLoRA and FedHM (arXiv 2111.14655), here of a mean without their bias
(``product_svd``) and without a loss of rank.

Known pathologies: columns are mixed across tier edges, so a round changes the function of every tier but the largest,
also without training (it can overwrite what small tiers hold where their best prefix is not the model's); factor
columns that nobody covered move too; moments of factors would belong to another basis (``Aggregation.rebases``); like
the mean it starts from, it depends on the basis in which devices send their factors.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from fedmaestro.strategies import coverage_mean
from fedmaestro.strategies.base import Aggregation, Partial, factor_layers
from fedmaestro.strategies.server_step import Memory, Round, ServerStep, StepRow
from fedmaestro.strategies.spectral import refactored
from fedmaestro.submodel import State


def finish(partial: Partial[State], global_state: Mapping[str, Tensor]) -> State:
    """Return the coverage mean with the pairs of which devices sent a factor re-ordered; the others keep their bits."""
    mean = coverage_mean.finish(partial, global_state)
    sent = {name for shapes, block in partial if block.weight > 0 for name in shapes}
    return mean | _ordered(mean, [x for x in factor_layers(mean) if not sent.isdisjoint((f"{x}.u", f"{x}.v"))])


def reorder(state: Mapping[str, Tensor]) -> State:
    """Return the same function with all pairs ordered and balanced, in new tensors; a second time is only rounding."""
    return {name: tensor.clone() for name, tensor in state.items()} | _ordered(state, factor_layers(state))


def _ordered(state: Mapping[str, Tensor], layers: Iterable[str]) -> State:
    new: State = {}
    for layer in layers:
        new |= refactored(state, layer, state[f"{layer}.u"].double(), state[f"{layer}.v"].double())
    return new


REORDERED: Aggregation[State] = Aggregation(
    name="reordered",
    finish=finish,
    mixes=True,
    rebases=True,
    summary="each entry averaged over the devices that hold it, then factor columns ordered by singular value",
    source="coverage mean, and the SVD of FlexLoRA/FedHM (2111.14655) without truncation",
)


def reorder_every(every: int | Literal["never"]) -> ServerStep:
    """Return the step that re-orders all pairs after each round whose number ``every`` divides."""

    def due(number: int) -> bool:
        return every != "never" and number % every == 0

    def apply(state: State, memory: Memory, server_round: Round) -> tuple[State, Memory]:
        return (reorder(state) if due(server_round.number) else state), memory

    return ServerStep(name="reorder", apply=apply, rebases=due)


REORDER = StepRow(
    name="reorder",
    make=reorder_every,
    settings={"every": "server.reorder-every"},
    summary="all factor columns ordered by singular value",
    source="FedMaestro's pilot; the SVD of FlexLoRA/FedHM (2111.14655)",
)
