r"""Multi-Krum, block by block of a nested model.

A block is all entries, of all tensors, that the same sizes hold: the rank segment between two tiers' ranks, say. Of the
``m`` devices that hold it, ``f = ⌊βm⌋`` are assumed to be attackers (``β`` is ``train.assumed-attackers``). A device's
score is the sum of the squared distances, within the block, to the ``max(1, m − f − 2)`` devices nearest to it; the
``f`` devices of the largest scores are left out and the others averaged, weighted by examples (Blanchard et al.,
NeurIPS 2017, Section 4). On one size this is Flower's Multi-Krum that keeps ``m − f``.

Blocks and not whole updates, because a device of a small tier has no distance to another in the tail, and a whole
update of a large tier is far from all others by its size alone.

Each size loses its share of the ``f`` (largest remainders), those of its devices with the largest scores. What devices
of a small tier learn in a block that they share with larger ones is far from what those learn: chosen from all
together, Multi-Krum leaves the small tier out (experiments/older.md has what that costs).

Departures: each block chooses for itself, so that a device may count in one and not in another. The bound of the paper
needs ``m ≥ 2f + 3``; where ``βm < 1``, as in the tail, ``f`` is 0 and the rule is the mean.

Known pathologies: attackers who are more than ``β`` of one size's devices count in part, also where they are fewer of
all; attackers who send the same are nearest to each other; honest devices whose data differ from the
others' are left out.

Cost: the memory of all submodels of a round, and ``O(m² d)``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmaestro.strategies.base import Aggregation, Partial
from fedmaestro.strategies.each_device import EACH_DEVICE, Devices, with_examples
from fedmaestro.submodel import State, leading_block, num_elements


def finish(partial: Partial[Devices], global_state: Mapping[str, Tensor], attackers: float) -> State:
    """Return the mean of the chosen devices, block by block."""
    # Whatever the order in which they came: ties are broken by it.
    sizes = sorted(with_examples(partial), key=lambda size: -num_elements(size[0]))
    codes = {name: torch.zeros(old.shape, dtype=torch.int64) for name, old in global_state.items()}
    for number, (shapes, _) in enumerate(sizes):
        for name, shape in shapes.items():
            leading_block(codes[name], shape).add_(1 << number)
    new = {name: old.clone() for name, old in global_state.items()}
    known = {code for tensor in codes.values() for code in np.unique(tensor.numpy()).tolist()}
    for code in sorted(known - {0}):
        holders = [size for number, size in enumerate(sizes) if code >> number & 1]
        weights = torch.cat([sums.weights for _, sums in holders])
        entries = {name: tensor == code for name, tensor in codes.items() if bool((tensor == code).any())}
        # Where all of them have it, a block has nothing of tensors that only some of them send.
        values = {name: torch.cat([_of(name, mask, size) for size in holders]) for name, mask in entries.items()}
        counts = [len(sums.weights) for _, sums in holders]
        chosen = best(torch.cat(list(values.values()), dim=1), counts, attackers)
        share = weights[chosen] / weights[chosen].sum()
        for name, mask in entries.items():
            new[name][mask] = (share @ values[name][chosen]).to(new[name].dtype)
    return new


def _of(name: str, mask: Tensor, size: tuple[Mapping[str, tuple[int, ...]], Devices]) -> Tensor:
    """Return the entries of a block that devices of a size hold, ``(n, entries)`` in float64."""
    shapes, sums = size
    return sums.states[name][:, leading_block(mask, shapes[name])].double()


def best(values: Tensor, sizes: Sequence[int], attackers: float) -> Tensor:
    """Return which rows of ``values (m, d)`` count, by position; ``sizes``: how many rows of each size, in turn."""
    count = len(values)
    assumed = int(attackers * count)
    if not assumed:
        return torch.arange(count)
    distances = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = max(1, count - assumed - 2)
    scores = distances.sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1).tolist()
    # Two that are nearest to each other have one score where it is that of one neighbour.
    totals = distances.sum(dim=1).tolist()
    chosen: list[int] = []
    first = 0
    for own, left_out in zip(sizes, apportioned(assumed, sizes), strict=True):
        order = sorted(range(first, first + own), key=lambda i: (scores[i], totals[i]))
        chosen += order[: own - left_out]
        first += own
    return torch.tensor(sorted(chosen))


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """Return how many of ``total`` each size gets, in proportion, by largest remainders (ties: the larger size)."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(x) for x in exact]
    order = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], -sizes[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


MULTI_KRUM = Aggregation(
    name="multi-krum",
    finish=finish,
    settings={"attackers": "train.assumed-attackers"},
    reduction=EACH_DEVICE,
    summary="robust: in each block, the mean of the devices that lie nearest to the others (train.assumed-attackers)",
    source="Blanchard et al. (NeurIPS 2017), per block",
)
