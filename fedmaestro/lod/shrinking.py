"""Progressive shrinking: cut the columns whose importance has vanished, optimiser state included.

Source: Maestro (ICML 2024), section 3.3. Departures from the authors' release, which masks: tensors are really cut (no
weight decay, momentum or lasso acts on what is gone), the optimiser's buffers are cut along, and the ranks are the
shapes, so every artefact carries them. Rank 0 is "bias only".
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmaestro.errors import UserError
from fedmaestro.lod.layers import LoDLayer, checked_ranks, layers
from fedmaestro.submodel import leading_block


def kept_ranks(importance: Mapping[str, Tensor], threshold: float) -> dict[str, int]:
    """Return for every layer how many columns have an importance of at least ``threshold`` (a prefix: it is monotone).

    Args:
        importance: ``(R,)`` per layer, non-increasing (``lod.importance``).
        threshold: ``ε_ps``; the paper uses 1e-7, the authors' release 1e-5. 0 keeps everything.
    """
    # NaN, of a layer that diverged, is no reason to cut.
    return {name: int((~(scores < threshold)).sum()) for name, scores in importance.items()}


@torch.no_grad()
def shrink(model: nn.Module, ranks: Mapping[str, int], optimizer: Optimizer | None = None) -> None:
    """Cut LoD layers in place to the given ranks, and with them what ``optimizer`` keeps for their factors.

    A cut layer gets new, smaller parameters and runs at those of its columns that are left of its prefix. A tensor of
    the optimiser's state that has the shape of its parameter is cut like it (momentum, Adam's moments); the rest is
    kept.

    Raises:
        UserError: unknown layers or ranks outside ``0 … R``; nothing is cut then.
    """
    known = layers(model)
    smaller = {name: rank for name, rank in checked_ranks(known, ranks).items() if rank < known[name].max_rank}
    if optimizer is not None:
        _check_held(optimizer, [known[name] for name in smaller])
    for name, rank in smaller.items():
        layer = known[name]
        prefix = min(rank, layer.rank)
        u, v = layer.u, layer.v
        layer.u = _cut(u, (u.shape[0], rank), optimizer)
        layer.v = _cut(v, (rank, *v.shape[1:]), optimizer)
        layer.rank = prefix


def _check_held(optimizer: Optimizer, cut: Sequence[LoDLayer]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(factor) not in held for layer in cut for factor in (layer.u, layer.v) if factor.requires_grad):
        raise UserError("the optimizer does not hold the factors of the model that is to shrink")


def _cut(old: nn.Parameter, shape: tuple[int, ...], optimizer: Optimizer | None) -> nn.Parameter:
    new = nn.Parameter(leading_block(old, shape).clone(), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = leading_block(old.grad, shape).clone()
    if optimizer is not None:
        _replace_in(optimizer, old, new)
    return new


def _replace_in(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: leading_block(value, new.shape).clone()
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in state.items()
        }
