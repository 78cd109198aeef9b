"""Costs in closed form, for any ranks, without building the model of those ranks.

Units: MACs (multiply-accumulates of linear and convolution layers, as in the papers' tables; a FLOP counter shows
twice as many), bytes of float32 tensors. ``O`` out, ``I`` in times kernel, ``R`` full rank, ``r`` prefix, ``P`` output
positions of a layer (1 for a linear layer on vectors).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedmaestro.errors import UserError, check_name
from fedmaestro.lod import LoDLayer, max_ranks, set_ranks
from fedmaestro.lod.layers import check_rank
from fedmaestro.models.shape import InputShape, example_inputs
from fedmaestro.submodel import num_elements, shapes_of
from fedmaestro.threads import one_thread

BYTES_PER_SCALAR = 4


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What the cost of one linear or convolution layer depends on besides its rank."""

    name: str
    out: int
    inner: int
    positions: int
    max_rank: int | None
    """``R`` of a LoD layer, None for a dense one."""
    input_needs_grad: bool
    """False for layers that see the images: their input gradient is never computed."""

    def macs(self, rank: int) -> int:
        """Forward: ``P·O·I`` dense, ``P·r·(I + O)`` in LoD form."""
        if self.max_rank is None:
            return self.positions * self.out * self.inner
        return self.positions * rank * (self.inner + self.out)

    def train_macs(self, rank: int) -> int:
        """Forward, weight gradients and input gradients: each costs as much as the forward."""
        inner_part = self.macs(rank) if self.max_rank is None else self.positions * rank * self.inner
        return 3 * self.macs(rank) - (0 if self.input_needs_grad else inner_part)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One model's layers, and what does not depend on ranks."""

    layers: tuple[LayerTrace, ...]
    fixed_params: int
    """Parameters outside U and V: dense layers, biases, norms."""
    fixed_activation_bytes: int
    """Bytes per example that autograd keeps for the backward pass, without the hidden ``(P, r)`` of LoD layers."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a submodel costs a device."""

    params: int
    macs_per_example: int
    train_macs_per_example: int
    train_memory_bytes: int
    """Peak of one training step: parameters, gradients, optimiser state, activations of a batch."""
    activation_bytes: int
    """The activations among them."""
    download_bytes: int
    upload_bytes: int


def trace(model: nn.Module, input_shape: InputShape) -> Trace:
    """Measure a copy of ``model`` at full rank, once with batches of one and two examples; values do not matter."""
    model = copy.deepcopy(model).to_empty(device="cpu")
    set_ranks(model, max_ranks(model))
    with one_thread(), torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        layers = _layer_traces(model, input_shape)
        kept = _saved_bytes(model, input_shape, 2) - _saved_bytes(model, input_shape, 1)
    hidden = sum(layer.positions * (layer.max_rank or 0) for layer in layers)
    pairs = sum((layer.max_rank or 0) * (layer.inner + layer.out) for layer in layers)
    return Trace(
        layers=tuple(layers),
        fixed_params=num_elements(shapes_of(model)) - pairs,
        fixed_activation_bytes=kept - BYTES_PER_SCALAR * hidden,
    )


def cost(traced: Trace, ranks: Mapping[str, int], *, batch_size: int, momentum: bool = False) -> Cost:
    """Return the cost at ``ranks``; every figure is monotone in every rank.

    Raises:
        UserError: ``ranks`` does not hold one rank in ``0 … R`` for each LoD layer of the trace and nothing else.
    """
    lod = [layer for layer in traced.layers if layer.max_rank is not None]
    rank = {layer.name: 0 for layer in traced.layers} | _checked_ranks(traced, ranks)
    params = traced.fixed_params + sum(rank[x.name] * (x.inner + x.out) for x in lod)
    hidden = sum(rank[x.name] * x.positions for x in lod)
    activation_bytes = traced.fixed_activation_bytes + BYTES_PER_SCALAR * hidden
    copies = 3 if momentum else 2
    return Cost(
        params=params,
        macs_per_example=sum(x.macs(rank[x.name]) for x in traced.layers),
        train_macs_per_example=sum(x.train_macs(rank[x.name]) for x in traced.layers),
        train_memory_bytes=copies * BYTES_PER_SCALAR * params + batch_size * activation_bytes,
        activation_bytes=batch_size * activation_bytes,
        download_bytes=BYTES_PER_SCALAR * params,
        upload_bytes=BYTES_PER_SCALAR * params,
    )


def _checked_ranks(traced: Trace, ranks: Mapping[str, int]) -> dict[str, int]:
    full = {layer.name: layer.max_rank for layer in traced.layers if layer.max_rank is not None}
    for name in ranks:
        check_name("LoD layer", name, full)
    if missing := [name for name in full if name not in ranks]:
        raise UserError(f"no rank for LoD layer {missing[0]!r}: the cost needs one for each of {', '.join(full)}")
    return {name: check_rank(ranks[name], max_rank, name) for name, max_rank in full.items()}


def _layer_traces(model: nn.Module, input_shape: InputShape) -> list[LayerTrace]:
    traces: list[LayerTrace] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            is_lod = isinstance(module, LoDLayer)
            out, inner = _fan(module)
            traces.append(
                LayerTrace(
                    name=name,
                    out=out,
                    inner=inner,
                    positions=output.numel() // out,  # of one example, wherever its dimension is
                    max_rank=module.max_rank if is_lod else None,  # type: ignore[arg-type]
                    input_needs_grad=inputs[0].requires_grad,
                )
            )

        return hook

    counted = {n: m for n, m in model.named_modules() if isinstance(m, LoDLayer | nn.Linear | nn.Conv2d)}
    handles = [module.register_forward_hook(record(name)) for name, module in counted.items()]
    try:
        model(*example_inputs(input_shape, 1))
    finally:
        for handle in handles:
            handle.remove()
    return traces


def _fan(module: nn.Module) -> tuple[int, int]:
    """Return ``O`` and ``I`` (times kernel) of a layer."""
    if isinstance(module, LoDLayer):
        return module.u.shape[0], math.prod(module.v.shape[1:])
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def _saved_bytes(model: nn.Module, input_shape: InputShape, batch: int) -> int:
    """Return the bytes of distinct storages that autograd keeps for one loss, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(*example_inputs(input_shape, batch)).flatten(0, -2)
        # Keep the graph alive while counting: a freed storage's address could be reused.
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    del loss
    return sum(storages.values())
