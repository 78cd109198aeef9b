"""One model in one form (LoD or dense) and all of its nested sizes.

A *size* is what a tier trains: one rank per LoD layer, or a width. Sizes of one architecture form a chain: each is the
leading block of every larger one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import check_name
from fedmaestro.models import MODELS, InputShape
from fedmaestro.models.scaler import add_scalers
from fedmaestro.models.static_norm import StaticNorm, use_static_norms
from fedmaestro.models.width import LeadingGroupNorm, Scale
from fedmaestro.submodel import Shapes, State, load, shapes_of
from fedmaestro.threads import one_thread

Form = Literal["lod", "dense"]
Norm = Literal["group", "static"]
FULL = Fraction(1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Ranks per LoD layer, or the width of a dense model; the other one is None."""

    ranks: Mapping[str, int] | None = None
    width: Fraction | None = None

    def describe(self) -> dict[str, int | float]:
        """Return what ``summary.json`` shows: ``{layer: rank, …}`` or ``{"width": w}``, rounded."""
        return {"width": round(float(self.width), 4)} if self.width is not None else dict(self.ranks or {})


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model of ``MODELS`` for images ``(C, H, W)`` or token sequences ``(L,)``.

    Attributes:
        num_classes: classes, or the size of the vocabulary.
        form: ``lod`` (factor pairs, sizes are ranks) or ``dense`` (plain layers, sizes are widths).
        keep_dense: layers that are not factorised: names, ``first-conv``, ``head`` or ``none``, separated by spaces.
        scaler: in training, divide the outputs of narrower layers by their width ratio (``scaler``); dense form only.
        norm: what image models normalise by: GroupNorm, or BatchNorm without running statistics (``static_norm``),
            which ``calibrate`` prepares for evaluation. The state has the same names and shapes under both.
    """

    name: str
    input_shape: InputShape
    num_classes: int
    form: Form = "lod"
    keep_dense: str = "first-conv head"
    scaler: bool = False
    norm: Norm = "group"

    @cached_property
    def full(self) -> nn.Module:
        """The whole model on the ``meta`` device (shapes without memory)."""
        with torch.device("meta"):
            return self._formed(self._dense(FULL))

    @property
    def has_norms(self) -> bool:
        """Whether the network normalises its channels: GroupNorm, or the static norm in its place."""
        return any(isinstance(x, nn.GroupNorm | LeadingGroupNorm | StaticNorm) for x in self.full.modules())

    @cached_property
    def full_size(self) -> Size:
        """All ranks, or width 1."""
        return self.size_at(FULL)

    def initial_state(self, seed: int) -> State:
        """Return the initial state that follows from the seed, the same function in both forms.

        The row of ``MODELS`` draws it, or the model itself does, from PyTorch's generator. Computed with one thread:
        the factorisation's rounding, and with it a run's hash, may not depend on the cores.
        """
        model = self._initial(seed)
        with one_thread():
            return {name: tensor.detach() for name, tensor in self._formed(model).state_dict().items()}

    def _initial(self, seed: int) -> nn.Module:
        draw = MODELS[self.name].initialize
        if draw is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._dense(FULL)
        with torch.device("meta"):
            model = self._dense(FULL)
        model = model.to_empty(device="cpu")
        draw(model, torch.Generator().manual_seed(seed))
        return model

    def size_at(self, fraction: Fraction) -> Size:
        """Return the size at ``fraction`` of the chain: ranks ``max(1, ⌊fraction · R⌋)``, or that width."""
        if self.form == "dense":
            return Size(width=fraction)
        full = lod.max_ranks(self.full)
        return Size(ranks={name: max(1, math.floor(fraction * rank)) for name, rank in full.items()})

    def fractions(self) -> list[Fraction]:
        """Return, ascending, every fraction at which the size changes."""
        counts = self._channel_counts() if self.form == "dense" else set(lod.max_ranks(self.full).values())
        steps = {Fraction(j, count) for count in counts for j in range(1, count + 1)}
        return sorted(steps) or [FULL]

    def build(self, size: Size) -> nn.Module:
        """Return the model of this size on the ``meta`` device, with tensors of that size only."""
        if self.form == "dense":
            with torch.device("meta"):
                return self.with_constants(self._dense(size.width or FULL))
        return self.with_constants(lod.truncate(self.full, size.ranks or {}))

    def materialize(self, size: Size) -> nn.Module:
        """Return the model of this size on the CPU with uninitialised tensors: load a state before use."""
        return self.on_cpu(self.build(size))

    def on_cpu(self, model: nn.Module) -> nn.Module:
        """Give a model of this architecture memory on the CPU, with uninitialised tensors."""
        return self.with_constants(model.to_empty(device="cpu"))

    def with_constants(self, model: nn.Module) -> nn.Module:
        """Give a model of this architecture the buffers that are no part of its state (a table of positions, say)."""
        for name, tensor in self._constants.items():
            path, _, buffer = name.rpartition(".")
            model.get_submodule(path).register_buffer(buffer, tensor.clone(), persistent=False)
        return model

    @cached_property
    def _constants(self) -> State:
        state = self.full.state_dict()
        if all(name in state for name, _ in self.full.named_buffers()):
            return {}
        return {name: tensor for name, tensor in self._initial(0).named_buffers() if name not in state}

    def size_of(self, state: Mapping[str, Tensor]) -> Size:
        """Return the size that the factors of ``state`` have (a shrunken model's ranks); dense models are whole."""
        if self.form == "dense":
            return Size(width=FULL)
        return Size(ranks={name: state[f"{name}.v"].shape[0] for name in lod.max_ranks(self.full)})

    def with_state(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the model, of whatever size, that holds ``state``."""
        model = self.materialize(self.size_of(state))
        load(model, state)
        return model

    def shapes(self, size: Size) -> Shapes:
        """Return the shape of every tensor of the submodel of this size."""
        return shapes_of(self.build(size))

    def _channel_counts(self) -> set[int]:
        """Return every channel count that widths scale."""
        counts: set[int] = set()

        class Recorder(Scale):
            def __call__(self, channels: int) -> int:
                counts.add(channels)
                return channels

        with torch.device("meta"):
            MODELS[self.name].build(self.input_shape, self.num_classes, Recorder())
        return counts

    def _dense(self, width: Fraction) -> nn.Module:
        model = MODELS[self.name].build(self.input_shape, self.num_classes, Scale(width))
        if self.norm == "static":
            use_static_norms(model)
        if self.scaler and width != FULL:
            add_scalers(model, self.full)
        return model

    def _formed(self, dense: nn.Module) -> nn.Module:
        return dense if self.form == "dense" else lod.factorize(dense, dense_layers(dense, self.keep_dense))


def dense_layers(model: nn.Module, keep_dense: str) -> list[str]:
    """Resolve ``keep_dense`` to layer names: ``first-conv``, ``head`` (last linear layer), ``none`` and plain names."""
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {"first-conv": convs[:1], "head": linears[-1:], "none": []}
    names: dict[str, None] = {}
    for word in keep_dense.replace(",", " ").split():
        check_name("layer in model.keep-dense", word, [*groups, *convs, *linears])
        names.update(dict.fromkeys(groups.get(word, [word])))
    return list(names)
