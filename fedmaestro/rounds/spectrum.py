"""What is recorded about the factors of the global model in every round: energy of the tail, bias of factor means.

Both are means over the LoD layers; pure functions on states.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedmaestro import rng
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.fleet.plan import Plan, Submodel
from fedmaestro.strategies.base import AnyPartial, factor_layers
from fedmaestro.submodel import State
from fedmaestro.threads import one_thread

PROBES = 8


def is_recorded(config: ExperimentConfig, submodel: Submodel) -> bool:
    """Return whether devices that train this submodel send ``probe``: its segments are columns of whole factors."""
    return config.train.record_bias and bool(submodel.size.ranks) and submodel.size.width is None


def tail_energy(state: Mapping[str, Tensor], ranks: Mapping[str, int]) -> float | None:
    """Return the share of a layer's energy ``Σ σ²`` beyond the first ``ranks[layer]`` singular values of ``U V``.

    What a rank-``r`` model cannot hold, however its columns are chosen. 0 after a collapse to the smallest tier's
    ranks. None without LoD layers or without energy.
    """
    shares = []
    with one_thread():
        for layer in factor_layers(state):
            u, v = state[f"{layer}.u"].double(), state[f"{layer}.v"].flatten(1).double()
            # σ(U V)² are the eigenvalues of (UᵀU)(V Vᵀ): those of L (V Vᵀ) Lᵀ with L a square root of UᵀU.
            values, vectors = torch.linalg.eigh(u.T @ u)
            root = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
            energy = torch.linalg.eigvalsh(root @ (v @ v.T) @ root.T).clamp(min=0).flip(0)
            total = float(energy.sum())
            if total > 0:
                shares.append(float(energy[ranks[layer] :].sum()) / total)
    return sum(shares) / len(shares) if shares else None


def bounds(sizes: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Return for every layer the ends of the rank segments between the tiers: ``[0, r_1, r_2, …]``."""
    layers = sizes[0] if sizes else {}
    return {layer: [0, *sorted({size[layer] for size in sizes})] for layer in layers}


def rank_segments(plan: Plan) -> dict[str, list[int]]:
    """Return the ends of the rank segments between the sizes that the tiers train."""
    return bounds([tier.trains.size.ranks or {} for tier in plan.tiers if tier.trains is not None])


def probe(submodel: Mapping[str, Tensor], ends: Mapping[str, Sequence[int]]) -> State:
    """Return ``U_b (V_b Z)`` for every segment ``b`` of every layer: ``(segments, O, PROBES)``, 0 beyond the prefix.

    ``Z (I, PROBES)`` is standard normal and the same on every device, so ``‖M Z‖²_F / PROBES`` estimates ``‖M‖²_F``
    without bias for whatever matrix ``M`` is a weighted sum of products.
    """
    probes: State = {}
    for layer in factor_layers(submodel):
        u, v = submodel[f"{layer}.u"].double(), submodel[f"{layer}.v"].flatten(1).double()
        hidden = v @ _directions(layer, v.shape[1])
        parts = [
            u[:, start:end] @ hidden[start:end] if end <= u.shape[1] else u.new_zeros(u.shape[0], PROBES)
            for start, end in zip(ends[layer], ends[layer][1:], strict=False)
        ]
        probes[layer] = torch.stack(parts)
    return probes


def factor_bias(
    sums: Mapping[str, Tensor],
    partial: AnyPartial,
    means: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    ends: Mapping[str, Sequence[int]],
) -> float | None:
    """Return ``‖Σω u vᵀ - ū v̄ᵀ‖ / ‖ΔW‖``: what averaging factors instead of products does to a round's update.

    Args:
        sums: by layer, ``Σ weight · probe`` over all devices: ``(segments, O, PROBES)``.
        partial: the weights of the devices of each size.
        means: the coverage mean of the factors, column by column.
        before: the global state of the round's start.
        ends: of the segments, as for ``probe``.

    Returns:
        The mean over the layers that moved; None when there are none.
    """
    blocks = [(shapes, block.weight) for shapes, block in partial]
    ratios = []
    for layer, total in sums.items():
        held = [(rank, weight) for shapes, weight in blocks if (rank := _held_rank(shapes, layer)) is not None]
        weights = [sum(w for rank, w in held if rank >= end) for end in ends[layer][1:]]
        covered = [b for b, weight in enumerate(weights) if weight > 0]
        if not covered:
            continue
        products = torch.stack([total[b] / weights[b] for b in covered])
        of_means, old = (probe(state, ends)[layer][covered] for state in (means, before))
        moved = float((products - old).sum(0).norm())
        if moved > 0:
            ratios.append(float((products - of_means).sum(0).norm()) / moved)
    return sum(ratios) / len(ratios) if ratios else None


def _held_rank(shapes: Mapping[str, tuple[int, ...]], layer: str) -> int | None:
    """Return how many columns of a layer a size covers; one of its factors may be frozen, and then is not sent."""
    u, v = shapes.get(f"{layer}.u"), shapes.get(f"{layer}.v")
    return u[1] if u is not None else v[0] if v is not None else None


@lru_cache(maxsize=64)
def _directions(layer: str, inner: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.derived_seed(0, f"probe {layer}"))
    return torch.randn(inner, PROBES, generator=generator, dtype=torch.float64)
