"""Who trains what: the size of every tier under a submodel rule, with its costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Literal

from fedmaestro.cost import Cost, cost, trace
from fedmaestro.errors import UserError
from fedmaestro.fleet import Tier, fit, with_macs_budget
from fedmaestro.models.architecture import FULL, Architecture, Form, Size
from fedmaestro.submodel import Shapes


@dataclass(frozen=True, kw_only=True)
class SubmodelRule:
    """Which part of the network the devices of a tier train.

    Attributes:
        form: ``lod`` (rank prefixes) or ``dense`` (leading channels; a tier's width has the MACs of its ranks).
        trains: ``own``: every tier its own size; ``smallest``: all the smallest tier's, which also serves all;
            ``full``: all the whole model, budgets or not (oracle); ``capable``: only tiers that afford the whole model.
    """

    form: Form = "lod"
    trains: Literal["own", "smallest", "full", "capable"] = "own"


@dataclass(frozen=True, kw_only=True)
class Submodel:
    """One size with its shapes and costs."""

    size: Size
    shapes: Shapes
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class TierPlan:
    """A tier, the submodel that serves (and is evaluated for) it, and the one that its devices train."""

    tier: Tier
    index: int
    """Position in the fleet, which ``fleet.assign_tiers`` refers to."""
    serves: Submodel
    trains: Submodel | None
    """None: devices of this tier do not take part."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Architecture and tiers, largest submodel first."""

    architecture: Architecture
    tiers: tuple[TierPlan, ...]

    def by_index(self, index: int) -> TierPlan:
        """Return the plan of the tier at this position of the fleet."""
        return next(plan for plan in self.tiers if plan.index == index)

    def by_name(self, name: str) -> TierPlan:
        """Return the plan of the tier of this name."""
        return next(plan for plan in self.tiers if plan.tier.name == name)


def make_plan(
    architecture: Architecture,
    tiers: tuple[Tier, ...],
    rule: SubmodelRule,
    *,
    batch_size: int,
    momentum: bool = False,
) -> Plan:
    """Fit every tier's size to its budgets.

    Args:
        architecture: the LoD form; ``rule.form`` turns it into the dense one where needed.
        tiers: the fleet.
        rule: see ``SubmodelRule``.
        batch_size: examples of a local step, for the memory budgets.
        momentum: whether the local optimiser keeps a momentum buffer, for the memory budgets.

    Raises:
        UserError: a tier that affords no size; ``capable`` without a tier that affords the whole model.
    """
    fractions = _fit_all(architecture, tiers, batch_size, momentum)
    if rule.form == "dense":
        at_rank = _cost_function(architecture, batch_size, momentum)
        tiers_by_macs = tuple(
            with_macs_budget(t, at_rank(f).macs_per_example) for t, f in zip(tiers, fractions, strict=True)
        )
        architecture = replace(architecture, form="dense")
        fractions = _fit_all(architecture, tiers_by_macs, batch_size, momentum)
    submodel = _submodel_function(architecture, batch_size, momentum)
    order = sorted(range(len(tiers)), key=lambda i: (-fractions[i], i))
    plans = tuple(
        TierPlan(
            tier=tiers[i],
            index=i,
            serves=submodel(min(fractions) if rule.trains == "smallest" else fractions[i]),
            trains=_trained(rule, fractions, i, submodel),
        )
        for i in order
    )
    if all(plan.trains is None for plan in plans):
        raise UserError(
            f"no tier affords the whole model (largest fraction {float(max(fractions)):.3g}), so nobody would train: "
            "use another strategy or fleet"
        )
    return Plan(architecture=architecture, tiers=plans)


def _trained(
    rule: SubmodelRule, fractions: list[Fraction], i: int, submodel: Callable[[Fraction], Submodel]
) -> Submodel | None:
    if rule.trains == "capable" and fractions[i] != FULL:
        return None
    fraction = {"own": fractions[i], "smallest": min(fractions)}.get(rule.trains, FULL)
    return submodel(fraction)


def _fit_all(architecture: Architecture, tiers: tuple[Tier, ...], batch_size: int, momentum: bool) -> list[Fraction]:
    cost_at = _cost_function(architecture, batch_size, momentum)
    return [fit(tier, architecture.fractions(), cost_at, cost_at(FULL)) for tier in tiers]


def _cost_function(architecture: Architecture, batch_size: int, momentum: bool) -> Callable[[Fraction], Cost]:
    full = trace(architecture.full, architecture.image_shape)

    @cache
    def cost_at(fraction: Fraction) -> Cost:
        size = architecture.size_at(fraction)
        # The closed form covers ranks; a width changes every layer, so it is traced.
        traced = full if architecture.form == "lod" else trace(architecture.build(size), architecture.image_shape)
        return cost(traced, size.ranks, batch_size=batch_size, momentum=momentum)

    return cost_at


def _submodel_function(architecture: Architecture, batch_size: int, momentum: bool) -> Callable[[Fraction], Submodel]:
    cost_at = _cost_function(architecture, batch_size, momentum)

    @cache
    def submodel(fraction: Fraction) -> Submodel:
        size = architecture.size_at(fraction)
        return Submodel(size=size, shapes=architecture.shapes(size), cost=cost_at(fraction))

    return submodel
