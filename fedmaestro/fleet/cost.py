"""Costs in closed form, for any ranks, without building the model of those ranks.

Units: MACs (multiply-accumulates of the layers with weights, as in the papers' tables; a FLOP counter shows twice as
many), bytes of float32 tensors. ``O`` out, ``I`` in times kernel, ``R`` full rank, ``r`` prefix, ``P`` output positions
of a layer (1 for a linear layer on vectors).

Linear, convolution and LoD layers have a closed form. What else a model multiplies (recurrent and transposed layers,
parameters of its own) is what PyTorch's FLOP counter sees beyond them; it does not depend on ranks. Departure, as in
the papers' tables: the products of queries, keys and values inside of attention layers are not counted.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro.errors import UserError, check_name
from fedmaestro.lod import LoDLayer, LoDMultiheadAttention, max_ranks, set_ranks
from fedmaestro.lod.layers import check_rank
from fedmaestro.models.shape import Inputs, InputShape, example_inputs
from fedmaestro.submodel import num_elements, shapes_of
from fedmaestro.tasks.goal import outputs_of
from fedmaestro.threads import one_thread

BYTES_PER_SCALAR = 4

_CLOSED_FORM = (LoDLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS = {
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
}
"""Operators that multiply activations with each other."""


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
    """False for layers that see the examples: their input gradient is never computed."""

    def macs(self, rank: int) -> int:
        """Forward: ``P·O·I`` dense, ``P·r·(I + O)`` in LoD form."""
        if self.max_rank is None:
            return self.positions * self.out * self.inner
        return self.positions * rank * (self.inner + self.out)

    def train_macs(self, rank: int) -> int:
        """Forward, weight gradients and input gradients: each costs as much as the forward."""
        inner_part = self.macs(rank) if self.max_rank is None else self.positions * rank * self.inner
        return 3 * self.macs(rank) - (0 if self.input_needs_grad else inner_part)

    def saved_macs(self, rank: int) -> tuple[int, int]:
        """Return what a step saves where U is frozen, and where V is; nothing of a dense layer.

        The gradient of the frozen factor's weights; in a layer that sees the examples, nobody needs the gradient of the
        hidden ``(P, r)`` either when V is frozen.
        """
        if self.max_rank is None:
            return 0, 0
        outer, inner = self.positions * rank * self.out, self.positions * rank * self.inner
        return outer, inner + (0 if self.input_needs_grad else outer)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One model's layers, and what does not depend on ranks."""

    layers: tuple[LayerTrace, ...]
    fixed_params: int
    """Parameters outside U and V: dense layers, biases, norms."""
    fixed_activation_bytes: int
    """Bytes per example that autograd keeps for the backward pass, without the hidden ``(P, r)`` of LoD layers."""
    fixed_macs: int = 0
    """Forward MACs that no layer's closed form knows."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a submodel costs a device."""

    params: int
    macs_per_example: int
    train_macs_per_example: int
    saved_macs: tuple[int, int] = (0, 0)
    """Of these, what a step saves where all U are frozen, and where all V are."""
    train_memory_bytes: int
    """Peak of one training step: parameters, gradients, optimiser state, activations of a batch."""
    activation_bytes: int
    """The activations among them."""
    download_bytes: int
    upload_bytes: int


def trace(model: nn.Module, inputs: Inputs | InputShape) -> Trace:
    """Measure a copy of ``model`` at full rank, once with batches of one and two examples; values do not matter."""
    model = copy.deepcopy(model)
    if any(x.is_meta for x in model.parameters()):
        model = model.to_empty(device="cpu")
    set_ranks(model, max_ranks(model))
    with one_thread(), torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        layers = _layer_traces(model, inputs)
        fixed_macs = _counted_macs(model, inputs) - sum(x.macs(x.max_rank or 0) for x in layers)
        kept = _saved_bytes(model, inputs, 2) - _saved_bytes(model, inputs, 1)
    hidden = sum(layer.positions * (layer.max_rank or 0) for layer in layers)
    pairs = sum((layer.max_rank or 0) * (layer.inner + layer.out) for layer in layers)
    return Trace(
        layers=tuple(layers),
        fixed_params=num_elements(shapes_of(model)) - pairs,
        fixed_macs=max(fixed_macs, 0),
        fixed_activation_bytes=kept - BYTES_PER_SCALAR * hidden,
    )


