"""How the tiers' models lie in the global state.

Usually each is the leading block of every tensor (``submodel.cut``). Two rules differ:

- *separate*: every size is a model of its own, under ``<tier>/<name>``, the tier being the first of that size;
- *rolls* (FedRolex, arXiv 2212.01548): submodels are leading blocks too, and after every round the channels of the
  stored state move on by one, so the window of a narrow model passes over all of them. A rolled network without norm
  layers is the same function. Departures: the paper's global model stays in place and its window moves, which is the
  same; what serves a tier is the submodel that its devices would be sent next. Groups of a GroupNorm are made of
  neighbouring channels and move with them.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from fedmaestro.fleet.plan import Plan, Submodel
from fedmaestro.models.architecture import Architecture
from fedmaestro.strategies.base import Aggregation, Partial, contributors, signature
from fedmaestro.submodel import State, cut


def stored(plan: Plan, state: Mapping[str, Tensor]) -> State:
    """Return the global state of a run's start from the initial state of the whole network.

    Args:
        plan: the tiers.
        state: all channels or ranks of the architecture; the plan's whole model may be smaller.
    """
    if not plan.setting.rule.separate:
        return {name: tensor.contiguous() for name, tensor in cut(state, plan.full.shapes).items()}
    return {
        f"{owner}/{name}": tensor.clone()
        for owner, submodel in owners(plan).items()
        for name, tensor in cut(state, submodel.shapes).items()
    }


def download(plan: Plan, global_state: Mapping[str, Tensor], submodel: Submodel) -> State:
    """Return the tensors of a submodel."""
    if not plan.setting.rule.separate:
        return cut(global_state, submodel.shapes)
    return _of(owner_of(plan, submodel), global_state)


def aggregate(
    plan: Plan, aggregation: Aggregation, partial: Partial, global_state: Mapping[str, Tensor]
) -> tuple[State, State]:
    """Return the aggregated global state, and how many devices each entry comes from."""
    if not plan.setting.rule.separate:
        return aggregation.finish(partial, global_state), contributors(aggregation, partial, global_state)
    new: State = {}
    devices: State = {}
    for owner in owners(plan):
        own = _of(owner, global_state)
        # Devices leave out what they do not train, so a size is known by the tensors that they do send.
        shapes = set(signature(own))
        block = {key: block for key, block in partial.items() if key and shapes.issuperset(key)}
        new |= _under(owner, aggregation.finish(block, own))
        devices |= _under(owner, contributors(aggregation, block, own))
    return new, devices


def advance(plan: Plan, state: State, memory: State) -> tuple[State, State]:
    """Return the global state and the server optimiser's memory as the next round starts from them."""
    if not plan.setting.rule.rolls:
        return state, memory
    units = rolling_units(plan.architecture)

    def rolled(name: str, tensor: Tensor) -> Tensor:
        shifts = units.get(name, ())
        axes = [axis for axis, shift in enumerate(shifts) if shift]
        return torch.roll(tensor, [-shifts[axis] for axis in axes], axes) if axes else tensor

    by_name = {key: key.partition("/")[2] for key in memory}
    return (
        {name: rolled(name, tensor) for name, tensor in state.items()},
        {key: rolled(by_name[key], tensor) for key, tensor in memory.items()},
    )


def owners(plan: Plan) -> dict[str, Submodel]:
    """Return the distinct serving submodels by the name of their first tier."""
    first: dict[int, str] = {}
    for tier in plan.tiers:
        first.setdefault(tier.serves.cost.params, tier.tier.name)
    return {name: plan.by_name(name).serves for name in first.values()}


def owner_of(plan: Plan, submodel: Submodel) -> str:
    """Return the tier under whose name a submodel's tensors are stored when sizes are separate."""
    return next(name for name, other in owners(plan).items() if other.cost.params == submodel.cost.params)


@lru_cache(maxsize=8)
def rolling_units(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return by tensor and axis how many entries one channel takes; 0 on axes that widths do not scale.

    A flattened feature map has a run of entries for each channel.
    """
    narrow = architecture.shapes(architecture.size_at(Fraction(1, 10**9)))
    full = architecture.shapes(architecture.full_size)
    return {
        name: tuple(one if one != whole else 0 for one, whole in zip(narrow[name], shape, strict=True))
        for name, shape in full.items()
    }


def _of(owner: str, state: Mapping[str, Tensor]) -> State:
    return {name.removeprefix(f"{owner}/"): x for name, x in state.items() if name.startswith(f"{owner}/")}


def _under(owner: str, state: Mapping[str, Tensor]) -> State:
    return {f"{owner}/{name}": tensor for name, tensor in state.items()}
