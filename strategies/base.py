"""How submodels become the next global state: the records that aggregation rules are made of.

An aggregation is a record of pure functions on states (``dict[str, Tensor]``)::

    p = agg.init(global_state)
    p = agg.add(p, submodel_state, weight)      # once per device, on the host that trained it
    p = agg.merge(p, q)                         # on hosts and on the server, along one fixed tree (``rounds.tree``)
    new = agg.finish(p, global_state)

Laws (tests/laws): ``merge`` is associative and commutative up to rounding in float64, ``merge(p, init(g)) == p``, and
splitting the same ``add`` calls over several partial results changes nothing but that rounding; along a fixed tree,
results are bit-identical, whoever computes which part of it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial as bound
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fedmaestro.submodel import Shape, Shapes, Signature, State, leading_block, shapes_of, signature

S = TypeVar("S")
"""What the reduction of a rule makes of devices' tensors: a ``State`` for most."""


@dataclass(frozen=True)
class Block(Generic[S]):
    """What the devices of one submodel size amount to.

    Attributes:
        sums: ``Σ weight · tensor`` in float64 (which keeps means of equal tensors exact), or whatever else the
            reduction of the rule makes of the devices' tensors.
        weight: ``Σ weight``.
        devices: how many.
    """

    sums: S
    weight: float
    devices: int


@dataclass(frozen=True)
class Sizes:
    """The submodel sizes that are known.

    Attributes:
        known: each once, in the order in which they came.
        complete: whether no other will come. Reductions may then add up across devices what a further size would have
            to tell apart (``partitioned_product``).
    """

    known: tuple[Signature, ...] = ()
    complete: bool = False

    def __or__(self, other: "Sizes") -> "Sizes":
        known = (*self.known, *(size for size in other.known if size not in self.known))
        return Sizes(known, self.complete or other.complete)


@dataclass(frozen=True)
class Partial(Generic[S]):
    """A partial result: one block per submodel size, so its memory is that of the sizes, never that of the devices.

    Attributes:
        blocks: of the sizes that had devices.
        sizes: those, and whatever else was announced (``Aggregation.init``).
    """

    blocks: Mapping[Signature, Block[S]] = field(default_factory=dict)
    sizes: Sizes = Sizes()

    def __iter__(self) -> Iterator[tuple[Shapes, Block[S]]]:
        """Yield the shapes and the block of every size that has devices, in the order of ``sizes``."""
        for size in self.sizes.known:
            if size in self.blocks:
                yield dict(size), self.blocks[size]

    @property
    def devices(self) -> int:
        """How many devices are in it."""
        return sum(block.devices for block in self.blocks.values())

    @property
    def weight(self) -> float:
        """``Σ weight`` of all devices."""
        return sum(block.weight for _, block in self)


SUMS = "sums"
Parts = Mapping[str, State]
"""Sums as they travel: states under the names of their kinds, of which most rules have ``SUMS`` only."""


@dataclass(frozen=True, kw_only=True)
class Reduction(Generic[S]):
    """How the devices of one submodel size add up to ``Block.sums``."""

    lift: Callable[[Mapping[str, Tensor], float, Mapping[str, Tensor] | None], S]
    """``(submodel, weight, start) -> sums`` of one device; ``start`` is what it was sent (None: not known)."""
    add: Callable[[S, S, Sizes], S]
    """``(left, right, sizes of the partial result) -> sums``; neither is changed."""
    pack: Callable[[S], Parts]
    """``sums -> states`` that a message carries, bit for bit; of one size's devices on one host."""
    unpack: Callable[[Parts, Signature], S]
    """``(states, the size of the devices) -> sums``, the inverse of ``pack``."""
    why_not: Callable[[Parts, float, float], str | None] = lambda _parts, _weight, _radius: None
    """``(states, weight, radius) -> reason``: why devices of this weight, none of whose submodels has a norm above
    ``radius``, could not have sent these states, whose names, shapes and types are right. None: they could."""
    keeps_devices: bool = False
    """Whether sums hold every device by itself (``each_device``): their memory is that of the devices."""


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> State:  # noqa: ARG001
    # One pass over a copy; the tensors may be the resident model's own.
    return {name: tensor.to(torch.float64, copy=True).mul_(weight) for name, tensor in submodel.items()}


