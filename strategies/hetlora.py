r"""Zero-padding with weights by the size of the devices' products.

``new = Σ_k s_k pad(x_k) / Σ_k s_k`` with ``s_k = (Σ_layers ‖U_k V_k‖²_F)^½`` in place of example counts; a model
without factor pairs takes the norm of all its weights.

Source: HetLoRA's sparsity-weighted aggregation (arXiv 2401.06432). Departures: self-pruning, its penalty on
the device's own tail, is no part of this rule; U and V are the whole weight here, theirs an update of a frozen weight
that starts at zero, so their norms say more about training than these do.

Known pathologies: those of ``zero_pad``, softened. Devices of low rank have smaller products, so the holders' share
``p_j`` of a tail column is somewhat larger, but it stays below one and column j still shrinks to ``p_j²`` of itself per
round without any training. Devices with many examples count no more than others. Norms are not invariant to the scale
of a layer, which a norm layer after it undoes.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from fedmaestro.strategies import zero_pad
from fedmaestro.strategies.base import Aggregation, factor_layers
from fedmaestro.strategies.spectral import squared_norm
from fedmaestro.submodel import State
from fedmaestro.threads import one_thread


def product_norm(submodel: Mapping[str, Tensor], examples: float = 0.0) -> float:  # noqa: ARG001
    """Return ``(Σ_layers ‖U V‖²_F)^½`` over all factor pairs, or the norm of all tensors where there is none."""
    layers = factor_layers(submodel)
    with one_thread():  # a weight must not depend on the number of cores
        if not layers:
            return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in submodel.values()))
        return math.sqrt(sum(squared_norm(submodel[f"{x}.u"], submodel[f"{x}.v"]) for x in layers))


HETLORA: Aggregation[State] = Aggregation(
    name="hetlora",
    finish=zero_pad.finish,
    weigh=product_norm,
    mixes=True,
    summary="submodels padded with zeros, averaged over all devices by the norm of their products (rank collapse)",
    source="HetLoRA (2401.06432) without self-pruning",
)
