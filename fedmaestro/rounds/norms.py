"""How far an update may lie from what the device was sent.

The bound on ``‖x − x₀‖₂`` of a device that was sent ``x₀`` with ``n`` numbers is ``c · m · max(‖x₀‖₂, √n)``: ``c`` is
``train.max-update-norm``, and ``m`` the largest of the rounds' medians of ``‖x − x₀‖₂ / max(‖x₀‖₂, √n)`` over their
devices; 0.1 before ``FEW`` updates are known. It is applied to each device, so it does not depend on cohorts, and it is
known before the round, so hosts need not wait for each other.

It tells what is broken from what has learnt: an attacker who stays below it is a matter of the aggregation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmaestro.rounds.failure import RejectedError
from fedmaestro.submodel import State

FEW = 30
"""Updates that must be known before their medians count."""

UNKNOWN = 0.1
"""What stands for the median until then."""


@dataclass(frozen=True)
class UpdateNorms:
    """What is known of the updates of a run."""

    updates: int = 0
    """Those that counted so far."""
    median: float = 0.0
    """The largest of the rounds' medians of the relative norm."""

    def after(self, norms: Sequence[float]) -> "UpdateNorms":
        """Return what is known after a round whose updates have these relative norms."""
        if not norms:
            return self
        return UpdateNorms(self.updates + len(norms), max(self.median, float(np.median(norms))))

    def bound(self, factor: float, scale: float) -> float:
        """Return the largest norm of an update; inf where there is no bound.

        Args:
            factor: ``train.max-update-norm``; 0: no bound.
            scale: ``scale_of`` what the device is sent.
        """
        if not factor:
            return math.inf
        known = self.updates >= FEW and self.median > 0
        return factor * (self.median if known else UNKNOWN) * scale


def scale_of(start: Mapping[str, Tensor]) -> float:
    """Return ``max(‖x₀‖₂, √n)``."""
    tensors = [x for x in start.values() if x.is_floating_point()]
    return max(_norm(tensors), math.sqrt(sum(x.numel() for x in tensors)))


def update_norm(state: Mapping[str, Tensor], start: State) -> float:
    """Return ``‖x − x₀‖₂`` over the tensors of ``state``; not finite where one of its numbers is not."""
    names = [name for name, x in state.items() if x.is_floating_point()]
    mine = [state[name] for name in names]
    return _norm(torch._foreach_sub(mine, [start[name].to(x) for name, x in zip(names, mine, strict=True)]))


def checked_norm(state: Mapping[str, Tensor], start: State, bound: float) -> float:
    """Return ``update_norm``; RejectedError unless it is within ``bound``."""
    norm = update_norm(state, start)
    if norm <= bound and math.isfinite(norm):
        return norm
    for name, x in state.items():
        if not bool(torch.isfinite(x).all()):
            raise RejectedError("not-finite", f"{name!r} has a number that is not finite")
    raise RejectedError("too-large", longer(norm, bound))


def longer(norm: float, bound: float) -> str:
    """Return what is said of an update that is too long."""
    return f"the update has norm {norm:.3g}, the bound of this round is {bound:.3g} (train.max-update-norm)"


def _norm(tensors: Sequence[Tensor]) -> float:
    filled = [x for x in tensors if x.numel()]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(filled)))) if filled else 0.0
