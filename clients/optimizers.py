"""What takes a device's local steps: the table of local optimisers, and how the learning rate goes over the rounds."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmaestro.errors import UserError


class Stepping(Protocol):
    """What a device needs of its optimiser."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Move the parameters."""


class Sgd:
    """``torch.optim.SGD``, bit for bit (a test compares), for parameters that are dense tensors.

    Why not that one: it loads PyTorch's compiler (2 s in each process of a simulation), and its step takes as long for
    what goes around the arithmetic as a small model takes to train.

    Args:
        parameters: to train.
        lr: learning rate η.
        momentum: μ of ``v ← μ v + g``, ``v = g`` at first; 0: none.
        weight_decay: λ of ``g ← g + λ x``.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        self.parameters = list(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for index, parameter in enumerate(self.parameters):
            if (gradient := parameter.grad) is None:
                continue
            if self.weight_decay:
                gradient = gradient.add(parameter, alpha=self.weight_decay)
            if self.momentum:
                if (velocity := self._velocity.get(index)) is None:
                    velocity = self._velocity[index] = gradient.clone()
                else:
                    velocity.mul_(self.momentum).add_(gradient)
                gradient = velocity
            parameter.add_(gradient, alpha=-self.lr)


@dataclass(frozen=True, kw_only=True)
class LocalOptimizer:
    """One row of ``OPTIMIZERS``. Devices start each round with a fresh one: nothing of it is sent."""

    name: str
    make: Callable[[Sequence[nn.Parameter], float, float, float], Stepping]
    """``(parameters, lr, momentum, weight decay) -> optimiser``."""
    slots: Callable[[float], int]
    """``momentum -> tensors`` that it keeps for each parameter's, for the memory budgets."""
    summary: str


OPTIMIZERS: dict[str, LocalOptimizer] = {
    row.name: row
    for row in (
        LocalOptimizer(
            name="sgd",
            make=Sgd,
            slots=lambda momentum: int(momentum > 0),
            summary="stochastic gradient descent, with train.momentum",
        ),
        LocalOptimizer(
            name="adam",
            make=lambda parameters, lr, _, decay: torch.optim.Adam(parameters, lr=lr, weight_decay=decay),
            slots=lambda _: 2,
            summary="Adam (1412.6980); train.weight-decay is added to the gradient",
        ),
        LocalOptimizer(
            name="adamw",
            make=lambda parameters, lr, _, decay: torch.optim.AdamW(parameters, lr=lr, weight_decay=decay),
            slots=lambda _: 2,
            summary="Adam with decoupled weight decay (1711.05101)",
        ),
    )
}
"""By name, as ``train.optimizer`` takes them."""


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How far the learning rate falls."""

    final: float = 1.0
    """``train.lr-final-factor``."""
    milestones: tuple[int, ...] = ()
    """``train.lr-milestones``; none: half and three quarters of the rounds."""
    gamma: float = 0.1
    """``train.lr-gamma``."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One row of ``SCHEDULES``."""

    name: str
    factor: Callable[[int, int, Decay], float]
    """``(round from 1 on, rounds, decay) -> factor`` of the learning rate."""
    summary: str


def decay_of(schedule: str, rounds: int, final: float, milestones: str, gamma: float) -> Decay:
    """Return what settings say of a schedule's decay.

    Raises:
        UserError: milestones that are no ascending rounds before the last one, or of a schedule that has none.
    """
    words = milestones.replace(",", " ").split()
    if words and schedule != "steps":
        raise UserError(f"train.lr-milestones={milestones!r} has no effect: train.schedule is {schedule!r}: use steps")
    if not all(word.isdecimal() and 0 < int(word) < rounds for word in words):
        raise UserError(
            f"train.lr-milestones={milestones!r}: write rounds from 1 to {rounds - 1} (train.rounds={rounds}), "
            "separated by spaces"
        )
    return Decay(final=final, milestones=tuple(sorted({int(word) for word in words})), gamma=gamma)


def _cosine(server_round: int, rounds: int, decay: Decay) -> float:
    done = (server_round - 1) / max(1, rounds - 1)
    return decay.final + (1 - decay.final) * (1 + math.cos(math.pi * done)) / 2


def _steps(server_round: int, rounds: int, decay: Decay) -> float:
    passed = decay.milestones or [share * rounds for share in (0.5, 0.75)]
    return decay.gamma ** sum(server_round > milestone for milestone in passed)


SCHEDULES: dict[str, Schedule] = {
    row.name: row
    for row in (
        Schedule(name="cosine", factor=_cosine, summary="a cosine down to train.lr-final-factor of train.lr"),
        Schedule(name="steps", factor=_steps, summary="×train.lr-gamma after each of train.lr-milestones"),
        Schedule(
            name="exponential",
            factor=lambda server_round, rounds, decay: decay.final ** ((server_round - 1) / max(1, rounds - 1)),
            summary="the same factor in every round, down to train.lr-final-factor of train.lr",
        ),
        Schedule(name="constant", factor=lambda *_: 1.0, summary="train.lr in every round"),
    )
}
"""By name, as ``train.schedule`` takes them."""
