"""What the server does with an aggregated model: a chain of steps, in the manner of Optax.

A step is a frozen record of pure functions. ``init`` makes its memory, ``apply`` turns the model that the step before
it left (the first one: what the aggregation made) into the model that the next one gets; what the last one leaves
starts the next round. ``start`` is what a step does to the model once, before the first round.

Memory is one state for each slot, and a tensor in it that has the name and the shape of one of the model's follows that
one: it is cut with it when the model shrinks, and rolled with it. It is part of the checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedmaestro.config.base import Value
from fedmaestro.strategies.base import AnyAggregation, AnyPartial, factor_layers
from fedmaestro.submodel import State

Memory = Mapping[str, State]
"""What a step keeps from round to round: a state by slot."""

ChainMemory = Mapping[str, Memory]
"""The memory of every step that keeps something, by the step's name."""

Holders = Mapping[str, Tensor]
"""Devices of a round that hold each column, in expectation: ``(R,)`` by LoD layer."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a step may look at besides the model it is given."""

    number: int
    """From 1 on."""
    before: Mapping[str, Tensor]
    """The model that the round started from."""
    partial: AnyPartial
    """What the round's devices amount to."""
    aggregation: AnyAggregation
    """How that was made into a model."""
    expected: State | None = None
    """Devices of each entry in expectation, where their number itself is private; None: it is known."""

    @cached_property
    def contributors(self) -> State:
        """How many devices each entry of the aggregated model comes from (``Aggregation.contributors``)."""
        if self.expected is not None:
            return {name: self.expected.get(name, torch.zeros_like(x)).float() for name, x in self.before.items()}
        return self.aggregation.contributors(self.partial, self.before)


def _nothing(state: Mapping[str, Tensor]) -> Memory:  # noqa: ARG001
    return {}


def _keep(state: State, memory: Memory, server_round: Round) -> tuple[State, Memory]:  # noqa: ARG001
    return state, memory


def _as_it_is(state: Mapping[str, Tensor], holders: Holders) -> State:  # noqa: ARG001
    return dict(state)


def _never(number: int) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True, kw_only=True)
class ServerStep:
    """One link of a chain; tensors that ``apply`` and ``start`` are given must not be changed in place."""

    name: str
    apply: Callable[[State, Memory, Round], tuple[State, Memory]] = _keep
    """``(model, memory, round) -> (model, memory)``"""
    init: Callable[[Mapping[str, Tensor]], Memory] = _nothing
    """``model -> memory`` before the first round that the step sees."""
    start: Callable[[Mapping[str, Tensor], Holders], State] = _as_it_is
    """``(model, holders) -> model``, once."""
    rebases: Callable[[int], bool] = _never
    """Whether factors have another basis after the round of this number, in which nobody's memory of them holds."""
    remembers_factors: bool = False
    """Whether the step's memory is about factors: of no use where a rule or another step gives them a new basis."""


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One row of ``SERVER_STEPS``: how a step is made from settings."""

    name: str
    make: Callable[..., ServerStep]
    settings: Mapping[str, str]
    """Setting of each parameter of ``make``."""
    idle: Mapping[str, tuple[str, Value]] = field(default_factory=dict)
    """Settings that mean nothing where another one has a certain value."""
    summary: str
    source: str

    def of(self, value: Callable[[str], Value | None]) -> ServerStep:
        """Return the step whose parameters have the ``value`` of their settings."""
        return self.make(**{parameter: value(key) for parameter, key in self.settings.items()})


def run_chain(
    chain: Sequence[ServerStep], state: State, memory: ChainMemory, server_round: Round
) -> tuple[State, ChainMemory]:
    """Apply every step in turn; return the model and the memories, without those that are empty.

    Args:
        chain: the steps.
        state: what the aggregation made of the round.
        memory: what the last round left; ``{}`` at first.
        server_round: the round.
    """
    kept = dict(memory)
    for step in chain:
        before = kept[step.name] if step.name in kept else step.init(server_round.before)
        state, kept[step.name] = step.apply(state, before, server_round)
        if step.rebases(server_round.number):
            kept = {name: without_factors(slots) for name, slots in kept.items()}
    return state, {name: slots for name, slots in kept.items() if slots}


def without_factors(memory: Memory) -> Memory:
    """Return a memory without that of factors: the basis that it was about is gone."""
    kept: dict[str, State] = {}
    for slot, state in memory.items():
        factors = {f"{layer}.{factor}" for layer in factor_layers(state) for factor in "uv"}
        kept[slot] = {name: tensor for name, tensor in state.items() if name not in factors}
    return {slot: state for slot, state in kept.items() if state}
