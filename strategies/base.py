"""What a strategy is made of: submodel rule × local objective × aggregation × server optimiser.

An aggregation is a record of pure functions on states (``dict[str, Tensor]``)::

    p = agg.init(global_state)
    p = agg.add(p, submodel_state, weight)      # once per device, on the host that trained it
    p = agg.merge(p, q)                         # on the server, in cohort order
    new = agg.finish(p, global_state)

Laws (tests/laws): ``merge`` is associative and commutative up to rounding in float64, ``merge(p, init(g)) == p``, and
splitting the same ``add`` calls over several partial results changes nothing but that rounding; with the fixed order
in which the server merges, results are bit-identical.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmaestro.plan import SubmodelRule
from fedmaestro.submodel import Shape, State, leading_block

Signature = tuple[tuple[str, Shape], ...]
"""Names and shapes of a submodel: what it covers."""


@dataclass(frozen=True)
class Block:
    """Sum over devices of one submodel size.

    Attributes:
        sums: ``Σ weight · tensor`` in float64; float64 keeps means of equal tensors exact.
        weight: ``Σ weight``.
    """

    sums: State
    weight: float


Partial = Mapping[Signature, Block]
"""A partial result: one block per submodel size, so its memory is that of the sizes, never that of the devices."""


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How submodels become the next global state; ``finish`` is the rule, the rest is shared."""

    finish: Callable[[Partial, Mapping[str, Tensor]], State]
    """``(partial, global_state) -> new global state``; new tensors, same names, shapes and dtypes."""
    summary: str
    source: str

    def init(self, global_state: Mapping[str, Tensor]) -> Partial:  # noqa: ARG002
        """Return the empty partial result."""
        return {}

    def add(self, partial: Partial, submodel: Mapping[str, Tensor], weight: float) -> Partial:
        """Return ``partial`` with one device's submodel added; ``weight`` is its number of examples."""
        block = Block({name: tensor.double() * weight for name, tensor in submodel.items()}, float(weight))
        return self.merge(partial, {signature(submodel): block})

    def merge(self, left: Partial, right: Partial) -> Partial:
        """Return the sum of two partial results; neither is changed."""
        merged = dict(left)
        for key, block in right.items():
            merged[key] = _sum(merged[key], block) if key in merged else block
        return merged


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """What the server does with the aggregated state.

    ``step(global_state, aggregated, memory) -> (new global state, new memory)``; ``memory`` is ``{}`` at first and is
    part of the checkpoint. What it keeps for the tensor ``name`` has the key ``<slot>/<name>``, for example
    ``momentum/fc1.u``: where that has the shape of the tensor, shrinking cuts it along (``rederive.cut_memory``).
    """

    name: str
    step: Callable[[State, State, State], tuple[State, State]]


def _take(_global_state: State, aggregated: State, memory: State) -> tuple[State, State]:
    return aggregated, memory


REPLACE = ServerOptimizer(name="none", step=_take)
"""The aggregated state is the new global state, as in FedAvg."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of ``STRATEGIES``: a method is a choice for each of four independent switches."""

    name: str
    submodel: SubmodelRule
    objective: str
    """Name in ``fedmaestro.clients.OBJECTIVES``; ``train.objective`` overrides it."""
    aggregation: Aggregation
    server: ServerOptimizer = REPLACE
    summary: str
    source: str


def signature(submodel: Mapping[str, Tensor]) -> Signature:
    """Return the names and shapes of a submodel, in its order."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in submodel.items())


def add_to_leading_block(total: Tensor, block: Tensor | float, shape: Shape) -> None:
    """Add ``block`` in place to the leading block of ``total``."""
    leading_block(total, shape).add_(torch.as_tensor(block, dtype=total.dtype))


def _sum(left: Block, right: Block) -> Block:
    sums = {name: tensor + right.sums[name] for name, tensor in left.sums.items()}
    return Block(sums, left.weight + right.weight)
