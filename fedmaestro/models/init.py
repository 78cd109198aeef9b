"""Initialisation of a dense network before it is factorised."""

import torch
from torch import nn

from fedmaestro.models.resnet import BasicBlock
from fedmaestro.models.static_norm import StaticNorm
from fedmaestro.models.transformer import Transformer
from fedmaestro.models.width import LeadingGroupNorm


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every Linear and Conv2d weight from ``N(0, 2 / fan_in)`` and set biases to zero (He et al., ICCV 2015).

    Norms start as the identity, step sizes at 1. Meant for a model with uninitialised tensors: no global generator is
    drawn from.

    PyTorch's own default has a sixth of that variance. A low prefix keeps only a part of a weight's energy, so under
    the default the small tiers' signals fade over the layers: on MNIST they stayed at chance for ten rounds.

    A Transformer's weights are uniform with variance ``2 / (fan_in + fan_out)`` instead (Glorot and Bengio, AISTATS
    2010, as PyTorch's own has it): its norms and residual sums keep signals from fading, and small output weights
    start it at the loss of guessing, ``ln(vocabulary)``, where He's start one nat above. Its embeddings, which it
    multiplies by ``√E``, are drawn from ``N(0, 1 / E)``.
    """
    draw = _xavier if isinstance(model, Transformer) else _he
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | LeadingGroupNorm | StaticNorm | nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, BasicBlock) and module.step is not None:
            nn.init.ones_(module.step)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=generator)
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _he(weight: torch.Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


def _xavier(weight: torch.Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(weight, generator=generator)
