"""Setup B: an autoencoder with ordered sampling and group lasso keeps as many columns as its data have dimensions.

Three points in ten dimensions, mapped to themselves: principal component analysis has error zero at rank 3. The loss is
the mean-squared error at the full and at the sampled rank plus the hierarchical group lasso. Source: Maestro (ICML
2024), section 4 on linear maps.
"""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from linear_maps import Matrix, as_tensor, default_layer, sampled_loss, train
from torch import Tensor

from fedmaestro import lod, rng
from fedmaestro.lod import sampling

POINTS, DIMENSIONS = 3, 10
LR, STEPS, LASSO = 0.1, 2500, 1e-2
THRESHOLD = 1e-3
"""Between what is kept (importance near 1) and the floor of the lasso, ``(7 · LR · LASSO / 2)² = 1.2e-5``."""
MAX_DATA_ERROR = 1e-2


@dataclass(frozen=True, kw_only=True)
class PcaRecovery:
    """What an autoencoder kept.

    Attributes:
        seed: of the points, the initial factors and the sampling.
        importances: of every column, non-increasing.
        strengths: ``‖u_b‖·‖v_b‖`` of every column; 1 in a projection.
        kept: columns with an importance of at least ``THRESHOLD``.
        data_errors: ``‖X - X (U_k V_k)ᵀ‖² / ‖X‖²`` for ``k = 1, 2, 3`` less that of principal component analysis.
        projection_error: ``‖U_3 V_3 - Π‖² / ‖Π‖²``, ``Π`` the projection onto the span of the points.
    """

    seed: int
    importances: tuple[float, ...]
    strengths: tuple[float, ...]
    kept: int
    data_errors: tuple[float, ...]
    projection_error: float

    @property
    def passed(self) -> bool:
        """Whether the rank-3 prefix came out, and reproduces the points."""
        return self.kept == POINTS and self.data_errors[-1] <= MAX_DATA_ERROR


def recover_pca(seed: int) -> PcaRecovery:
    """Train on the points of ``seed``, standard normal."""
    points = rng.generator(seed, "theory-points").standard_normal((POINTS, DIMENSIONS))
    x = as_tensor(points)
    layer = default_layer(DIMENSIONS, DIMENSIONS, seed)
    sampled = sampled_loss(layer, sampling.pairs({"": DIMENSIONS}, seed), x, x)

    def loss(step: int) -> Tensor:
        layer.rank = layer.max_rank
        return F.mse_loss(layer(x), x) + sampled(step) + LASSO * lod.group_lasso(layer)

    train(layer, loss, lr=LR, steps=STEPS)
    return _measure(layer, seed, points)


def _measure(layer: lod.LoDLinear, seed: int, points: Matrix) -> PcaRecovery:
    u, v = (factor.detach().double().numpy() for factor in (layer.u, layer.v))
    _, sigma, directions = np.linalg.svd(points, full_matrices=False)
    projection = directions.T @ directions
    prefixes = [u[:, :k] @ v[:k] for k in range(1, POINTS + 1)]
    squares = [((points - points @ prefix.T) ** 2).sum() for prefix in prefixes]
    of_pca = [(sigma[k:] ** 2).sum() for k in range(1, POINTS + 1)]
    importances = lod.importance(layer)
    return PcaRecovery(
        seed=seed,
        importances=tuple(importances[""].tolist()),
        strengths=tuple(lod.column_strengths(layer)[""].tolist()),
        kept=lod.kept_ranks(importances, THRESHOLD)[""],
        data_errors=tuple(float((s - p) / (sigma**2).sum()) for s, p in zip(squares, of_pca, strict=True)),
        projection_error=float(((prefixes[-1] - projection) ** 2).sum() / POINTS),
    )
