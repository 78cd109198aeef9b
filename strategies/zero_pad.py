r"""Mean of zero-padded submodels over *all* devices of the round.

``new = Σ_k n_k pad(x_k) / Σ_k n_k``. Known pathology ("rank collapse", raFLoRA, arXiv 2602.13486): with weight share
``p_j`` of the devices that hold column ``j``, each factor's column shrinks to ``p_j`` of itself and the product's
singular value to ``p_j²``, in every round and even without training. It therefore fails the law that zero local steps
change nothing, and soon all tiers are one model. It is here as the baseline that heterogeneous LoRA papers use.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies.base import Aggregation, Partial, add_to_leading_block
from fedmaestro.submodel import State


def finish(partial: Partial[State], global_state: Mapping[str, Tensor]) -> State:
    """Divide the sum of padded tensors by the weight of all devices; no devices, no change."""
    return {name: _mean(name, partial, old) for name, old in global_state.items()}


def _mean(name: str, partial: Partial[State], old: Tensor) -> Tensor:
    total, weight = torch.zeros_like(old, dtype=torch.float64), 0.0
    for shapes, block in partial:
        if name in shapes:
            add_to_leading_block(total, block.sums[name], shapes[name])
            weight += block.weight
    return total.div_(weight).to(old.dtype) if weight else old.clone()


ZERO_PAD: Aggregation[State] = Aggregation(
    name="zero-pad",
    finish=finish,
    mixes=True,
    summary="submodels padded with zeros, averaged over all devices (shrinks the tail: rank collapse)",
    source="baseline of HetLoRA (2401.06432) and raFLoRA (2602.13486)",
)
