"""LoD layers and what one can do with them; see ``layers`` and ``decompose``."""

from fedmaestro.lod.decompose import balanced_svd, factorize, recompose, truncate
from fedmaestro.lod.layers import LoDConv2d, LoDLayer, LoDLinear, layers, max_ranks, set_ranks

__all__ = [
    "LoDConv2d",
    "LoDLayer",
    "LoDLinear",
    "balanced_svd",
    "factorize",
    "layers",
    "max_ranks",
    "recompose",
    "set_ranks",
    "truncate",
]
