r"""Mean of every entry over the devices whose submodel covers it.

For entry ``e``, contributors ``C_e`` and examples ``n_k``: ``new_e = Σ_{k∈C_e} n_k x_{k,e} / Σ_{k∈C_e} n_k``; entries
that nobody covered (or tensors that nobody sent, such as a frozen factor) keep their value, bit for bit. On LoD
factors, column ``j`` of U and row ``j`` of V are averaged over the devices of rank ≥ j (per-column mean, as RBLA and
PreLort, arXiv 2606.15963, do for LoRA); on dense models, leading channels (HeteroFL, arXiv 2010.01264; FjORD, arXiv
2102.13451).

Departure from HeteroFL: weights are example counts where HeteroFL has none, as in FjORD.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies.base import Aggregation, Partial, add_to_leading_block
from fedmaestro.submodel import State


def finish(partial: Partial[State], global_state: Mapping[str, Tensor]) -> State:
    """Divide the sum of each entry by the weight that covers it."""
    return {name: _mean(name, partial, old) for name, old in global_state.items()}


def _mean(name: str, partial: Partial[State], old: Tensor) -> Tensor:
    total = torch.zeros_like(old, dtype=torch.float64)
    weight = torch.zeros_like(total)
    for shapes, block in partial:
        if name in shapes:
            add_to_leading_block(total, block.sums[name], shapes[name])
            add_to_leading_block(weight, block.weight, shapes[name])
    return torch.where(weight > 0, (total / weight.clamp(min=1e-300)).to(old.dtype), old)


COVERAGE_MEAN: Aggregation[State] = Aggregation(
    name="coverage-mean",
    finish=finish,
    summary="each entry averaged over the devices that hold it, weighted by examples",
    source="HeteroFL (2010.01264), FjORD (2102.13451), RBLA/PreLort (2606.15963) for factor columns",
)
