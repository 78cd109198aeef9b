"""Setup A: with inputs that weigh all directions alike, ordered sampling finds the singular value decomposition.

A LoD layer learns ``A (9, 6)`` of rank 3 from the identity: each step runs one rank 1 … 6 on all six rows. Every prefix
``U[:, :k] V[:k]`` ends at the best approximation ``A_k``. Source: Maestro (ICML 2024), section 4 on linear maps.
"""

import numpy as np
from linear_maps import Recovery, as_tensor, default_layer, measure, random_map, sampled_loss, train

from fedmaestro.lod import sampling

LR = 0.5
STEPS = 3000
"""1,000 more than the recipe's: see README.md."""


def recover_svd(seed: int, *, ordered: bool = True) -> Recovery:
    """Train on the map of ``seed``; without ``ordered`` sampling every step runs the full rank (a control)."""
    target = random_map(seed)
    a = target.matrix()
    layer = default_layer(*a.shape, seed)
    full = {"": layer.max_rank}
    sample = sampling.pairs(full, seed) if ordered else sampling.prefixes([full], seed)
    loss = sampled_loss(layer, sample, as_tensor(np.eye(a.shape[1])), as_tensor(a.T))
    train(layer, loss, lr=LR, steps=STEPS)
    return measure(layer, seed, target.terms())
