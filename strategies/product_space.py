r"""Server optimisers on products: a memory that means the same whatever basis the factors are in.

A factor pair ``U (O, R)``, ``V (R, I…)`` is one of all pairs ``U G, G⁻¹ V``. Rules that re-order columns choose another
one in every round, so moments of factors belong to a basis that is gone. Here the optimiser sees ``W = U V`` in the
place of the pair, and its result is factored anew (``spectral.balanced``)::

    v ← β v + (W_aggregated - W_before);   W ← W_before + lr · v;   U, V ← best pair of rank R, balanced

and the same with Adam's or Yogi's moments. All other tensors take the same step in their own space, as do all tensors
of a dense network, for which the two spaces are one.

What is paid: the moments have ``O × I`` entries, those of the dense layer, and a layer's matrix is formed for a moment.
Departures from ``server_optimizers``: an entry of ``W`` counts as held by the devices that hold both its row of U and
its column of V, whatever their rank; a pair keeps its bits where no device of the round sent either factor. Like every
re-ordering, the step mixes columns across tier edges. Where ``R < min(O, I)`` (a model that was shrunk, or equal MACs),
what has a higher rank is cut off; the moments keep it.

Source: FedMaestro; FedAvgM (1909.06335), FedAdam and FedYogi (2003.00295) on products.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.strategies.base import factor_layers
from fedmaestro.strategies.spectral import balanced
from fedmaestro.submodel import State
from fedmaestro.threads import one_thread

PRODUCT = ".uv"
"""Behind a layer's name, its product."""


def with_products(state: Mapping[str, Tensor]) -> State:
    """Return ``state`` with ``<layer>.uv (O, I…)`` in the place of every factor pair."""
    layers = factor_layers(state)
    factors = {f"{layer}.{factor}" for layer in layers for factor in "uv"}
    kept = {name: tensor for name, tensor in state.items() if name not in factors}
    return kept | {f"{layer}{PRODUCT}": product(state[f"{layer}.u"], state[f"{layer}.v"]) for layer in layers}


def product(u: Tensor, v: Tensor) -> Tensor:
    """Return ``u (O, R) @ v (R, I…)`` as ``(O, I…)``, summed in float64."""
    with one_thread():
        return (u.double() @ v.flatten(1).double()).reshape(len(u), *v.shape[1:]).to(u.dtype)


def holders(devices: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> State:
    """Return the contributors of ``with_products(state)``, of whose entries ``devices`` are those of ``state``.

    Of ``W (O, I…)``: the fewer of those of its row of U and of its column of V, each at their first rank. Where devices
    send one factor only, those that do.
    """
    layers = factor_layers(state)
    factors = {f"{layer}.{factor}" for layer in layers for factor in "uv"}
    kept = {name: counts for name, counts in devices.items() if name not in factors}
    return kept | {f"{layer}{PRODUCT}": _held(devices[f"{layer}.u"], devices[f"{layer}.v"]) for layer in layers}


def _held(u: Tensor, v: Tensor) -> Tensor:
    rows, columns = u[:, 0], v[0]
    if not bool((rows > 0).any()) or not bool((columns > 0).any()):
        return torch.maximum(rows.max(), columns.max()).expand(len(rows), *columns.shape)
    return torch.minimum(rows.reshape(-1, *(1,) * columns.dim()), columns.unsqueeze(0))


def with_factors(
    products: Mapping[str, Tensor], before: Mapping[str, Tensor], untouched: Mapping[str, Tensor]
) -> State:
    """Return the state whose pairs have these products, in the shapes and order of ``before``.

    Args:
        products: as ``with_products`` returns them.
        before: the model that the round started from.
        untouched: contributors (``holders``); pairs without any keep the bits of ``before``.
    """
    new: State = {}
    for name, old in before.items():
        layer, factor = name.rpartition(".")[::2]
        whole = f"{layer}{PRODUCT}"
        if factor not in ("u", "v") or whole not in products:
            new[name] = products[name]
        elif not bool((untouched[whole] > 0).any()):
            new[name] = old
        elif name not in new:
            u, v = _factored(products[whole].double(), before[f"{layer}.u"].shape[1])
            new |= {f"{layer}.u": u.to(old.dtype), f"{layer}.v": v.to(old.dtype)}
    return {name: new[name] for name in before}


def _factored(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the balanced pair of this rank nearest to ``matrix (O, I…)``."""
    one = torch.eye(min(len(matrix), matrix[0].numel()), dtype=matrix.dtype, device=matrix.device)
    if len(one) == len(matrix):
        return balanced(one, matrix, rank)
    u, v = balanced(matrix.flatten(1), one, rank)
    return u, v.reshape(rank, *matrix.shape[1:])
