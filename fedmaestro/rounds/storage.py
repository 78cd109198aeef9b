"""How the tiers' models lie in what the server stores.

Usually there is one model, and each tier's is the leading block of every tensor (``submodel.cut``). What differs:

- *separate*: every size is a model of its own; its owner is the first tier of that size;
- *rolls* (FedRolex, arXiv 2212.01548): submodels are leading blocks too, and before every round but the first the
  channels of the stored state move on by one, so the window of a narrow model passes over all of them. A rolled network
  is the same function where norms are by channel (a GroupNorm's groups would change members, so it is refused).
  Departure: the paper's global model stays in place and its window moves, which is the same. What serves a tier, which
  the paper leaves open, is the window that its devices have trained last;
- *own tensors* (``train.per-tier``): of the kinds that it names (``models.kinds``), the server keeps the one model's,
  and a copy for each tier. A tier's devices are sent its copy, train it, and alone decide what becomes of it: the row's
  rule is applied to the tier's devices as if there were no others, and then its server steps. All other tensors are
  those of the one model. Its own tensors of these kinds go on as without copies, over the devices of all tiers: they
  belong to the whole model, which serves whoever is of no tier. Copies start equal.
  Sources: inconsistent parameters of NeFL (arXiv 2308.07761), which are kept for each submodel; FedBN (Li et al.,
  ICLR 2021) keeps norms, FedPer (arXiv 1912.00818) heads, there of each device instead of each tier. Where an
  objective trains smaller levels, it does so with the copies that the device has: those of its own tier.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from fedmaestro.fleet.plan import Plan, Submodel
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.masks import masked
from fedmaestro.submodel import Shapes, State, cut

Owner = str | None
"""The tier whose own model, or whose own tensors it is; None: the one model that all tiers share."""

Models = Mapping[Owner, State]
"""All that the server stores."""


def shapes(plan: Plan) -> dict[Owner, Shapes]:
    """Return the shapes of every model that the server stores."""
    if plan.setting.rule.separate:
        return {owner_of(plan, submodel): submodel.shapes for submodel in plan.serving}
    models: dict[Owner, Shapes] = {None: plan.full.shapes}
    if plan.setting.own:
        models |= {tier.tier.name: own_shapes(plan, tier.serves) for tier in plan.tiers}
    return models


def own_shapes(plan: Plan, submodel: Submodel) -> Shapes:
    """Return the shapes of those tensors of a submodel of which each tier has its own."""
    return {name: shape for name, shape in submodel.shapes.items() if name in plan.setting.own}


def stored(plan: Plan, state: Mapping[str, Tensor]) -> dict[Owner, State]:
    """Return what the server stores at a run's start, from the initial state of the whole network.

    Args:
        plan: the tiers.
        state: all channels or ranks of the architecture; the plan's whole model may be smaller.
    """
    return {
        owner: {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in cut(state, own).items()}
        for owner, own in shapes(plan).items()
    }


def owner_of(plan: Plan, submodel: Submodel) -> Owner:
    """Return in whose model a submodel lies, apart from tensors of its tier's own."""
    return plan.serving[submodel][0].tier.name if plan.setting.rule.separate else None


def download(plan: Plan, models: Models, submodel: Submodel) -> State:
    """Return the tensors of a submodel as a device is sent them: views, unless it keeps a part of the entries only."""
    state, share = _held(plan, models, submodel), submodel.size.share
    return state if share is None else masked(state, share)


def _held(plan: Plan, models: Models, submodel: Submodel) -> State:
    state = cut(models[owner_of(plan, submodel)], submodel.shapes)
    return state if submodel.tier is None else state | cut(models[submodel.tier], own_shapes(plan, submodel))


def whole(plan: Plan, models: Models, owner: Owner) -> State:
    """Return the model whose devices decide what becomes of ``models[owner]``: itself, or that of the tier."""
    return _held(plan, models, plan.by_name(owner).serves) if owner and plan.setting.own else dict(models[owner])


def advanced(plan: Plan, state: State) -> State:
    """Return a state (the model's, or one of the same tensors) as the next round starts from it."""
    if not plan.setting.rule.rolls:
        return state
    units = rolling_units(plan.architecture)

    def rolled(name: str, tensor: Tensor) -> Tensor:
        shifts = units.get(name, ())
        axes = [axis for axis, shift in enumerate(shifts) if shift]
        return torch.roll(tensor, [-shifts[axis] for axis in axes], axes) if axes else tensor

    return {name: rolled(name, tensor) for name, tensor in state.items()}


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
