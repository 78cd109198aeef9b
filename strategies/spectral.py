"""Products ``u (O, K) @ v (K, I…)`` by their thin factors: best approximation, recompression.

Shapes: ``O`` out, ``I`` in (flattened: ``I…`` may have several dimensions), ``K`` columns, ``m = min(O, I)``. With
``K < m`` the matrix of ``O × I`` entries is never formed; with more columns it is the cheapest form there is. All is
meant for float64, and computed with one thread: rounding must not depend on the number of cores.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies.base import factor_layers
from fedmaestro.submodel import State
from fedmaestro.threads import one_thread

Pair = tuple[Tensor, Tensor]
"""``u (O, K)``, ``v (K, I…)``."""


def balanced(u: Tensor, v: Tensor, rank: int) -> Pair:
    """Return the best approximation of ``u @ v`` of this rank, as ``P √Σ (O, rank)`` and ``√Σ Qᵀ (rank, I…)``.

    Columns descend by singular value; the largest entry of each column of the first factor is positive, which makes
    the result unique where singular values differ. Columns beyond the numerical rank of the product are zero.
    """
    with one_thread():
        p, sigma, qt = _svd(u, v.flatten(1))
        p, sigma, qt = p[:, :rank], sigma[:rank], qt[:rank]
        largest = p.gather(0, p.abs().argmax(0, keepdim=True))
        root = torch.where(sigma > _tolerance(u, v, sigma), sigma, 0.0).sqrt()
        left, right = p * root.copysign(largest), root.copysign(largest[0])[:, None] * qt
    missing = rank - len(sigma)
    left, right = torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left.contiguous(), right.contiguous().reshape(rank, *v.shape[1:])


def refactored(state: Mapping[str, Tensor], layer: str, u: Tensor, v: Tensor) -> State:
    """Return ``<layer>.u (O, R)`` and ``.v (R, I…)`` anew: the ``balanced`` factors of ``u @ v`` in their dtypes."""
    names = f"{layer}.u", f"{layer}.v"
    new = balanced(u, v, state[names[0]].shape[1])
    return {name: factor.to(state[name].dtype) for name, factor in zip(names, new, strict=True)}


def _tolerance(u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return below what a singular value is rounding, as in NumPy's ``matrix_rank``: ``(1,)``; ``(0,)`` without any."""
    return sigma[:1] * max(len(u), v.shape[1:].numel()) * torch.finfo(sigma.dtype).eps


def _svd(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``P, σ, Qᵀ`` of ``u @ v`` with ``min(O, K, I)`` columns."""
    (O, K), I = u.shape, v.shape[1]  # noqa: E741
    if min(O, I) > K:
        (p, left), (q, right) = torch.linalg.qr(u), torch.linalg.qr(v.T)
        core_p, sigma, core_qt = torch.linalg.svd(left @ right.T, full_matrices=False)
        return p @ core_p, sigma, core_qt @ q.T
    if O > I:
        q, sigma, pt = _wide_svd((u @ v).T)
        return pt.T, sigma, q.T
    return _wide_svd(u @ v)


def _wide_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of ``(O, I)``, ``O ≤ I``, through that of ``(O, O)``: half the time for long rows."""
    q, core = torch.linalg.qr(matrix.T)
    p, sigma, qt = torch.linalg.svd(core.T, full_matrices=False)
    return p, sigma, qt @ q.T


def compress(u: Tensor, v: Tensor) -> Pair:
    """Return the same product with at most ``m`` columns: as it is, or ``1 · (u v)``, or ``(u v) · 1``."""
    flat = v.flatten(1)
    smaller = min(len(u), flat.shape[1])
    if u.shape[1] <= smaller:
        return u, v
    with one_thread():
        product, one = u @ flat, torch.eye(smaller, dtype=u.dtype, device=u.device)
    left, right = (one, product) if len(u) == smaller else (product, one)
    return left, right.reshape(smaller, *v.shape[1:])


def squared_norm(u: Tensor, v: Tensor) -> float:
    """Return ``‖u v‖²_F = tr(uᵀu · v vᵀ)``."""
    u, v = u.double(), v.flatten(1).double()
    return max(0.0, float(((u.T @ u) * (v @ v.T)).sum()))


def why_no_products(state: Mapping[str, Tensor], weight: float, radius: float) -> str | None:
    """Return which layer's product is larger than that of devices of this weight and norm can be; None: none.

    ``‖U V‖_F ≤ ‖U‖_F ‖V‖_F ≤ ½ (‖U‖²_F + ‖V‖²_F) ≤ ½ radius²`` for each of them.
    """
    with one_thread():
        for layer in factor_layers(state):
            if squared_norm(state[f"{layer}.u"], state[f"{layer}.v"]) > (weight * radius**2 / 2) ** 2:
                return f"the product of {layer!r} is larger than that of devices could be"
    return None


def joined(left: Pair, right: Pair) -> Pair:
    """Return factors of the sum of two products: their columns side by side."""
    return torch.cat((left[0], right[0]), dim=1), torch.cat((left[1], right[1]))


def is_wide(u: Tensor, v: Tensor) -> bool:
    """Return whether a growing stack should be compressed: at ``2 m`` columns, so that this costs little per column."""
    return u.shape[1] > 2 * min(len(u), v.shape[1:].numel())
