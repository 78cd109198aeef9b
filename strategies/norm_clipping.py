r"""Coverage mean of updates that are clipped to the round's median length.

For device ``k`` with update ``Δ_k = x_k − x₀`` of ``n_k`` numbers and ``s_k = ‖Δ_k‖ / √n_k``, the update counts as
``Δ_k · min(1, median(s) / s_k)``; then every entry is averaged over its holders, weighted by examples.

An attacker who scales an update gains nothing by it; one whose updates are as long as others' is not stopped: this
bounds the damage, it does not tell who does it.

Source: Sun et al., arXiv 1911.07963 (norm thresholding), with the median as the threshold. Departure: lengths are root
mean squares, so that submodels of all sizes compare; devices of large tiers, whose tail columns move less, are
clipped less often than those of small ones.

Cost: the memory of all submodels of a round, because the median is known at its end only.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies import coverage_mean
from fedmaestro.strategies.base import Aggregation, Block, Partial
from fedmaestro.strategies.each_device import EACH_DEVICE, Devices, with_examples
from fedmaestro.submodel import State, cut, num_elements, signature


def finish(partial: Partial[Devices], global_state: Mapping[str, Tensor]) -> State:
    """Return the coverage mean of the clipped updates."""
    sizes = []
    for shapes, sums in with_examples(partial):
        start = {name: tensor.double() for name, tensor in cut(global_state, shapes).items()}
        updates = {name: tensor.double() - start[name] for name, tensor in sums.states.items()}
        lengths = torch.stack([x.reshape(len(x), -1).norm(dim=1) for x in updates.values()]).norm(dim=0)
        sizes.append((shapes, sums, start, updates, lengths / max(1, num_elements(shapes)) ** 0.5))
    if not sizes:
        return {name: tensor.clone() for name, tensor in global_state.items()}
    threshold = torch.cat([lengths for *_, lengths in sizes]).quantile(0.5)
    blocks = {}
    for shapes, sums, start, updates, lengths in sizes:
        factors = torch.where(lengths > threshold, threshold / lengths, 1.0)
        total = {
            name: torch.einsum("n,n...->...", sums.weights, start[name] + _column(factors, x) * x)
            for name, x in updates.items()
        }
        blocks[signature(shapes)] = Block(total, float(sums.weights.sum()), len(sums.weights))
    return coverage_mean.finish(Partial(blocks, partial.sizes), global_state)


def _column(factors: Tensor, like: Tensor) -> Tensor:
    return factors.reshape(-1, *(1,) * (like.dim() - 1))


NORM_CLIPPING = Aggregation(
    name="norm-clipping",
    finish=finish,
    reduction=EACH_DEVICE,
    summary="robust: updates clipped to the round's median length, then each entry averaged over its holders",
    source="Sun et al. (1911.07963)",
)
