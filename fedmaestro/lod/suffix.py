"""What orders the columns of a LoD layer: norms of the suffixes ``U[:, b:]`` and ``V[b:]``.

Shapes: ``U (O, R)``, ``V (R, I…)``, ``b = 0 … R-1``. Source: Maestro (ICML 2024), section 3.3: the hierarchical group
lasso and the importance that progressive shrinking reads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmaestro.lod.layers import LoDLayer, layers

Tail = tuple[float, float]
"""``‖U[:, r:]‖²`` and ``‖V[r:]‖²`` of the columns that a prefix of rank ``r`` lacks."""

NO_TAIL: Tail = (0.0, 0.0)


def group_lasso(model: nn.Module, tails: Mapping[str, Tail] | None = None) -> Tensor:
    """Return the hierarchical group lasso ``Σ_layers Σ_b (‖U[:, b:]‖_F + ‖V[b:]‖_F)``, a scalar.

    It covers all columns that the layers hold, whatever prefix they run at, and is not normalised by size. The
    gradient of a norm at exact zero is taken as zero (a subgradient); the formula's own is NaN. Without LoD layers the
    penalty is zero.

    Args:
        model: holds LoD layers, or prefixes of them.
        tails: by layer, what a prefix lacks, as constants: its columns then get the gradient that they have in the
            larger model. Without it, the last columns of a prefix are pulled as if nothing came behind them.
    """
    tails = tails or {}
    terms = [
        norms.sum() for name, layer in layers(model).items() for norms in suffix_norms(layer, tails.get(name, NO_TAIL))
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def importance(model: nn.Module) -> dict[str, Tensor]:
    """Return ``‖U[:, b:]‖_F · ‖V[b:]‖_F`` for every ``b`` of every LoD layer: ``(R,)``, non-increasing."""
    return {name: factor_importance(layer.u, layer.v) for name, layer in layers(model).items()}


@torch.no_grad()
def column_strengths(model: nn.Module) -> dict[str, Tensor]:
    """Return ``‖u_b‖ · ‖v_b‖`` of every column: ``(R,)``, the Frobenius norm of its rank-one term.

    For balanced SVD factors these are the singular values.
    """
    return {name: factor_strengths(layer.u, layer.v) for name, layer in layers(model).items()}


def factor_importance(u: Tensor, v: Tensor) -> Tensor:
    """Return the importance of the columns of ``u (O, R)``, ``v (R, I…)``: ``(R,)``."""
    return _suffix_norms(_squares(u, 1)) * _suffix_norms(_squares(v, 0))


def factor_strengths(u: Tensor, v: Tensor) -> Tensor:
    """Return the strengths of the columns of ``u (O, R)``, ``v (R, I…)``: ``(R,)``."""
    return (_squares(u, 1) * _squares(v, 0)).sqrt()


def tail_of(u: Tensor, v: Tensor, rank: int) -> Tail:
    """Return what the prefix ``rank`` of ``u (O, R)``, ``v (R, I…)`` lacks."""
    return float(u[:, rank:].square().sum()), float(v[rank:].square().sum())


def suffix_norms(layer: LoDLayer, tail: Tail = NO_TAIL) -> tuple[Tensor, Tensor]:
    """Return ``‖U[:, b:]‖_F`` and ``‖V[b:]‖_F``, ``tail`` included, each ``(R,)`` and non-increasing."""
    return _suffix_norms(_squares(layer.u, 1), tail[0]), _suffix_norms(_squares(layer.v, 0), tail[1])


def _squares(factor: Tensor, dim: int) -> Tensor:
    """Return the squared norm of each slice along ``dim``."""
    return factor.square().sum([i for i in range(factor.dim()) if i != dim])


def _suffix_norms(squares: Tensor, tail: float = 0.0) -> Tensor:
    sums = squares.flip(0).cumsum(0).flip(0)
    if tail:
        sums = sums + tail
    positive = sums > 0
    return torch.where(positive, sums.where(positive, 1.0).sqrt(), 0.0)
