"""What a strategy is made of: submodel rule × local objective × aggregation × server optimiser.

An aggregation is a record of pure functions on states (``dict[str, Tensor]``)::

    p = agg.init(global_state)
    p = agg.add(p, submodel_state, weight)      # once per device, on the host that trained it
    p = agg.merge(p, q)                         # on the server (``receive``), in cohort order
    new = agg.finish(p, global_state)

Laws (tests/laws): ``merge`` is associative and commutative up to rounding in float64, ``merge(p, init(g)) == p``, and
splitting the same ``add`` calls over several partial results changes nothing but that rounding; with the fixed order
in which the server merges, results are bit-identical.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedmaestro.fleet.plan import SubmodelRule
from fedmaestro.strategies.server_optimizers import REPLACE, ServerOptimizer
from fedmaestro.submodel import Shape, State, leading_block

Signature = tuple[tuple[str, Shape], ...]
"""Names and shapes of a submodel: what it covers."""


@dataclass(frozen=True)
class Block:
    """What the devices of one submodel size amount to.

    Attributes:
        sums: ``Σ weight · tensor`` in float64 (which keeps means of equal tensors exact), or whatever else the
            reduction of the rule makes of the devices' tensors.
        weight: ``Σ weight``.
        devices: how many.
    """

    sums: State = field(default_factory=dict)
    weight: float = 0.0
    devices: int = 0


Partial = Mapping[Signature, Block]
"""A partial result: one block per submodel size, so its memory is that of the sizes, never that of the devices.

A block without devices only announces a size (``Aggregation.init``).
"""

ALL_ANNOUNCED: Signature = ()
"""Key of an empty block that says: no size will come that has no block yet, so reductions may add up across devices
what a further size would have to tell apart (``partitioned_product``)."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How the devices of one submodel size add up to ``Block.sums``."""

    lift: Callable[[Mapping[str, Tensor], float, Mapping[str, Tensor] | None], State]
    """``(submodel, weight, start) -> sums`` of one device; ``start`` is what it was sent (None: not known)."""
    add: Callable[[State, State, Sequence[Signature]], State]
    """``(left, right, all sizes of the partial result) -> sums``; neither is changed."""
    scale: Callable[[State, float], State]
    """``(sums, factor) -> sums`` of devices whose weights are ``factor`` times as large."""
    accumulate: Callable[[State, Mapping[str, Tensor], float], None] | None = None
    """``(sums, mean, weight)``: ``sums += weight · mean`` in place, in one pass; None: ``scale``, then ``add``."""


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> State:  # noqa: ARG001
    return {name: tensor.double() * weight for name, tensor in submodel.items()}


def _add(left: State, right: State, sizes: Sequence[Signature]) -> State:  # noqa: ARG001
    return {name: tensor + right[name] for name, tensor in left.items()}


def _scale(sums: State, factor: float) -> State:
    return {name: tensor * factor for name, tensor in sums.items()}


def _accumulate(sums: State, mean: Mapping[str, Tensor], weight: float) -> None:
    for name, tensor in mean.items():
        sums[name].add_(tensor, alpha=weight)


WEIGHTED_SUMS = Reduction(lift=_lift, add=_add, scale=_scale, accumulate=_accumulate)
"""``Σ weight · tensor``, for every rule that averages entries."""


