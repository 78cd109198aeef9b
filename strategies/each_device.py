"""What robust rules are made of: every device's submodel by itself, instead of sums.

A sum hides who has sent what, so these rules need the memory, and the server the traffic, of all devices of a round;
devices are sent one by one. All other rules need those of the submodel sizes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmaestro.strategies.base import SUMS, Partial, Parts, Reduction, Sizes
from fedmaestro.submodel import Shape, Shapes, Signature, State, leading_block

WEIGHTS = "weights"


@dataclass(frozen=True)
class Devices:
    """The devices of one size, in the order of the tier's tree.

    Attributes:
        states: each tensor ``(n, *shape)``, one device after the other.
        weights: ``(n,)`` float64, examples of each.
    """

    states: State
    weights: Tensor


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> Devices:  # noqa: ARG001
    states = {name: tensor[None].clone() for name, tensor in submodel.items()}
    return Devices(states, torch.tensor([weight], dtype=torch.float64))


def _add(left: Devices, right: Devices, sizes: Sizes) -> Devices:  # noqa: ARG001
    states = {name: torch.cat((tensor, right.states[name])) for name, tensor in left.states.items()}
    return Devices(states, torch.cat((left.weights, right.weights)))


def _unpack(parts: Parts, size: Signature) -> Devices:  # noqa: ARG001
    return Devices(dict(parts[SUMS]), parts[WEIGHTS][WEIGHTS])


EACH_DEVICE: Reduction[Devices] = Reduction(
    lift=_lift,
    add=_add,
    pack=lambda x: {SUMS: x.states, WEIGHTS: {WEIGHTS: x.weights}},
    unpack=_unpack,
    keeps_devices=True,
)
"""All submodels, one after the other."""


def with_examples(partial: Partial[Devices]) -> Iterator[tuple[Shapes, Devices]]:
    """Yield shapes and devices of every size, without the devices that have no example."""
    for shapes, block in partial:
        chosen = block.sums.weights > 0
        if bool(chosen.all()):
            yield shapes, block.sums
        elif bool(chosen.any()):
            states = {name: tensor[chosen] for name, tensor in block.sums.states.items()}
            yield shapes, Devices(states, block.sums.weights[chosen])


def spread(name: str, partial: Partial[Devices], old: Tensor, empty: float) -> tuple[Tensor, Tensor]:
    """Return a tensor of all devices that hold a part of it, and how many hold each entry.

    Args:
        name: of the tensor.
        partial: the devices.
        old: the global one, ``(*shape)``.
        empty: what stands where a device holds nothing.

    Returns:
        ``(n, *shape)`` in the type of ``old`` (float64 for integers), and the counts ``(*shape)``, int64.
    """
    holders = [(shapes[name], sums.states[name]) for shapes, sums in with_examples(partial) if name in shapes]
    dtype = old.dtype if old.is_floating_point() else torch.float64
    values = torch.full((sum(len(own) for _, own in holders), *old.shape), empty, dtype=dtype)
    counts = torch.zeros(old.shape, dtype=torch.int64)
    first = 0
    for shape, own in holders:
        _block(values[first : first + len(own)], shape).copy_(own)
        leading_block(counts, shape).add_(len(own))
        first += len(own)
    return values, counts


def _block(values: Tensor, shape: Shape) -> Tensor:
    return leading_block(values, (len(values), *shape))
