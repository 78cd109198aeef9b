r"""Factor columns that hardly anybody will train start small.

With ``N_j`` the devices of a round that hold column ``j``, in expectation, and ``T`` the threshold, training starts
from ``σ_j ← min(1, N_j / T)² σ_j``; both factors' columns are scaled by the root of that. Unlike ``tail_decay`` it
happens once, before the first round, and nothing collapses later: what holders learn stays.

Why: a random initial weight has most of its energy beyond the smallest tiers' ranks. Columns with many holders soon
replace theirs; where a round has one holder, or none, the random tail stays for a long time, and the large tiers carry
it on top of everything that the others have learnt. Small instead of zero, because a column pair that is zero in both
factors has no gradient, and re-ordering balances the factors (LoRA's start, one zero factor, would not survive it).

Source: FedMaestro (ablation in experiments/README.md). The square was compared with the first power and with zero.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmaestro.plan import Plan
from fedmaestro.strategies.base import factor_layers
from fedmaestro.submodel import State


def expected_holders(plan: Plan, tier_of: Sequence[int], devices_per_round: int) -> dict[str, Tensor]:
    """Return how many devices of a round hold each column, in expectation: ``(R,)`` by LoD layer.

    Args:
        plan: what each tier trains, and how often its devices can be reached.
        tier_of: tier of every device, as an index into the fleet.
        devices_per_round: devices whose work a round waits for.
    """
    counts = Counter(tier_of)
    tiers = [(tier, counts[tier.index] * tier.tier.availability) for tier in plan.tiers if tier.trains is not None]
    total = sum(weight for _, weight in tiers)
    holders = {layer: torch.zeros(rank, dtype=torch.float64) for layer, rank in (plan.full.size.ranks or {}).items()}
    for tier, weight in tiers:
        assert tier.trains is not None
        for layer, rank in (tier.trains.size.ranks or {}).items():
            holders[layer][:rank] += devices_per_round * weight / total
    return holders


def start_tails(state: Mapping[str, Tensor], holders: Mapping[str, Tensor], threshold: float) -> State:
    """Return ``state`` with the columns of few holders scaled down.

    Args:
        state: the initial one, factors ``<layer>.u (O, R)`` and ``<layer>.v (R, I…)``.
        holders: ``(R,)`` by layer; columns that nobody holds are kept, for nobody is served them either.
        threshold: ``T``; 0: nothing changes.
    """
    new = dict(state)
    for layer in factor_layers(state) if threshold else ():
        if layer not in holders:  # A separate model's, all of whose columns its own devices hold.
            continue
        # Both factors by the root of the square.
        share = (holders[layer] / threshold).clamp(max=1)
        root = torch.where(holders[layer] > 0, share, 1.0)
        u, v = state[f"{layer}.u"], state[f"{layer}.v"]
        new[f"{layer}.u"] = (u * root).to(u.dtype)
        new[f"{layer}.v"] = (v * root.reshape(-1, *(1,) * (v.dim() - 1))).to(v.dtype)
    return new
