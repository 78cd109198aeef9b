"""How many devices of a round hold each factor column, in expectation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmaestro.fleet.plan import Plan


def expected_holders(plan: Plan, devices_of: Mapping[int, int], devices_per_round: int) -> dict[str, Tensor]:
    """Return how many devices of a round hold each column, in expectation: ``(R,)`` by LoD layer.

    Args:
        plan: what each tier trains, and how often its devices can be reached.
        devices_of: devices of each tier, by its index in the fleet.
        devices_per_round: devices whose work a round waits for; fewer where fewer can be reached.
    """
    trained = [
        (devices_of[tier.index] * tier.tier.availability, tier.trains.size.ranks or {})
        for tier in plan.tiers
        if tier.trains is not None
    ]
    reachable = sum(devices for devices, _ in trained)
    sampled = min(devices_per_round, reachable) / reachable
    holders = {layer: torch.zeros(rank, dtype=torch.float64) for layer, rank in (plan.full.size.ranks or {}).items()}
    for devices, ranks in trained:
        for layer, rank in ranks.items():
            holders[layer][:rank] += sampled * devices
    return holders
