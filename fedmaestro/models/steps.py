"""Residual networks that leave out blocks, and the step sizes that make up for them.

NeFL (Kang et al., arXiv 2308.07761) reads a residual block ``x + F(x)`` as a step of an ODE: a submodel that leaves out
blocks takes fewer steps, and learns their sizes, ``x + s F(x)`` with one number ``s`` for each block. A block whose
shortcut is the identity can be left out; ``x`` then passes on.

Departures: here such blocks are left out from the last one on, each after its stage's first; the release has tables of
blocks for each size, and leaves out those too whose shortcut is a convolution, which it keeps.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fedmaestro.models.resnet import BasicBlock


def use_steps(model: nn.Module) -> None:
    """Give every residual block a step size of 1, in place."""
    for module in model.modules():
        if isinstance(module, BasicBlock):
            module.step = nn.Parameter(torch.ones(1))


def leave_out(model: nn.Module, optional: Sequence[str], depth: int | None) -> None:
    """Put the identity in the place of all ``optional`` blocks but the first ``depth`` (None: all stay), in place.

    None of their tensors is left. ValueError for a number of blocks that there is not.
    """
    kept = len(optional) if depth is None else depth
    if not 0 <= kept <= len(optional):
        raise ValueError(f"{kept} of {len(optional)} blocks")
    for name in optional[kept:]:
        setattr(model, name, nn.Identity())
