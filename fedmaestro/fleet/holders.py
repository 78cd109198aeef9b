"""How many devices of a round hold each factor column and each input channel, in expectation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.fleet.plan import Plan, Submodel


def expected_holders(plan: Plan, devices_of: Mapping[int, int], devices_per_round: int) -> dict[str, Tensor]:
    """Return how many devices of a round hold what tiers differ in, in expectation.

    Columns: ``(R,)`` by LoD layer. Inputs: ``(I,)`` by the tensor (a V, a dense weight) whose axis 1 widths cut.

    Args:
        plan: what each tier trains, and how often its devices can be reached.
        devices_of: devices of each tier, by its index in the fleet.
        devices_per_round: devices whose work a round waits for; fewer where fewer can be reached.
    """
    trained = [
        (devices_of[tier.index] * tier.tier.availability, tier.trains) for tier in plan.tiers if tier.trains is not None
    ]
    reachable = sum(devices for devices, _ in trained)
    sampled = min(devices_per_round, reachable) / reachable
    holders = {layer: torch.zeros(rank, dtype=torch.float64) for layer, rank in (plan.full.size.ranks or {}).items()}
    for name, shape in plan.full.shapes.items():
        if len(shape) > 1 and not name.endswith(".u") and any(_inputs(of, name) < shape[1] for _, of in trained):
            holders[name] = torch.zeros(shape[1], dtype=torch.float64)
    for devices, submodel in trained:
        for name, held in holders.items():
            ranks = submodel.size.ranks or {}
            held[: ranks[name] if name in ranks else _inputs(submodel, name)] += sampled * devices
    return holders


def _inputs(submodel: Submodel, name: str) -> int:
    """Return the length of axis 1 of a tensor; 0 of a tensor that the submodel lacks."""
    return submodel.shapes[name][1] if name in submodel.shapes else 0
