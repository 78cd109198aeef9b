"""Between dense layers and their LoD form: factorise, cut, recompose.

Shapes as in ``layers``: ``O`` out, ``I`` in, ``R = min(O, I·k…)`` full rank, ``r`` prefix.
"""

import copy
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fedmaestro.errors import UserError, check_name
from fedmaestro.lod.attention import LoDMultiheadAttention, keep_off_fast_path
from fedmaestro.lod.layers import (
    LoDConv,
    LoDConv1d,
    LoDConv2d,
    LoDConv3d,
    LoDLayer,
    LoDLinear,
    checked_ranks,
    freeze_like,
    layers,
)

_CONVOLUTIONS: dict[type[nn.Module], type[LoDConv]] = {
    nn.Conv1d: LoDConv1d,
    nn.Conv2d: LoDConv2d,
    nn.Conv3d: LoDConv3d,
}
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS, nn.MultiheadAttention)


def factorize(dense: nn.Module, skip: Collection[str] = ()) -> nn.Module:
    """Return a copy of ``dense`` with every linear, convolution and attention layer in LoD form.

    The function is unchanged at full rank. ``nn.MultiheadAttention`` becomes ``LoDMultiheadAttention``, whose ``q``,
    ``k``, ``v`` and ``out`` are factorised separately. What holds a LoD layer leaves PyTorch's fused evaluation of
    ``nn.TransformerEncoder``, which also means that padding positions of its output are computed, not zeroed.

    Each weight ``W = P Σ Qᵀ`` becomes ``U = P √Σ``, ``V = √Σ Qᵀ`` (Maestro, section 3: balanced SVD); what is frozen
    stays so. A copy on the ``meta`` device gives the shapes without the work.

    Args:
        dense: any module; it is not changed.
        skip: qualified names of layers that stay dense; an attention layer does so altogether, also if its
            ``out_proj`` is named.

    Raises:
        UserError: an unknown name in ``skip``; a layer that is not in it and cannot be factorised: a grouped
            convolution or one with padding other than zeros, an attention with added keys, a layer that shares a
            parameter with another module (``unfactorisable`` lists them).
    """
    candidates = {n: m for n, m in dense.named_modules() if is_candidate(m)}
    whole = {
        f"{name}.out_proj".lstrip("."): name
        for name, module in candidates.items()
        if isinstance(module, nn.MultiheadAttention)
    }
    for name in skip:
        check_name("layer to keep dense", name, candidates)
    kept = {whole.get(name, name) for name in skip}
    chosen = {name: m for name, m in candidates.items() if name not in kept and name not in whole}
    _check_untied(dense, chosen, whole)
    model = _replace(dense, {name: _factor_layer(name, m) for name, m in chosen.items()})
    keep_off_fast_path(model)
    return model


def is_candidate(module: nn.Module) -> bool:
    """Return whether ``factorize`` knows this kind of layer: linear, convolution (1 to 3 dimensions), attention."""
    return isinstance(module, _KINDS)


