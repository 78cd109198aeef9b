"""Between dense layers and their LoD form: factorise, cut, recompose.

Shapes as in ``layers``: ``O`` out, ``I`` in, ``R = min(O, I·k·l)`` full rank, ``r`` prefix.
"""

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fedmaestro.errors import UserError, check_name
from fedmaestro.lod.layers import LoDConv2d, LoDLayer, LoDLinear, checked_ranks, freeze_like, layers


def factorize(dense: nn.Module, skip: Collection[str] = ()) -> nn.Module:
    """Return a copy of ``dense`` with every Linear and Conv2d in LoD form; the function is unchanged at full rank.

    Each weight ``W = P Σ Qᵀ`` becomes ``U = P √Σ``, ``V = √Σ Qᵀ`` (Maestro, section 3: balanced SVD); what is frozen
    stays so. A copy on the ``meta`` device gives the shapes without the work.

    Args:
        dense: any module; it is not changed.
        skip: qualified names of Linear and Conv2d layers that stay dense.

    Raises:
        UserError: an unknown name in ``skip``; a layer that is not in it and cannot be factorised: a grouped
            convolution or one with padding other than zeros, a part of ``nn.MultiheadAttention``, a layer that shares
            a parameter with another module.
    """
    candidates = {n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for name in skip:
        check_name("layer to keep dense", name, candidates)
    chosen = {name: m for name, m in candidates.items() if name not in skip}
    for name in chosen:
        _check_outside_attention(dense, name)
    _check_untied(dense, chosen)
    return _replace(dense, {name: _factor_layer(name, m) for name, m in chosen.items()})


def truncate(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Return a copy of ``model`` cut for real: LoD layer ``name`` holds ``(O, r)`` and ``(r, I…)`` and no tail.

    Layers that are not named keep all of their columns. Raises UserError for unknown layers and ranks outside
    ``0 … R``.
    """
    known = layers(model)
    cut = {name: _cut(known[name], rank) for name, rank in checked_ranks(known, ranks).items()}
    return _replace(model, cut)


def recompose(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` at its current ranks, dense wherever that has fewer or as many weights.

    Break-even for a linear layer: ``r ≥ O·I / (O + I)``. The other LoD layers are cut to their current rank.
    """
    return _replace(
        model,
        {
            name: layer.dense() if _dense_is_smaller(layer) else _cut(layer, layer.rank)
            for name, layer in layers(model).items()
        },
    )


def _dense_is_smaller(layer: LoDLayer) -> bool:
    out, inner = layer.u.shape[0], layer.v[:1].numel()
    return out * inner <= layer.rank * (out + inner)


def _cut(layer: LoDLayer, rank: int) -> LoDLayer:
    return layer.replaced(layer.u.detach()[:, :rank].clone(), layer.v.detach()[:rank].clone())


def _check_outside_attention(model: nn.Module, name: str) -> None:
    # It reads the weights of its layers instead of calling them, and a LoD layer has none.
    if name and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise UserError(f"layer {name!r} cannot be factorised (part of nn.MultiheadAttention): add its name to skip")


def _check_untied(model: nn.Module, chosen: Collection[str]) -> None:
    """Refuse a chosen layer that shares a parameter with another module: each would get factors of its own."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            first = owners.setdefault(id(parameter), name)
            if tied := [n for n in (first, name) if n in chosen and first != name]:
                raise UserError(
                    f"modules {first!r} and {name!r} share a parameter, which factors would untie: "
                    f"add {' and '.join(map(repr, tied))} to skip"
                )


def _factor_layer(name: str, layer: nn.Linear | nn.Conv2d) -> LoDLayer:
    return freeze_like(_factors(name, layer), u=layer.weight, v=layer.weight, bias=layer.bias)


def _factors(name: str, layer: nn.Linear | nn.Conv2d) -> LoDLayer:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    u, v = balanced_svd(layer.weight.detach().flatten(1))
    if isinstance(layer, nn.Linear):
        return LoDLinear(u, v, bias)
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UserError(
            f"layer {name!r} cannot be factorised (groups={layer.groups}, padding={layer.padding!r}, "
            f"padding_mode={layer.padding_mode!r}): add its name to skip"
        )
    kernel_v = v.reshape(-1, *layer.weight.shape[1:])
    return LoDConv2d(
        u,
        kernel_v,
        bias,
        stride=_pair(layer.stride),
        padding=_pair(layer.padding),
        dilation=_pair(layer.dilation),
    )


def balanced_svd(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U (O, R)``, ``V (R, I)`` with ``U V = weight`` and equal column and row norms ``√σ``."""
    p, sigma, qt = torch.linalg.svd(weight.double(), full_matrices=False)
    root = sigma.sqrt()
    return (p * root).to(weight.dtype).contiguous(), (root[:, None] * qt).to(weight.dtype).contiguous()


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of ``model`` with the named submodules exchanged; those are not copied, nor what they replace."""
    if "" in modules:
        return modules[""].train(model.training)
    memo = {id(model.get_submodule(name)): new.train(model.training) for name, new in modules.items()}
    return copy.deepcopy(model, memo)
