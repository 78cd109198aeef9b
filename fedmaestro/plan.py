"""Who trains what: the size of every tier under a submodel rule, with its costs."""

from collections.abc import Callable, Iterable, Sequence
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
class Passes:
    """How often a local objective runs the nested levels of a device (its own submodel, then all smaller ones).

    Attributes:
        expected: passes (forward and backward) per step at each level, own first, for a number of levels.
        together: whether the own level and a smaller one keep their activations at the same time.
    """

    expected: Callable[[int], Sequence[float]]
    together: bool = False


OWN_PASS = Passes(expected=lambda levels: [1.0] + [0.0] * (levels - 1))
"""One pass of the own submodel per step."""


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
    step_macs: int
    """MACs per example of a local step under the objective (all of its passes, in expectation)."""
    step_memory_bytes: int
    """Peak memory of a local step under the objective."""


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
    passes: Passes = OWN_PASS,
) -> Plan:
    """Fit every tier's size to its budgets.

    Args:
        architecture: the LoD form; ``rule.form`` turns it into the dense one where needed.
        tiers: the fleet.
        rule: see ``SubmodelRule``.
        batch_size: examples of a local step, for the memory budgets.
        momentum: whether the local optimiser keeps a momentum buffer, for the memory budgets.
        passes: what the local objective runs in a step, for the memory budgets and the virtual clock.

    Raises:
        UserError: a tier that affords no size; ``capable`` without a tier that affords the whole model.
    """
    _check_ranked(architecture, tiers)
    together = passes.together and rule.trains != "smallest"
    fractions = _fit_all(architecture, tiers, batch_size, momentum, together)
    if rule.form == "dense":
        at_rank = _cost_function(architecture, batch_size, momentum)
        tiers_by_macs = tuple(
            with_macs_budget(t, at_rank(f).macs_per_example) for t, f in zip(tiers, fractions, strict=True)
        )
        architecture = replace(architecture, form="dense")
        fractions = _fit_all(architecture, tiers_by_macs, batch_size, momentum, together)
    submodel = _submodel_function(architecture, batch_size, momentum)
    serving = [submodel(min(fractions) if rule.trains == "smallest" else f) for f in fractions]
    plans = tuple(
        _tier_plan(tiers[i], i, serving, _trained(rule, fractions, i, submodel), passes)
        for i in sorted(range(len(tiers)), key=lambda i: (-fractions[i], i))
    )
    if all(plan.trains is None for plan in plans):
        raise UserError(
            f"no tier affords the whole model (largest fraction {float(max(fractions)):.3g}), so nobody would train: "
            "use another strategy or fleet"
        )
    return Plan(architecture=architecture, tiers=plans)


def smaller_levels(trains: Submodel, serving: Iterable[Submodel]) -> list[Submodel]:
    """Return the distinct submodels inside ``trains`` that serve smaller tiers, largest first: a device's levels."""
    distinct = {other.cost.params: other for other in serving if other.cost.params < trains.cost.params}
    return [distinct[params] for params in sorted(distinct, reverse=True)]


def _check_ranked(architecture: Architecture, tiers: tuple[Tier, ...]) -> None:
    if not architecture.full_size.ranks and any(tier.rank_fraction not in (None, 1) for tier in tiers):
        raise UserError(
            f"model.keep-dense={architecture.keep_dense!r} leaves no layer of {architecture.name!r} to factorise, "
            "so no tier can be smaller: keep fewer layers dense"
        )


def _tier_plan(
    tier: Tier, index: int, serving: Sequence[Submodel], trains: Submodel | None, passes: Passes
) -> TierPlan:
    macs = memory = 0
    if trains is not None:
        smaller = smaller_levels(trains, serving)
        levels = [trains, *smaller]
        expected = passes.expected(len(levels))
        macs = round(sum(p * x.cost.train_macs_per_example for p, x in zip(expected, levels, strict=True)))
        memory = trains.cost.train_memory_bytes
        if passes.together and smaller:
            memory += smaller[0].cost.activation_bytes
    return TierPlan(
        tier=tier, index=index, serves=serving[index], trains=trains, step_macs=macs, step_memory_bytes=memory
    )


def _trained(
    rule: SubmodelRule, fractions: list[Fraction], i: int, submodel: Callable[[Fraction], Submodel]
) -> Submodel | None:
    if rule.trains == "capable" and fractions[i] != FULL:
        return None
    fraction = {"own": fractions[i], "smallest": min(fractions)}.get(rule.trains, FULL)
    return submodel(fraction)


def _fit_all(
    architecture: Architecture, tiers: tuple[Tier, ...], batch_size: int, momentum: bool, together: bool
) -> list[Fraction]:
    """Fit every tier; with ``together``, its memory must also hold the largest smaller tier's activations."""
    cost_at, chain = _cost_function(architecture, batch_size, momentum), architecture.fractions()
    alone = [fit(tier, chain, cost_at, cost_at(FULL)) for tier in tiers]
    if not together:
        return alone
    fitted: dict[int, Fraction] = {}

    def with_smaller(fraction: Fraction) -> Cost:
        own = cost_at(fraction)
        below = [cost_at(f).activation_bytes for f in fitted.values() if f < fraction]
        return replace(own, train_memory_bytes=own.train_memory_bytes + max(below, default=0))

    for i in sorted(range(len(tiers)), key=lambda i: alone[i]):
        fitted[i] = fit(tiers[i], chain, with_smaller, cost_at(FULL))
    return [fitted[i] for i in range(len(tiers))]


def _cost_function(architecture: Architecture, batch_size: int, momentum: bool) -> Callable[[Fraction], Cost]:
    full = trace(architecture.full, architecture.image_shape)

    @cache
    def cost_at(fraction: Fraction) -> Cost:
        size = architecture.size_at(fraction)
        # The closed form covers ranks; a width changes every layer, so it is traced.
        traced = full if architecture.form == "lod" else trace(architecture.build(size), architecture.image_shape)
        return cost(traced, size.ranks or {}, batch_size=batch_size, momentum=momentum)

    return cost_at


def _submodel_function(architecture: Architecture, batch_size: int, momentum: bool) -> Callable[[Fraction], Submodel]:
    cost_at = _cost_function(architecture, batch_size, momentum)

    @cache
    def submodel(fraction: Fraction) -> Submodel:
        size = architecture.size_at(fraction)
        return Submodel(size=size, shapes=architecture.shapes(size), cost=cost_at(fraction))

    return submodel
