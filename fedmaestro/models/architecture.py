"""One model in one form (LoD or dense) and all of its nested sizes.

A *size* is what a tier trains: one rank per LoD layer, or a width. Sizes of one architecture form a chain: each is the
leading block of every larger one.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError, check_name
from fedmaestro.models import MODELS, InputShape, ModelSpec
from fedmaestro.models.exits import Answer, classifiers, with_exits
from fedmaestro.models.scaler import add_scalers
from fedmaestro.models.shape import Inputs, example_inputs, inputs_of
from fedmaestro.models.static_norm import StaticNorm, has_static_norms, use_static_batch_norms, use_static_norms
from fedmaestro.models.steps import leave_out, use_steps
from fedmaestro.models.width import LeadingGroupNorm, Scale, part_of_rank
from fedmaestro.submodel import Shapes, State, load, shapes_of, state_of
from fedmaestro.threads import one_thread

Form = Literal["lod", "dense"]
Scales = Literal["width", "depth", "both", "blocks", "entries"]
SHARES = 1000
"""Steps of the share of entries that a submodel keeps."""
Norm = Literal["group", "static"]
FULL = Fraction(1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Ranks per LoD layer, with the network's width where that is cut too; or a dense model's width, depth or both.

    What does not apply is None.
    """

    ranks: Mapping[str, int] | None = None
    width: Fraction | None = None
    depth: int | None = None
    """Blocks of a network with early exits, or those that it could do without and has."""
    share: Fraction | None = None
    """Part of the weights' entries that are kept, by magnitude (``masks``)."""

    def describe(self) -> dict[str, int | float]:
        """Return what ``summary.json`` shows: ``{layer: rank, …}``, or ``width``, ``depth`` or ``share``, rounded."""
        parts = {"width": self.width, "depth": self.depth, "share": self.share}
        rounded = {key: round(float(x), 4) if key != "depth" else int(x) for key, x in parts.items() if x is not None}
        return dict(self.ranks or {}) | rounded


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model of ``MODELS`` for examples of one shape.

    Attributes:
        name: of the row in ``MODELS``.
        input_shape: of the first input; ``(C, H, W)`` of images.
        num_classes: classes, size of the vocabulary, or values of a regression.
        inputs: what the network is called with; by default what ``inputs_of`` makes of ``input_shape``.
        spec: the row, looked up once: user code may give the name another meaning later.
        form: ``lod`` (factor pairs, sizes are ranks) or ``dense`` (plain layers, sizes are widths).
        keep_dense: layers that are not factorised: names, ``first-conv``, ``head`` or ``none``, separated by spaces.
        scaler: in training, divide the outputs of narrower layers by their width ratio (``scaler``); dense form only.
        scales: what makes a dense form smaller: its width, its depth (the blocks of a network with early exits), or
            both, in the same proportion; its width and how many it has of the blocks that it could do without
            (``steps``); or how many entries of its weights are not zero, in tensors of one shape.
        exits: what a network with early exits puts out (``exits``); none: it has none, and no depth.
        norm: what image models normalise by: GroupNorm, or BatchNorm without running statistics (``static_norm``),
            which ``calibrate`` prepares for evaluation. The state has the same names and shapes under both.
        narrows: whether the sizes of the LoD form cut channels together with ranks: at width ``w``, the ranks are the
            part ``w ** rank_power`` of what the narrower network's layers can have, so a layer costs about
            ``w ** (2 + rank_power)``.
        rank_power: see there; 0: channels alone are cut.
        width: part of the model's channels that the whole network has; widths of sizes are parts of it.
    """

    name: str
    input_shape: InputShape
    num_classes: int
    form: Form = "lod"
    keep_dense: str = "first-conv head"
    scaler: bool = False
    norm: Norm = "group"
    scales: Scales = "width"
    exits: Answer = "none"
    inputs: Inputs = ()
    width: Fraction = FULL
    narrows: bool = False
    rank_power: Fraction = FULL
    spec: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", MODELS[self.name])
        if not self.inputs:
            object.__setattr__(self, "inputs", inputs_of(self.input_shape))

    @property
    def own(self) -> bool:
        """Whether the model is the user's: it may draw, and do whatever needs real tensors, where it is made."""
        return self.spec.initialize is None

    @cached_property
    def full(self) -> nn.Module:
        """The whole model on the ``meta`` device (shapes without memory)."""
        if self.own:
            return self._formed(self._on_meta())
        with torch.device("meta"):
            return self._formed(self._dense(FULL))

    @cached_property
    def _any(self) -> nn.Module:
        """A model of the user's as it was made for some seed: for shapes and constants."""
        return self._initial(0)

    def _on_meta(self) -> nn.Module:
        model = copy.deepcopy(self._any)
        ties = _ties(model)
        return _tied(model.to("meta"), ties)

    @property
    def kept_dense(self) -> dict[str, str]:
        """Weighted layers that are not factorised because they cannot be, and why; none for a dense model."""
        if self.form == "dense":
            return {}
        if self.own:
            return lod.unfactorisable(self._any)
        with torch.device("meta"):
            return lod.unfactorisable(self._dense(FULL))

    @property
    def has_norms(self) -> bool:
        """Whether the network normalises its channels: GroupNorm, or the static norm in its place."""
        return any(isinstance(x, nn.GroupNorm | LeadingGroupNorm | StaticNorm) for x in self.full.modules())

    @cached_property
    def can_narrow(self) -> bool:
        """Whether there is a narrower form of the network."""
        return bool(self._channel_counts())

    @cached_property
    def needs_calibration(self) -> bool:
        """Whether evaluation needs the statistics of ``static_norm.calibrate``."""
        return has_static_norms(self.full)

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
            return state_of(self._formed(model))

    def _initial(self, seed: int) -> nn.Module:
        draw = self.spec.initialize
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
        """Return the size at ``fraction`` of the chain.

        Ranks ``max(1, ⌊fraction · R⌋)``; that width, with ranks if ``narrows``; that depth, ``max(1, ⌊fraction · D⌋)``
        of ``D`` blocks; or that width and depth ``⌈fraction · D⌉``, or as many of ``D`` blocks that it can do without;
        that share of entries.
        """
        if self.form == "dense" and self.scales == "entries":
            return Size(share=fraction)
        if self.form == "dense" and self.scales == "depth":
            return Size(depth=max(1, math.floor(fraction * len(self.spec.blocks))))
        if self.form == "dense":
            blocks = {"both": self.spec.blocks, "blocks": self.spec.optional}.get(self.scales, ())
            return Size(width=fraction, depth=math.ceil(fraction * len(blocks)) if blocks else None)
        if not self.narrows:
            ranks = {name: max(1, math.floor(fraction * rank)) for name, rank in lod.max_ranks(self.full).items()}
            return Size(ranks=ranks)
        full = lod.max_ranks(self._narrowed(fraction))
        ranks = {name: max(1, part_of_rank(rank, fraction, self.rank_power)) for name, rank in full.items()}
        return Size(ranks=ranks, width=fraction)

    def fractions(self) -> list[Fraction]:
        """Return, ascending, every fraction at which the size changes."""
        if self.form == "dense" and self.scales == "entries":
            return [Fraction(count, SHARES) for count in range(1, SHARES + 1)]
        if self.form == "dense" and self.scales == "depth":
            return [Fraction(depth, len(self.spec.blocks)) for depth in range(1, len(self.spec.blocks) + 1)]
        counts = self._channel_counts() if self.form == "dense" or self.narrows else set()
        counts |= set(lod.max_ranks(self.full).values()) if self.form == "lod" else set()
        steps = {Fraction(j, count) for count in counts for j in range(1, count + 1)}
        return sorted(steps) or [FULL]

    def build(self, size: Size) -> nn.Module:
        """Return the model of this size on the ``meta`` device, with tensors of that size only."""
        if self.form == "dense":
            with torch.device("meta"):
                return self.with_constants(self._dense(size.width or FULL, size.depth))
        whole = self.full if size.width is None else self._narrowed(size.width)
        return self.with_constants(lod.truncate(whole, size.ranks or {}))

    def _narrowed(self, width: Fraction) -> nn.Module:
        """Return the LoD form of the narrower network, at its full ranks, on ``meta``."""
        with torch.device("meta"):
            return self._formed(self._dense(width))

    def materialize(self, size: Size) -> nn.Module:
        """Return the model of this size on the CPU with uninitialised tensors: load a state before use."""
        return self.on_cpu(self.build(size))

    def on_cpu(self, model: nn.Module) -> nn.Module:
        """Give a model of this architecture memory on the CPU, with uninitialised tensors."""
        ties = _ties(model)
        return self.with_constants(_tied(model.to_empty(device="cpu"), ties))

    def measurable(self, size: Size | None = None) -> nn.Module:
        """Return the model (None: the whole one) on the CPU, for measurements to which values do not matter."""
        model = copy.deepcopy(self.full) if size is None else self.build(size)
        if not self.own:
            return model.to_empty(device="cpu")
        model = self.on_cpu(model)
        for tensor in state_of(model).values():
            tensor.zero_()
        return model

    def with_constants(self, model: nn.Module) -> nn.Module:
        """Give a model of this architecture the buffers that are no part of its state (a table of positions, say)."""
        for name, tensor in self._constants.items():
            path, _, buffer = name.rpartition(".")
            model.get_submodule(path).register_buffer(buffer, tensor.clone(), persistent=False)
        return model

    @cached_property
    def _constants(self) -> State:
        state = self.full.state_dict()
        if not self.own or all(name in state for name, _ in self.full.named_buffers()):
            return {}
        return {name: tensor for name, tensor in self._any.named_buffers() if name not in state}

    def size_of(self, state: Mapping[str, Tensor]) -> Size:
        """Return the size that the factors of ``state`` have (a shrunken model's ranks); dense models are whole."""
        if self.form == "dense":
            return self.full_size
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
                counts.add(super().__call__(channels))
                return super().__call__(channels)

        if self.spec.scales:
            with torch.device("cpu" if self.own else "meta"), torch.random.fork_rng(devices=[]):
                self.spec.build(self.input_shape, self.num_classes, Recorder(self.width))
        return counts

    def _dense(self, width: Fraction, depth: int | None = None) -> nn.Module:
        model = self.spec.build(self.input_shape, self.num_classes, Scale(self.width * width))
        if self.exits != "none":
            ends = self.spec.blocks
            deep = len(ends) if depth is None else depth
            model = with_exits(model, ends, deep, self.input_shape, self.num_classes, self.exits)
        if self.own:
            _settle(model, self.inputs, self.name)
            use_static_batch_norms(model)
        if self.scales == "blocks":
            use_steps(model)
            leave_out(model, self.spec.optional, depth)
        if self.norm == "static":
            use_static_norms(model)
        if self.scaler and width != FULL:
            add_scalers(model, self.full)
        return model

    def _formed(self, dense: nn.Module) -> nn.Module:
        return dense if self.form == "dense" else lod.factorize(dense, dense_layers(dense, self.keep_dense))