def _examples(submodel: Mapping[str, Tensor], examples: float) -> float:  # noqa: ARG001
    return examples


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How submodels become the next global state; ``finish`` is the rule, the rest is shared."""

    name: str
    finish: Callable[[Partial, Mapping[str, Tensor]], State]
    """``(partial, global_state) -> new global state``; new tensors, same names, shapes and dtypes."""
    reduction: Reduction = WEIGHTED_SUMS
    weigh: Callable[[Mapping[str, Tensor], float], float] = _examples
    """``(submodel, examples) -> weight`` of a device; its examples by default."""
    mixes: bool = False
    """Whether the rule moves entries that no device covered (a re-ordering does)."""
    changed_rows: Callable[[Block, str], Tensor] | None = None
    """``(block, name) -> bool (rows,)``: rows of a tensor that count as covered; None: all that devices hold."""
    summary: str
    source: str

    def init(self, global_state: Mapping[str, Tensor], sizes: Sequence[Signature] = ()) -> Partial:  # noqa: ARG002
        """Return the empty partial result.

        Args:
            global_state: the server's.
            sizes: all sizes that will come, where they are known; a rule whose reduction compresses only then does so
                (``partitioned_product``).
        """
        return dict.fromkeys([*sizes, ALL_ANNOUNCED] if sizes else (), Block())

    def add(
        self,
        partial: Partial,
        submodel: Mapping[str, Tensor],
        weight: float,
        *,
        start: Mapping[str, Tensor] | None = None,
    ) -> Partial:
        """Return ``partial`` with one device's submodel added.

        Args:
            partial: so far; not changed.
            submodel: the device's tensors after training.
            weight: its number of examples.
            start: what the device was sent, for rules that look at what it changed.
        """
        weight = float(self.weigh(submodel, weight))
        block = Block(self.reduction.lift(submodel, weight, start), weight, 1)
        return self.merge(partial, {signature(submodel): block})

    def merge(self, left: Partial, right: Partial) -> Partial:
        """Return the sum of two partial results; neither is changed."""
        merged = dict(left)
        sizes = [*left, *(key for key in right if key not in left)]
        for key, block in right.items():
            merged[key] = self._sum(merged.get(key, Block()), block, sizes)
        return merged

    def receive(
        self, partial: Partial, size: Signature, mean: Mapping[str, Tensor], weight: float, devices: int
    ) -> Partial:
        """Return ``partial`` with a cohort's upload added, like ``merge``; ``partial`` must not be used any more.

        For the server, which owns what it has received: it adds in place where the reduction can, since new float64
        copies of the model for every reply would cost many times the copying of its bytes.

        Args:
            partial: what ``init`` or ``receive`` returned.
            size: the cohort's.
            mean: the reduction's sums over the cohort, scaled by ``1 / weight``; float32.
            weight: ``Σ weight`` of the cohort.
            devices: how many.
        """
        known = partial.get(size, Block())
        if known.devices and self.reduction.accumulate is not None:
            self.reduction.accumulate(known.sums, mean, weight)
            return {**partial, size: Block(known.sums, known.weight + weight, known.devices + devices)}
        sums = self.reduction.scale({name: tensor.double() for name, tensor in mean.items()}, weight)
        return self.merge(partial, {size: Block(sums, weight, devices)})

    def _sum(self, left: Block, right: Block, sizes: Sequence[Signature]) -> Block:
        if not (left.devices and right.devices):
            return left if left.devices else right
        sums = self.reduction.add(left.sums, right.sums, sizes)
        return Block(sums, left.weight + right.weight, left.devices + right.devices)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of ``STRATEGIES``: a method is a choice for each of four independent switches."""

    name: str
    submodel: SubmodelRule
    objective: str
    """Name in ``fedmaestro.clients.OBJECTIVES``; ``train.objective`` overrides it."""
    aggregation: Aggregation
    """``train.aggregation`` overrides it."""
    server: ServerOptimizer = REPLACE
    """``train.server-optimizer`` overrides it."""
    freezes: Literal["", "v", "alternating"] = ""
    """Factor that devices do not train: ``v`` always, or ``alternating``: V in odd rounds, U in even ones."""
    reorder_every: int = 0
    """Rounds between re-orderings of the factors' columns after the server optimiser (``reordered``); 0: never."""
    logit_adjustment: float = 0.0
    """τ of the devices' logit adjustment (``clients.base.logit_offsets``); 0: plain cross-entropy."""
    tail_start: float = 0.0
    """Devices of a round, in expectation, below which a column starts smaller (``tail_start``); 0: none does."""
    tail_decay: float = 0.0
    """Rate at which columns that few devices hold fade in every round (``tail_decay``), before the re-ordering."""
    defaults: Mapping[str, bool | str] = field(default_factory=dict)
    """Settings of the model that belong to the published method, where the experiment leaves them at ``default``."""
    summary: str
    source: str

    def frozen(self, submodel: Collection[str], server_round: int) -> frozenset[str]:
        """Return the names of ``submodel`` that devices leave as they are in this round (from 1 on)."""
        factor = self.freezes if self.freezes != "alternating" else ("u", "v")[server_round % 2]
        if not factor:
            return frozenset()
        return frozenset(f"{layer}.{factor}" for layer in factor_layers(submodel))


def signature(submodel: Mapping[str, Tensor]) -> Signature:
    """Return the names and shapes of a submodel, in its order."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in submodel.items())


def present(partial: Partial) -> Iterator[tuple[dict[str, Shape], Block]]:
    """Yield the shapes and the block of every size that has devices."""
    for key, block in partial.items():
        if block.devices:
            yield dict(key), block


def factor_layers(state: Collection[str]) -> list[str]:
    """Return the layers whose factors ``<layer>.u (O, R)`` and ``<layer>.v (R, I…)`` are in ``state``."""
    layers = [name.removesuffix(".u") for name in state if name.endswith(".u")]
    return [layer for layer in layers if f"{layer}.v" in state]


def add_to_leading_block(total: Tensor, block: Tensor | float, shape: Shape) -> None:
    """Add ``block`` in place to the leading block of ``total``."""
    leading_block(total, shape).add_(torch.as_tensor(block, dtype=total.dtype))


def contributors(aggregation: Aggregation, partial: Partial, global_state: Mapping[str, Tensor]) -> State:
    """Return how many devices each entry of the global state comes from: float32, the shapes of ``global_state``.

    Where a rule goes by changed rows, those of a size count with all of its devices when one of them changed them.
    """
    counts = {name: torch.zeros_like(old, dtype=torch.float32) for name, old in global_state.items()}
    for shapes, block in present(partial):
        if aggregation.mixes:
            # A pair is factored anew as a whole, also where devices send one factor only.
            layers = {name[:-2] for name in shapes if name.endswith((".u", ".v"))}
            for name in global_state:
                if name in shapes or (name.endswith((".u", ".v")) and name[:-2] in layers):
                    counts[name] += block.devices
        else:
            for name, shape in shapes.items():
                rows = aggregation.changed_rows(block, name) if aggregation.changed_rows else torch.ones(shape[:1])
                add_to_leading_block(counts[name], block.devices * as_column(rows, len(shape)).float(), shape)
    return counts


def scaled_columns(state: Mapping[str, Tensor], layer: str, factors: Tensor) -> State:
    """Return the factor pair of ``layer`` with column ``j`` of U and row ``j`` of V times ``factors (R,)``."""
    u, v = state[f"{layer}.u"], state[f"{layer}.v"]
    return {f"{layer}.u": (u * factors).to(u.dtype), f"{layer}.v": (v * as_column(factors, v.dim())).to(v.dtype)}


def as_column(rows: Tensor, dimensions: int) -> Tensor:
    """Return ``rows (n,)`` as ``(n, 1, …)`` of this many dimensions."""
    return rows.reshape((*rows.shape, *(1,) * (dimensions - 1)))