def cost(traced: Trace, ranks: Mapping[str, int], *, batch_size: int, slots: int = 0) -> Cost:
    """Return the cost at ``ranks``; every figure is monotone in every rank.

    Args:
        traced: the model.
        ranks: of every LoD layer.
        batch_size: examples of a training step.
        slots: tensors that the local optimiser keeps for each parameter's (1: momentum).

    Raises:
        UserError: ``ranks`` does not hold one rank in ``0 … R`` for each LoD layer of the trace and nothing else.
    """
    lod = [layer for layer in traced.layers if layer.max_rank is not None]
    rank = {layer.name: 0 for layer in traced.layers} | _checked_ranks(traced, ranks)
    params = traced.fixed_params + sum(rank[x.name] * (x.inner + x.out) for x in lod)
    hidden = sum(rank[x.name] * x.positions for x in lod)
    activation_bytes = traced.fixed_activation_bytes + BYTES_PER_SCALAR * hidden
    copies = 2 + slots  # parameters, gradients, what the optimiser keeps
    return Cost(
        params=params,
        macs_per_example=traced.fixed_macs + sum(x.macs(rank[x.name]) for x in traced.layers),
        train_macs_per_example=3 * traced.fixed_macs + sum(x.train_macs(rank[x.name]) for x in traced.layers),
        saved_macs=_sums([x.saved_macs(rank[x.name]) for x in lod]),
        train_memory_bytes=copies * BYTES_PER_SCALAR * params + batch_size * activation_bytes,
        activation_bytes=batch_size * activation_bytes,
        download_bytes=BYTES_PER_SCALAR * params,
        upload_bytes=BYTES_PER_SCALAR * params,
    )


def _sums(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def with_kept_entries(dense: Cost, *, kept: int, of: int) -> Cost:
    """Return the cost of a device that keeps some entries of its weights and has no sparse kernels.

    It computes, and holds in memory, what the dense model does. It is sent the kept entries, and where they are: a bit
    for each of all entries, unless it keeps all; it sends the kept entries back, whose places the server knows.

    Args:
        dense: of the whole tensors.
        kept: entries that it keeps.
        of: all of these tensors' entries.
    """
    params = dense.params - (of - kept)
    places = math.ceil(of / 8) if kept < of else 0
    return replace(
        dense,
        params=params,
        download_bytes=BYTES_PER_SCALAR * params + places,
        upload_bytes=BYTES_PER_SCALAR * params,
    )


def _checked_ranks(traced: Trace, ranks: Mapping[str, int]) -> dict[str, int]:
    full = {layer.name: layer.max_rank for layer in traced.layers if layer.max_rank is not None}
    for name in ranks:
        check_name("LoD layer", name, full)
    if missing := [name for name in full if name not in ranks]:
        raise UserError(f"no rank for LoD layer {missing[0]!r}: the cost needs one for each of {', '.join(full)}")
    return {name: check_rank(ranks[name], max_rank, name) for name, max_rank in full.items()}


def _layer_traces(model: nn.Module, inputs: Inputs | InputShape) -> list[LayerTrace]:
    traces: dict[str, LayerTrace] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            is_lod = isinstance(module, LoDLayer)
            out, inner = _fan(module)
            before = traces.get(name)  # of a layer that the model uses more than once
            traces[name] = LayerTrace(
                name=name,
                out=out,
                inner=inner,
                # of one example, wherever its dimension is
                positions=output.numel() // out + (before.positions if before else 0),
                max_rank=module.max_rank if is_lod else None,  # type: ignore[arg-type]
                input_needs_grad=inputs[0].requires_grad or (before is not None and before.input_needs_grad),
            )

        return hook

    counted = {n: m for n, m in model.named_modules() if isinstance(m, _CLOSED_FORM)}
    handles = [module.register_forward_hook(record(name)) for name, module in counted.items()]
    try:
        model(*example_inputs(inputs, 1))
    finally:
        for handle in handles:
            handle.remove()
    if unused := [name for name, m in counted.items() if isinstance(m, LoDLayer) and name not in traces]:
        raise UserError(
            f"layer {unused[0]!r} is never called by the model's forward pass: add it to model.keep-dense, or take it "
            "out of the model"
        )
    return list(traces.values())


def _counted_macs(model: nn.Module, inputs: Inputs | InputShape) -> int:
    """Return the MACs that PyTorch's FLOP counter sees, without the products of activations inside of attention."""
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about TF32, on whatever machine
        # MKL-DNN has kernels of its own for recurrent layers, which the counter does not know.
        with torch.backends.mkldnn.flags(enabled=False), counter:
            model(*example_inputs(inputs, 1))
    counts = counter.get_flop_counts()
    root = type(model).__name__
    attention = [
        f"{root}.{name}"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | LoDMultiheadAttention)
    ]
    inside = sum(flops for name in attention for op, flops in counts.get(name, {}).items() if op in _PRODUCTS)
    return (sum(counts["Global"].values()) - inside) // 2


def _fan(module: nn.Module) -> tuple[int, int]:
    """Return ``O`` and ``I`` (times kernel) of a layer."""
    if isinstance(module, LoDLayer):
        return module.u.shape[0], math.prod(module.v.shape[1:])
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def _saved_bytes(model: nn.Module, inputs: Inputs | InputShape, batch: int) -> int:
    """Return the bytes of distinct storages that autograd keeps for one loss, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = outputs_of(model(*example_inputs(inputs, batch)))
        logits = logits.flatten(0, -2) if logits.dim() > 1 else logits[:, None]
        # Keep the graph alive while counting: a freed storage's address could be reused.
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    del loss
    return sum(storages.values())
