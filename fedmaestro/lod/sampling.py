"""Ordered sampling: which rank prefix each layer runs at in a training step.

A sampler is a function ``step -> {layer: rank}`` of the step alone: it has no state of its own, and a resumed run goes
on where it was. Layers are named as in ``lod.layers``; ``R_i`` is the full rank of layer ``i``.

Sources: Maestro (ICML 2024), Algorithm 1, for ``pairs``; FjORD (NeurIPS 2021), section 3.1, for ``prefixes``.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedmaestro import rng
from fedmaestro.errors import UserError

Ranks = dict[str, int]
Sampler = Callable[[int], Ranks]


def pairs(full: Mapping[str, int], seed: int, *indices: int) -> Sampler:
    """Sample as Maestro does: one (layer, rank) pair per step, without replacement from all ``Σ R_i`` pairs.

    The layer of the pair runs at its rank ``1 … R_i``, all others at their full rank; a cycle of ``Σ R_i`` steps uses
    every pair once, in a new order each cycle.

    Args:
        full: ``R_i`` by layer.
        seed: the run's seed.
        indices: keep the orders of several samplers apart (for example one per shrinking).
    """
    table = [(name, rank) for name, top in full.items() for rank in range(1, top + 1)]
    if not table:
        return lambda step: dict(full)  # noqa: ARG005
    drawn: dict[int, np.ndarray] = {}

    def sample(step: int) -> Ranks:
        cycle, position = divmod(step, len(table))
        if cycle not in drawn:
            drawn.clear()
            drawn[cycle] = rng.generator(seed, "pairs", *indices, cycle).permutation(len(table))
        name, rank = table[drawn[cycle][position]]
        return {**full, name: rank}

    return sample


def independent(full: Mapping[str, int], seed: int, *indices: int) -> Sampler:
    """Sample every layer's rank by itself, uniformly from ``1 … R_i`` (an option of the authors' release)."""

    def sample(step: int) -> Ranks:
        generator = rng.generator(seed, "independent-ranks", *indices, step)
        return {name: int(generator.integers(1, top + 1)) if top else 0 for name, top in full.items()}

    return sample


def prefixes(sizes: Sequence[Mapping[str, int]], seed: int, *indices: int) -> Sampler:
    """Sample one of the given sizes (the tiers' ranks, say), uniformly, for all layers at once.

    Raises:
        UserError: no sizes.
    """
    if not sizes:
        raise UserError("sampling among prefixes needs at least one size")

    def sample(step: int) -> Ranks:
        generator = rng.generator(seed, "prefixes", *indices, step)
        return dict(sizes[int(generator.integers(len(sizes)))])

    return sample
