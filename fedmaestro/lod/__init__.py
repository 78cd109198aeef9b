"""LoD layers and what one can do with them.

Layers and prefixes: ``layers``. Between dense and LoD: ``decompose``. Training: ``sampling`` (the prefix of a step),
``suffix`` (group lasso, importance), ``shrinking``. Deployment: ``search``.
"""

from fedmaestro.lod.attention import LoDMultiheadAttention
from fedmaestro.lod.decompose import balanced_svd, factorize, recompose, truncate
from fedmaestro.lod.layers import LoDConv2d, LoDLayer, LoDLinear, layers, max_ranks, set_ranks
from fedmaestro.lod.shrinking import kept_ranks, shrink
from fedmaestro.lod.suffix import column_strengths, group_lasso, importance

__all__ = [
    "LoDConv2d",
    "LoDLayer",
    "LoDLinear",
    "LoDMultiheadAttention",
    "balanced_svd",
    "column_strengths",
    "factorize",
    "group_lasso",
    "importance",
    "kept_ranks",
    "layers",
    "max_ranks",
    "recompose",
    "set_ranks",
    "shrink",
    "truncate",
]
