"""LoD layers and what one can do with them.

Layers and prefixes: ``layers``. Between dense and LoD: ``decompose``. Training: ``sampling`` (the prefix of a step),
``suffix`` (group lasso, importance), ``shrinking``. Deployment: ``search``.
"""

from fedmaestro.lod.attention import LoDMultiheadAttention
from fedmaestro.lod.decompose import balanced_svd, factorize, is_candidate, recompose, truncate, unfactorisable
from fedmaestro.lod.layers import (
    LoDConv,
    LoDConv1d,
    LoDConv2d,
    LoDConv3d,
    LoDLayer,
    LoDLinear,
    layers,
    max_ranks,
    set_ranks,
)
from fedmaestro.lod.shrinking import kept_ranks, shrink
from fedmaestro.lod.suffix import column_strengths, group_lasso, importance

__all__ = [
    "LoDConv",
    "LoDConv1d",
    "LoDConv2d",
    "LoDConv3d",
    "LoDLayer",
    "LoDLinear",
    "LoDMultiheadAttention",
    "balanced_svd",
    "column_strengths",
    "factorize",
    "group_lasso",
    "importance",
    "is_candidate",
    "kept_ranks",
    "layers",
    "max_ranks",
    "recompose",
    "set_ranks",
    "shrink",
    "truncate",
    "unfactorisable",
]