@torch.no_grad()
def _settle(model: nn.Module, inputs: Inputs, name: str) -> None:
    """Let the lazy modules of a new model see an example, which gives them their shapes and their start."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} is {type(model).__name__}: its row must make a torch.nn.Module")
    if any(
        isinstance(x, nn.UninitializedParameter | nn.UninitializedBuffer)
        for x in (*model.parameters(), *model.buffers())
    ):
        model(*example_inputs(inputs, 2))


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the parameters that are the same as an earlier one: ``name -> first name``."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: known for name, x in named if (known := first.setdefault(id(x), name)) != name}


def _tied(model: nn.Module, ties: Mapping[str, str]) -> nn.Module:
    """Return ``model`` with the ties that taking it to another device has undone."""
    for name, first in ties.items():
        path, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(path), parameter, model.get_parameter(first))
    return model


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dense_layers(model: nn.Module, keep_dense: str) -> list[str]:
    """Return the names of the layers that stay dense.

    ``keep_dense`` says which: ``first-conv``, ``head`` (last linear layer, and early exits), ``none`` and plain names.
    Those that cannot be factorised are dense in any case.
    """
    convs = [name for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {"first-conv": convs[:1], "head": classifiers(model), "none": []}
    names: dict[str, None] = {}
    for word in keep_dense.replace(",", " ").split():
        check_name("layer in model.keep-dense", word, [*groups, *convs, *linears])
        names.update(dict.fromkeys(groups.get(word, [word])))
    known = dict(model.named_modules())
    cannot = [name for name in lod.unfactorisable(model) if lod.is_candidate(known[name])]
    return list(names | dict.fromkeys(cannot))
