"""The local optimisers that are our own."""

from typing import Any

import pytest
import torch
from torch import nn

from fedmaestro.clients.optimizers import OPTIMIZERS


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_sgd_is_pytorchs_bit_for_bit(momentum: float, weight_decay: float) -> None:
    """Over steps, with a parameter that gets no gradient at first."""
    results: list[list[Any]] = []
    for kind in ("ours", "theirs"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )
        unused = nn.Parameter(torch.ones(3))
        parameters = [*model.parameters(), unused]
        if kind == "ours":
            optimizer: Any = OPTIMIZERS["sgd"].make(parameters, 0.1, momentum, weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=momentum, weight_decay=weight_decay)
        for step in range(5):
            optimizer.zero_grad(set_to_none=True)
            loss = model(torch.randn(7, 1, 8, 8)).square().mean() + (unused.sum() if step > 1 else 0.0)
            loss.backward()
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in parameters])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