def _add(left: State, right: State, sizes: Sizes) -> State:  # noqa: ARG001
    return {name: tensor + right[name] for name, tensor in left.items()}


WEIGHTED_SUMS: Reduction[State] = Reduction(
    lift=_lift, add=_add, pack=lambda sums: {SUMS: sums}, unpack=lambda parts, _: dict(parts[SUMS])
)
"""``Σ weight · tensor``, for every rule that averages entries."""


def by_examples(submodel: Mapping[str, Tensor], examples: float) -> float:  # noqa: ARG001
    """Return the weight of a device: its number of examples."""
    return examples


def equally(submodel: Mapping[str, Tensor], examples: float) -> float:  # noqa: ARG001
    """Return the weight of a device where all weigh the same: 1."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Aggregation(Generic[S]):
    """How submodels become the next global state; ``finish`` is the rule, the rest is shared."""

    name: str
    finish: Callable[..., State]
    """``(partial, global_state) -> new global state``; new tensors, same names, shapes and dtypes. What ``settings``
    name comes as keywords."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Setting of each further parameter of ``finish``."""
    reduction: Reduction[S] = WEIGHTED_SUMS  # type: ignore[assignment]
    weigh: Callable[[Mapping[str, Tensor], float], float] = by_examples
    """``(submodel, examples) -> weight`` of a device. Under a rule that looks at tensors, devices are sent one by one,
    so that the server weighs them itself."""
    mixes: bool = False
    """Whether the rule moves entries that no device covered (a re-ordering does)."""
    whole_factors: bool = False
    """Whether the rule takes products of devices' factors, which must then be whole but for their columns."""
    rebases: bool = False
    """Whether the rule gives trained factor pairs another basis, in which nobody's memory of them holds."""
    changed_rows: Callable[[Block[S], str], Tensor] | None = None
    """``(block, name) -> bool (rows,)``, or of the tensor's shape: what counts as covered; None: all that devices
    hold."""
    forbids: Mapping[str, str] = field(default_factory=dict)
    """Settings that must stay zero or unset under this rule, and why: ends the sentence ``KEY=VALUE …``."""
    summary: str
    source: str

    @property
    def alone(self) -> bool:
        """Whether devices are sent one by one: the server weighs each itself, or tells them from each other."""
        return self.weigh not in (by_examples, equally) or self.reduction.keeps_devices

    def weight_of(self, examples: Iterable[float]) -> float:
        """Return what devices of so many examples weigh together, where their tensors do not matter."""
        return math.fsum(self.weigh({}, count) for count in examples)

    def of(self, value: Callable[[str], Any]) -> "Aggregation[S]":
        """Return the rule whose parameters have the ``value`` of their settings."""
        if not self.settings:
            return self
        return replace(self, finish=bound(self.finish, **{name: value(key) for name, key in self.settings.items()}))

    def init(self, global_state: Mapping[str, Tensor], sizes: Sequence[Signature] = ()) -> Partial[S]:  # noqa: ARG002
        """Return the empty partial result.

        Args:
            global_state: the server's.
            sizes: all sizes that will come, where they are known; a rule whose reduction compresses only then does so
                (``partitioned_product``).
        """
        return Partial(sizes=Sizes(tuple(dict.fromkeys(sizes)), complete=bool(sizes)))

    def add(
        self,
        partial: Partial[S],
        submodel: Mapping[str, Tensor],
        weight: float,
        *,
        start: Mapping[str, Tensor] | None = None,
    ) -> Partial[S]:
        """Return ``partial`` with one device's submodel added.

        Args:
            partial: so far; not changed.
            submodel: the device's tensors after training.
            weight: its number of examples.
            start: what the device was sent, for rules that look at what it changed.
        """
        weight = float(self.weigh(submodel, weight))
        block = Block(self.reduction.lift(submodel, weight, start), weight, 1)
        return self._with(partial, signature(shapes_of(submodel)), block)

    def merge(self, left: Partial[S], right: Partial[S]) -> Partial[S]:
        """Return the sum of two partial results; neither is changed."""
        merged = replace(left, sizes=left.sizes | right.sizes)
        for size, block in right.blocks.items():
            merged = self._with(merged, size, block)
        return merged

    def _with(self, partial: Partial[S], size: Signature, block: Block[S]) -> Partial[S]:
        sizes = partial.sizes | Sizes((size,))
        if (known := partial.blocks.get(size)) is not None:
            sums = self.reduction.add(known.sums, block.sums, sizes)
            block = Block(sums, known.weight + block.weight, known.devices + block.devices)
        return Partial({**partial.blocks, size: block}, sizes)

    def pack(self, partial: Partial[S]) -> Parts:
        """Return what a host uploads of its devices, all of one size; nothing where there are none."""
        return {
            kind: state for block in partial.blocks.values() for kind, state in self.reduction.pack(block.sums).items()
        }

    def unpack(
        self, parts: Parts, size: Signature, weight: float, devices: int, sizes: Sequence[Signature] = ()
    ) -> Partial[S]:
        """Return the partial result that ``pack`` was given.

        Args:
            parts: what it returned.
            size: of these devices.
            weight: ``Σ weight``.
            devices: how many.
            sizes: those that the partial result was made with (``init``).
        """
        known = Sizes(tuple(dict.fromkeys((*sizes, size))), complete=bool(sizes))
        return Partial({size: Block(self.reduction.unpack(parts, size), weight, devices)}, known)

    def contributors(self, partial: Partial[S], global_state: Mapping[str, Tensor]) -> State:
        """Return how many devices each entry of the global state comes from: float32, the shapes of ``global_state``.

        Where a rule goes by changed rows, those of a size count with all of its devices when one of them changed them.
        """
        counts = {name: torch.zeros_like(old, dtype=torch.float32) for name, old in global_state.items()}
        for shapes, block in partial:
            if self.mixes:
                # A pair is factored anew as a whole, also where devices send one factor only.
                layers = {name[:-2] for name in shapes if name.endswith((".u", ".v"))}
                for name in global_state:
                    if name in shapes or (name.endswith((".u", ".v")) and name[:-2] in layers):
                        counts[name] += block.devices
            else:
                for name, shape in shapes.items():
                    if name not in counts:
                        continue
                    rows = self.changed_rows(block, name) if self.changed_rows else torch.ones(shape[:1])
                    add_to_leading_block(counts[name], block.devices * as_column(rows, len(shape)).float(), shape)
        return counts


