"""Static batch normalisation: BatchNorm without running statistics, calibrated once before an evaluation.

HeteroFL (arXiv 2010.01264, static BN): devices normalise by the statistics of their batch and keep no running ones,
which would differ between devices and widths; the server learns the statistics for evaluation after training, from a
query over the data of all devices.

Departures: ``calibrate`` takes a sample of the training set, which the caller draws by the experiment's seed, instead
of a query over all devices; its statistics are those of the whole sample (with the biased variance that training
normalises by), where the release averages those of batches (with the unbiased one); every tier's submodel gets its
own, where the release evaluates the whole model only. Shapes: ``B`` batch, ``C`` channels, ``H``, ``W`` positions.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedmaestro.models.width import LeadingGroupNorm

EPSILON = 1e-5


class StaticNorm(nn.Module):
    """BatchNorm over all axes but the channels, with ``weight`` and ``bias``, each ``(C,)``, or without.

    ``mean`` and ``var``, each ``(C,)``, are what evaluation normalises by; None (the batch's own) until ``calibrate``.
    They are no part of the state: a submodel's cannot be cut from a larger model's, since its inputs differ.
    """

    mean: Tensor | None
    var: Tensor | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, *, affine: bool = True, eps: float = EPSILON) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.empty(channels)) if affine else None
        self.bias = nn.Parameter(torch.empty(channels)) if affine else None
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("var", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the affine part the identity."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training changes what the statistics belong to, so they go."""
        if mode:
            self.mean = self.var = None
        return super().train(mode)

    def fix(self, x: Tensor) -> None:
        """Let evaluation normalise by the statistics of ``x (B, C, …)``."""
        # Not torch.var_mean: on a CPU it takes three times as long, or more.
        others = [axis for axis in range(x.dim()) if axis != 1]
        self.mean = x.mean(dim=others)
        self.var = (x - self.mean.view(-1, *(1,) * (x.dim() - 2))).square_().mean(dim=others)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, …)`` to the same shape."""
        # Not F.batch_norm: it refuses one value per channel, which one example on one position is.
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.mean,
            self.var,
            training=self.mean is None,
            momentum=0.0,
            eps=self.eps,
            cudnn_enabled=torch.backends.cudnn.enabled,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}"


def use_static_batch_norms(model: nn.Module) -> None:
    """Put a ``StaticNorm`` in the place of every BatchNorm, in place and under its name, with its weight and bias.

    Devices of different tiers see different activations, so running averages of one tier are wrong for another, and a
    mean over tiers is right for none. Here training normalises by the batch, as BatchNorm does, nothing is sent, and
    each tier's statistics are calibrated before it is evaluated.
    """
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                new = StaticNorm(norm.num_features, affine=norm.affine, eps=norm.eps)
                if norm.affine:
                    new.weight, new.bias = norm.weight, norm.bias
                setattr(parent, name, new.train(norm.training))


def use_static_norms(model: nn.Module) -> None:
    """Put a ``StaticNorm`` in the place of every GroupNorm, in place and under its name; LayerNorms stay."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.GroupNorm | LeadingGroupNorm):
                setattr(parent, name, StaticNorm(len(norm.weight)))


def has_static_norms(model: nn.Module) -> bool:
    """Return whether evaluating ``model`` needs ``calibrate`` first."""
    return any(isinstance(module, StaticNorm) for module in model.modules())


@torch.no_grad()
def calibrate(model: nn.Module, *inputs: Tensor) -> None:
    """Fix the statistics of every ``StaticNorm`` to those of ``inputs (N, …)`` and leave ``model`` in evaluation.

    One forward pass, layer by layer: each norm sees what the norms before it, already fixed, make of the examples.
    Models without static norms are left as they are, but for the mode.

    Call it after every ``submodel.load``: that replaces parameters only, and statistics of other parameters would stay.
    The pass holds activations of all ``N`` images; 500 of 32×32 pixels take 131 MB in a layer of 64 channels.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, StaticNorm)]
    handles = [norm.register_forward_pre_hook(_fix) for norm in norms]
    try:
        if norms:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def _fix(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    assert isinstance(norm, StaticNorm)
    norm.fix(inputs[0])


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return what ``calibrate`` has fixed: ``{norm.mean: (C,), norm.var: (C,), …}``."""
    fixed: dict[str, Tensor] = {}
    for name, norm in model.named_modules():
        if isinstance(norm, StaticNorm) and norm.mean is not None and norm.var is not None:
            fixed |= {f"{name}.mean": norm.mean, f"{name}.var": norm.var}
    return fixed


def set_statistics(model: nn.Module, fixed: Mapping[str, Tensor]) -> None:
    """Let ``model``, in evaluation mode, normalise by what ``statistics`` returned."""
    for name, norm in model.named_modules():
        if isinstance(norm, StaticNorm) and f"{name}.mean" in fixed:
            norm.mean, norm.var = fixed[f"{name}.mean"].clone(), fixed[f"{name}.var"].clone()
