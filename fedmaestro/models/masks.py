"""Submodels of the weights that matter most: the entries of the largest magnitude, in tensors of the same shapes.

FIARSE (Wu et al., NeurIPS 2024): with ``θ`` the weights and ``τ`` the magnitude of the last one that
a device's share leaves it, the device's model has ``θ ⊙ M``, ``M = 1[|θ| ≥ τ]``, and trains ``θ`` by the gradient

    ``∂F/∂θ ≈ g ⊙ M ⊙ (1 + 2 τ |θ| / (|θ| + τ)²)``,   ``g = ∂F/∂(θ ⊙ M)``,

the second term being what the release puts in the place of the mask's derivative. ``τ`` stays for a round; an entry
that falls below it is masked from then on. Entries outside of the mask have no gradient, and stay as they are.

Departures: only weights (tensors of two or more dimensions) are masked, and biases are all kept, which start at zero
here; a device is sent zeros in the place of what its mask leaves out, so it cannot hold it.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fedmaestro.submodel import Shape, State


def maskable(shape: Shape | torch.Size) -> bool:
    """Return whether tensors of this shape are masked: weights are, biases and norms are not."""
    return len(shape) > 1


def kept_count(entries: int, share: Fraction) -> int:
    """Return how many of so many entries a share keeps: 1 at least."""
    return max(1, math.floor(share * entries))


def masked(state: Mapping[str, Tensor], share: Fraction) -> State:
    """Return ``state`` with zeros for all but ``share`` of the entries of its weights, those of the largest magnitude.

    One threshold for all weights; ties at it are kept. Other tensors, and all of them at share 1, are as they are.
    """
    weights = {name: x for name, x in state.items() if maskable(x.shape)}
    total = sum(x.numel() for x in weights.values())
    if not total or kept_count(total, share) == total:
        return dict(state)
    sizes = torch.cat([x.detach().abs().flatten() for x in weights.values()])
    threshold = sizes.topk(kept_count(total, share)).values[-1]
    return {name: torch.where(x.abs() >= threshold, x, 0.0) if name in weights else x for name, x in state.items()}


def threshold_of(state: Mapping[str, Tensor]) -> float:
    """Return ``τ`` of what a device was sent: the smallest magnitude of its weights that is not zero; 0 without any."""
    weights = [x.abs() for x in state.values() if maskable(x.shape)]
    return min((float(x[x > 0].min()) for x in weights if bool((x > 0).any())), default=0.0)


class _Kept(torch.autograd.Function):
    """``θ ⊙ 1[|θ| ≥ τ]`` with the gradient of the module's formula."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, threshold: float) -> Tensor:
        """Return the masked weights."""
        ctx.save_for_backward(weights)
        ctx.threshold = threshold
        return torch.where(weights.abs() >= threshold, weights, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the weights; the threshold has none."""
        (weights,), threshold = ctx.saved_tensors, ctx.threshold
        size = weights.abs()
        factor = 1 + 2 * threshold * size / (size + threshold).square().clamp(min=torch.finfo(size.dtype).tiny)
        return torch.where(size >= threshold, gradients[0] * factor, 0.0), None


def kept_weights(weights: Tensor, threshold: float) -> Tensor:
    """Return ``weights`` with zeros below ``threshold``, differentiable as the module says."""
    return _Kept.apply(weights, threshold)  # type: ignore[no-any-return,no-untyped-call]
