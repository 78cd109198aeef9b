"""SCAFFOLD's control variates: devices correct every local step by what they know of the drift of their own data.

Karimireddy et al., ICML 2020, algorithm 1 with option II. With ``x`` what a device was sent, ``y`` where its ``K``
steps of size ``η`` ended, ``c_i`` its own control variate and ``c`` the server's::

    step        y ← y - η (g - c_i + c)
    device      c_i⁺ = c_i - c + (x - y) / (K η)
    server      c ← c + Σ (c_i⁺ - c_i) / N

Here tiers hold leading blocks, so ``N`` is counted entry by entry: the devices of the fleet that hold it. Departures:
where ``train.clip-norm`` is on, it is the corrected gradient that is clipped; the server's step is the row's
aggregation (weighted by examples) instead of a plain mean.

A device downloads ``c`` with the model and uploads ``c_i⁺ - c_i`` with its update, so its traffic doubles; ``c_i``
stays on the device (in the simulation, hosts keep nothing: the server does).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmaestro.submodel import State


@dataclass(frozen=True, kw_only=True)
class Control:
    """The control variates that a device's local steps are corrected by; a tensor that is not there is zero."""

    server: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def correct(self, model: nn.Module) -> None:
        """Add ``c - c_i`` to the gradients of ``model`` in place."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                for sign, known in ((1, self.server), (-1, self.own)):
                    if name in known:
                        parameter.grad.add_(known[name], alpha=sign)

    def after(self, start: Mapping[str, Tensor], model: nn.Module, steps: int, lr: float) -> State:
        """Return ``c_i⁺`` of the parameters that were trained."""
        new: State = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    moved = (start[name] - parameter) / (steps * lr)
                    new[name] = moved + self.own.get(name, 0.0) - self.server.get(name, 0.0)
        return new