def unfactorisable(model: nn.Module) -> dict[str, str]:
    """Return the layers with weights of two dimensions or more that LoD has no form for, and why, by name.

    Grouped and depthwise convolutions, those with padding other than zeros, transposed ones, recurrent and embedding
    layers, whatever else keeps matrices of its own, and layers that share a weight with another one.
    """
    reasons: dict[str, str] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoDLayer) or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if not any(x.dim() > 1 for x in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(name)
        if reason := _obstacle(module):
            reasons[name] = reason
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            first = owners.setdefault(id(parameter), name)
            if first != name:
                reasons |= {n: f"shares a weight with {o}" for n, o in ((first, name), (name, first))}
    return reasons


def _obstacle(layer: nn.Module) -> str:
    """Return why a layer cannot be factorised; empty if it can."""
    if isinstance(layer, nn.Linear):
        return ""
    if isinstance(layer, nn.MultiheadAttention):
        if layer.bias_k is not None:
            return "add_bias_kv=True"
        return "add_zero_attn=True" if layer.add_zero_attn else ""
    if isinstance(layer, tuple(_CONVOLUTIONS)):
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if layer.groups != 1:
            return f"groups={layer.groups}"
        return "" if layer.padding_mode == "zeros" else f"padding_mode={layer.padding_mode!r}"
    return f"{type(layer).__name__} has no LoD form"


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
    out, inner = layer.u.shape[0], math.prod(layer.v.shape[1:])
    return out * inner <= layer.rank * (out + inner)


def _cut(layer: LoDLayer, rank: int) -> LoDLayer:
    u, v = layer.u.detach()[:, :rank], layer.v.detach()[:rank]
    if u.is_meta:  # as in ``balanced_svd``
        return layer.replaced(u.new_empty(u.shape), v.new_empty(v.shape))
    return layer.replaced(u.clone(), v.clone())


def _check_untied(model: nn.Module, chosen: Collection[str], whole: Mapping[str, str]) -> None:
    """Refuse a chosen layer that shares a parameter with another module: each would get factors of its own.

    ``whole`` names the layer that a part of it is replaced with.
    """
    owners: dict[int, str] = {}
    for part, module in model.named_modules():
        name = whole.get(part, part)
        for parameter in module.parameters(recurse=False):
            first = owners.setdefault(id(parameter), name)
            if tied := [n for n in (first, name) if n in chosen and first != name]:
                raise UserError(
                    f"modules {first!r} and {name!r} share a parameter, which factors would untie: "
                    f"add {' and '.join(map(repr, tied))} to skip"
                )


def _factor_layer(name: str, layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.MultiheadAttention):
        return _factor_attention(name, layer)
    if isinstance(layer, nn.Linear):
        new: LoDLayer = _factor_linear(layer.weight, layer.bias)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        new = _factor_conv(name, layer)
    return freeze_like(new, u=layer.weight, v=layer.weight, bias=layer.bias)


def _factor_linear(weight: Tensor, bias: Tensor | None) -> LoDLinear:
    u, v = balanced_svd(weight.detach())
    return LoDLinear(u, v, _copied(bias))


def _factor_conv(name: str, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> LoDConv:
    if reason := _obstacle(layer):
        raise _unsupported(name, reason)
    u, v = balanced_svd(layer.weight.detach().flatten(1))
    form = next(new for kind, new in _CONVOLUTIONS.items() if isinstance(layer, kind))
    return form(
        u,
        v.reshape(-1, *layer.weight.shape[1:]),
        _copied(layer.bias),
        stride=tuple(layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        dilation=tuple(layer.dilation),
    )


def _factor_attention(name: str, layer: nn.MultiheadAttention) -> LoDMultiheadAttention:
    if reason := _obstacle(layer):
        raise _unsupported(name, reason)
    packed, packed_bias = layer.in_proj_weight, layer.in_proj_bias
    owners = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight) if packed is None else (packed,) * 3
    weights = owners if packed is None else packed.chunk(3)
    biases = (None,) * 3 if packed_bias is None else packed_bias.chunk(3)
    q, k, v = (
        freeze_like(_factor_linear(weight, bias), u=owner, v=owner, bias=packed_bias)
        for owner, weight, bias in zip(owners, weights, biases, strict=True)
    )
    out = _factor_linear(layer.out_proj.weight, layer.out_proj.bias)
    return LoDMultiheadAttention(
        q,
        k,
        v,
        freeze_like(out, u=layer.out_proj.weight, v=layer.out_proj.weight, bias=layer.out_proj.bias),
        num_heads=layer.num_heads,
        dropout=layer.dropout,
        batch_first=layer.batch_first,
    )


def _copied(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _unsupported(name: str, why: str) -> UserError:
    return UserError(f"layer {name!r} cannot be factorised ({why}): add its name to skip")


def balanced_svd(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U (O, R)``, ``V (R, I)`` with ``U V = weight`` and equal column and row norms ``√σ``."""
    if weight.is_meta:  # shapes only: on the meta device, the arithmetic below would load PyTorch's compiler (3 s)
        rank = min(weight.shape)
        return weight.new_empty(weight.shape[0], rank), weight.new_empty(rank, weight.shape[1])
    p, sigma, qt = torch.linalg.svd(weight.double(), full_matrices=False)
    root = sigma.sqrt()
    return (p * root).to(weight.dtype).contiguous(), (root[:, None] * qt).to(weight.dtype).contiguous()


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of ``model`` with the named submodules exchanged; those are not copied, nor what they replace."""
    for name, new in modules.items():
        new.train(model.get_submodule(name).training)
    if "" in modules:
        return modules[""]
    memo = {id(model.get_submodule(name)): new for name, new in modules.items()}
    return copy.deepcopy(model, memo)
