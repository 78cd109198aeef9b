"""What the three setups share: linear maps of known spectrum, a LoD layer to learn them, plain SGD, and the result.

Shapes: ``O`` out, ``I`` in, ``R = min(O, I)`` columns, ``N`` examples, ``k`` prefix.
"""
# ruff: noqa: E741, N803 (O, I, R are the shape letters)

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmaestro import lod, rng
from fedmaestro.lod.sampling import Sampler

SPECTRUM = (9.55, 6.92, 3.67)
MAX_PREFIX_ERROR = 1e-4
MAX_STRENGTH_ERROR = 0.1
_OUT, _IN = 9, 6

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """``A = P diag(SPECTRUM) Q[:, :3]ᵀ`` of rank 3.

    Attributes:
        left: ``P (9, 3)``, orthonormal columns.
        right: ``Q (6, 6)``, orthogonal; ``A`` maps its last three columns to zero.
    """

    left: Matrix
    right: Matrix

    def terms(self) -> list[Matrix]:
        """Return the rank-one terms ``σ_i p_i q_iᵀ``, each ``(9, 6)``, largest ``σ`` first."""
        return [s * np.outer(self.left[:, i], self.right[:, i]) for i, s in enumerate(SPECTRUM)]

    def matrix(self) -> Matrix:
        """Return ``A (9, 6)``."""
        return (self.left * SPECTRUM) @ self.right[:, : len(SPECTRUM)].T


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How well the columns of a trained layer are the singular vectors of the map, in the expected order.

    Attributes:
        seed: of the map, the initial factors and the sampling.
        expected: the singular values in the order in which the columns should have them.
        strengths: ``‖u_b‖·‖v_b‖`` of every column.
        prefix_errors: ``‖U[:, :k] V[:k] - A_k‖² / ‖A‖²`` for ``k = 1 … R``, ``A_k`` the first ``k`` expected terms.
    """

    seed: int
    expected: tuple[float, ...]
    strengths: tuple[float, ...]
    prefix_errors: tuple[float, ...]

    @property
    def worst_prefix_error(self) -> float:
        return max(self.prefix_errors)

    @property
    def worst_strength_error(self) -> float:
        """Largest ``|σ̂ - σ|`` of the columns that should have one."""
        return max(abs(s - e) for s, e in zip(self.strengths, self.expected, strict=False))

    @property
    def tail(self) -> float:
        """Largest strength of the other columns."""
        return max(self.strengths[len(self.expected) :])

    @property
    def passed(self) -> bool:
        return self.worst_prefix_error <= MAX_PREFIX_ERROR and self.worst_strength_error <= MAX_STRENGTH_ERROR


def random_map(seed: int) -> LinearMap:
    """Draw the singular vectors."""
    generator = rng.generator(seed, "theory-map")
    left, right = (np.linalg.qr(generator.standard_normal((n, n)))[0] for n in (_OUT, _IN))
    return LinearMap(left=left[:, : len(SPECTRUM)], right=right)


def default_layer(O: int, I: int, seed: int) -> lod.LoDLinear:
    """Return a layer without bias whose factors start as ``nn.Linear`` would: uniform in ``±1/√fan_in``."""
    R = min(O, I)
    generator = rng.generator(seed, "theory-init")
    u = generator.uniform(-1, 1, (O, R)) / math.sqrt(R)
    v = generator.uniform(-1, 1, (R, I)) / math.sqrt(I)
    return lod.LoDLinear(as_tensor(u), as_tensor(v), None)


def as_tensor(array: Matrix) -> Tensor:
    """Return ``array`` in float32."""
    return torch.tensor(array, dtype=torch.float32)


def sampled_loss(layer: lod.LoDLinear, sample: Sampler, inputs: Tensor, targets: Tensor) -> Callable[[int], Tensor]:
    """Return the loss of a step: mean-squared error over all ``N·O`` entries at the sampled rank."""

    def loss(step: int) -> Tensor:
        lod.set_ranks(layer, sample(step))
        return F.mse_loss(layer(inputs), targets)

    return loss


def train(layer: lod.LoDLinear, loss_of: Callable[[int], Tensor], *, lr: float, steps: int) -> None:
    """Take ``steps`` steps of plain SGD; the layer ends at its full rank."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    layer.rank = layer.max_rank


def measure(layer: lod.LoDLinear, seed: int, terms: list[Matrix]) -> Recovery:
    """Compare the columns with the rank-one terms that they should hold, in this order."""
    u, v = (factor.detach().double().numpy() for factor in (layer.u, layer.v))
    energy = (np.sum(terms, axis=0) ** 2).sum()
    best = [np.sum(terms[:k], axis=0) for k in range(1, layer.max_rank + 1)]
    errors = [((u[:, :k] @ v[:k] - a_k) ** 2).sum() / energy for k, a_k in enumerate(best, start=1)]
    return Recovery(
        seed=seed,
        expected=tuple(float(np.linalg.norm(term)) for term in terms),
        strengths=tuple(lod.column_strengths(layer)[""].tolist()),
        prefix_errors=tuple(map(float, errors)),
    )
