"""The server's optimiser, on the pseudo-gradient ``Δ = aggregated - global``.

Adaptive federated optimization (Reddi et al., ICLR 2021, Algorithm 2) and FedAvgM (Hsu et al., 2019), *per block*: an
entry that no device of the round held has no pseudo-gradient, so it keeps its value and its moments, bit for bit.
Entries are covered by tier blocks, so each block has its own optimiser in effect. Optionally a block's step is scaled
by ``N_b / (N_b + damping)`` with ``N_b`` its devices of the round: with few contributors the mean is noisy.

With ``x`` the global state, ``Δ`` as above, ``s`` that scale, ``τ`` the adaptivity::

    none      x + s·Δ
    momentum  m = β₁·m + Δ;               x + lr·s·m
    adam      m = β₁·m + (1-β₁)·Δ;  v = β₂·v + (1-β₂)·Δ²;                 x + lr·s·m / (√v + τ)
    yogi      m as for adam;        v = v - (1-β₂)·Δ²·sign(v - Δ²);       x + lr·s·m / (√v + τ)

As in Reddi et al., without bias correction. Departure: ``v`` starts at 0, theirs at ``τ²`` or more.

Rules that re-order columns (``Aggregation.rebases``, ``server.reorder-every``) change the basis of factors, and moments
of an old basis mean nothing in the new one. So they are refused with optimisers that have moments of factors; those of
products (``server.space = product``, ``product_space``) go with every rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedmaestro.errors import check_name
from fedmaestro.strategies import product_space
from fedmaestro.strategies.server_step import Memory, Round, ServerStep, StepRow
from fedmaestro.submodel import State

MOMENTUM, SECOND = "momentum", "second-moment"


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """One server optimiser with its constants; see the module."""

    name: Literal["none", "momentum", "adam", "yogi"]
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    adaptivity: float = 1e-3
    """τ."""
    damping: float = 0.0
    """Devices at which a block takes half a step; 0: whole steps."""

    def step(
        self,
        global_state: Mapping[str, Tensor],
        aggregated: State,
        memory: Memory,
        devices: Mapping[str, Tensor] | None = None,
    ) -> tuple[State, Memory]:
        """Return the new global state and the new memory.

        Args:
            global_state: before the round.
            aggregated: what the aggregation made of the devices' submodels.
            memory: ``{}`` at first; a tensor that a slot lacks counts as zero.
            devices: contributors of every entry (``Aggregation.contributors``); None: all entries have many.
        """
        if self.name == "none" and not self.damping:
            return aggregated, memory
        new: State = {}
        kept: dict[str, State] = {slot: {} for slot in self._slots}
        for name, old in global_state.items():
            count = torch.full_like(old, torch.inf) if devices is None else devices[name]
            moments = {slot: memory.get(slot, {}).get(name, torch.zeros_like(old)) for slot in self._slots}
            new[name], moments = self._entry(old, aggregated[name], moments, count)
            for slot, tensor in moments.items():
                kept[slot][name] = tensor
        return new, kept

    @property
    def _slots(self) -> tuple[str, ...]:
        return {"none": (), "momentum": (MOMENTUM,)}.get(self.name, (MOMENTUM, SECOND))

    def _entry(self, old: Tensor, aggregated: Tensor, moments: State, count: Tensor) -> tuple[Tensor, State]:
        delta, covered = aggregated - old, count > 0
        scale = 1.0 / (1.0 + self.damping / count.clamp(min=1e-9))
        if self.name == "none":
            return torch.where(covered, old + scale * delta, old), {}
        if self.name == "momentum":
            moment = self.beta1 * moments[MOMENTUM] + delta
            direction, new = moment, {MOMENTUM: moment}
        else:
            moment = self.beta1 * moments[MOMENTUM] + (1 - self.beta1) * delta
            before, square = moments[SECOND], delta.square()
            adam = self.beta2 * before + (1 - self.beta2) * square
            yogi = before - (1 - self.beta2) * square * torch.sign(before - square)
            second = adam if self.name == "adam" else yogi
            direction = moment / (second.sqrt() + self.adaptivity)
            new = {MOMENTUM: moment, SECOND: second}
        value = torch.where(covered, old + self.lr * scale * direction, old)
        return value, {slot: torch.where(covered, tensor, moments[slot]) for slot, tensor in new.items()}


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {
    "none": ServerOptimizer(name="none"),
    "momentum": ServerOptimizer(name="momentum"),
    "adam": ServerOptimizer(name="adam", lr=0.03),
    "yogi": ServerOptimizer(name="yogi", lr=0.03),
}
"""By name, with the constants that rows and ``server.optimizer`` start from."""


def optimize(
    name: str, lr: float | None, momentum: float, damping: float, space: Literal["factors", "product"] = "factors"
) -> ServerStep:
    """Return the step of an optimiser of ``SERVER_OPTIMIZERS``; ``lr`` None: its own."""
    check_name("server.optimizer", name, SERVER_OPTIMIZERS)
    row = SERVER_OPTIMIZERS[name]
    optimizer = replace(row, lr=row.lr if lr is None else lr, beta1=momentum, damping=damping)

    def apply(state: State, memory: Memory, server_round: Round) -> tuple[State, Memory]:
        if name == "none" and not damping:
            return state, memory
        if space == "product":
            return _on_products(optimizer, state, memory, server_round)
        return optimizer.step(server_round.before, state, memory, server_round.contributors)

    moves = name != "none"
    return ServerStep(
        name="optimizer",
        apply=apply,
        rebases=lambda _number: moves and space == "product",
        remembers_factors=moves and space == "factors",
    )


def _on_products(optimizer: ServerOptimizer, state: State, memory: Memory, server_round: Round) -> tuple[State, Memory]:
    """Take the step in the space of products; see ``product_space``."""
    before = server_round.before
    devices = product_space.holders(server_round.contributors, before)
    products, kept = optimizer.step(
        product_space.with_products(before), product_space.with_products(state), memory, devices
    )
    return product_space.with_factors(products, before, devices), kept


OPTIMIZER = StepRow(
    name="optimizer",
    make=optimize,
    settings={
        "name": "server.optimizer",
        "lr": "server.lr",
        "momentum": "server.momentum",
        "damping": "server.damping",
        "space": "server.space",
    },
    idle={
        "server.lr": ("server.optimizer", "none"),
        "server.momentum": ("server.optimizer", "none"),
        "server.space": ("server.optimizer", "none"),
    },
    summary="a step along the difference that the round made: none (all of it), momentum, adam or yogi",
    source="FedAvgM (1909.06335); FedAdam, FedYogi (2003.00295)",
)
