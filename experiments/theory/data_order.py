"""Setup C: the order of the columns follows the data, not the spectrum of the map.

The maps of setup A, on inputs along the right singular vectors, scaled so that the outputs have the singular values in
reverse: the direction of the smallest ``σ`` carries the most energy. What matters most to the loss comes first, so the
strengths are learned in the reverse order. Source: Maestro (ICML 2024), section 4 on linear maps.
"""

import numpy as np
from linear_maps import SPECTRUM, Matrix, Recovery, as_tensor, default_layer, measure, random_map, sampled_loss, train

from fedmaestro.lod import sampling

LR, STEPS = 10.0, 10_000
OUTPUT_SCALE = 0.25
"""The outputs' singular values in parts of the spectrum's. Steps are stable up to about 0.3 at this learning rate."""


def input_scales() -> Matrix:
    """Return ``s (6,)`` with ``s_i σ_i = OUTPUT_SCALE · σ_{4-i}``; what the map ignores gets the middle one of them."""
    sigma = np.array(SPECTRUM)
    carried = OUTPUT_SCALE * sigma[::-1] / sigma
    return np.concatenate([carried, np.full(3, OUTPUT_SCALE)])


def recover_data_order(seed: int) -> Recovery:
    """Train on the map of ``seed``; the expected order is that of the outputs' energy."""
    target = random_map(seed)
    a = target.matrix()
    inputs = (target.right * input_scales()).T  # row i is s_i q_i
    layer = default_layer(*a.shape, seed)
    sample = sampling.pairs({"": layer.max_rank}, seed)
    train(layer, sampled_loss(layer, sample, as_tensor(inputs), as_tensor(inputs @ a.T)), lr=LR, steps=STEPS)
    return measure(layer, seed, target.terms()[::-1])