AnyAggregation = Aggregation[Any]
"""A rule whose sums only it looks into."""
AnyPartial = Partial[Any]


def factor_layers(state: Collection[str]) -> list[str]:
    """Return the layers whose factors ``<layer>.u (O, R)`` and ``<layer>.v (R, I…)`` are in ``state``."""
    layers = [name.removesuffix(".u") for name in state if name.endswith(".u")]
    return [layer for layer in layers if f"{layer}.v" in state]


def add_to_leading_block(total: Tensor, block: Tensor | float, shape: Shape) -> None:
    """Add ``block`` in place to the leading block of ``total``."""
    leading_block(total, shape).add_(torch.as_tensor(block, dtype=total.dtype))


def scaled_columns(state: Mapping[str, Tensor], layer: str, factors: Tensor) -> State:
    """Return the factor pair of ``layer`` with column ``j`` of U and row ``j`` of V times ``factors (R,)``."""
    u, v = state[f"{layer}.u"], state[f"{layer}.v"]
    return {f"{layer}.u": (u * factors).to(u.dtype), f"{layer}.v": (v * as_column(factors, v.dim())).to(v.dtype)}


def as_column(rows: Tensor, dimensions: int) -> Tensor:
    """Return ``rows (n,)`` as ``(n, 1, …)`` of this many dimensions; what has as many is as it is."""
    return rows if rows.dim() == dimensions else rows.reshape((*rows.shape, *(1,) * (dimensions - 1)))
