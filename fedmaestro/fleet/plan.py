"""Who trains what: the size of every tier under a submodel rule, with its costs."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property, lru_cache

from fedmaestro.errors import UserError
from fedmaestro.fleet.budgets import (
    budgets,
    exact,
    fit,
    with_macs_budget,
    within_ranks,
    within_widths,
    without_fraction,
)
from fedmaestro.fleet.cost import Cost, cost, with_kept_entries
from fedmaestro.fleet.equal import Quantity, Spend, fit_equal, spent
from fedmaestro.fleet.match import Matched, matched_sizes, ranks_of_macs
from fedmaestro.fleet.rule import OWN_PASS, Passes, SubmodelRule
from fedmaestro.fleet.tiers import Tier
from fedmaestro.fleet.traces import trace_of
from fedmaestro.lod.search import add_columns
from fedmaestro.models.architecture import Architecture, Size
from fedmaestro.models.kinds import tensors_of
from fedmaestro.models.masks import kept_count, maskable
from fedmaestro.submodel import Shapes, Signature, num_elements, shapes_of, signature


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the plans of all tiers have in common.

    Attributes:
        rule: see ``SubmodelRule``.
        batch_size: examples of a local step, for the memory budgets.
        slots: tensors that the local optimiser keeps for each parameter's, for the memory budgets.
        passes: what the local objective runs in a step, for the memory budgets and the virtual clock.
    """

    rule: SubmodelRule
    batch_size: int
    slots: int = 0
    passes: Passes = OWN_PASS
    own: frozenset[str] = frozenset()
    """Tensors of which each tier has its own (``train.per-tier``)."""

    @property
    def together(self) -> bool:
        """Whether a device's memory must hold the activations of a smaller tier besides its own."""
        return self.passes.together and self.rule.trains != "smallest"


@dataclass(frozen=True, kw_only=True, eq=False)
class Submodel:
    """One size with its shapes and costs; equal to every other one of the same shapes, entries and tensors."""

    size: Size
    shapes: Shapes
    cost: Cost
    tier: str | None = None
    """Whose own tensors it has (``Setting.own``); None: it has none, or those of the whole model."""

    @cached_property
    def signature(self) -> Signature:
        """The key of the size."""
        return signature(self.shapes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Submodel) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Signature, Fraction | None, str | None]:
        return self.signature, self.size.share, self.tier


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
    saved_macs: tuple[int, int] = (0, 0)
    """Of these, what a step saves where all U are frozen, and where all V are."""
    step_memory_bytes: int
    """Peak memory of a local step under the objective."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Architecture and tiers, largest submodel first. Each plan is made once: equality is identity."""

    architecture: Architecture
    tiers: tuple[TierPlan, ...]
    full: Submodel
    """The whole model; smaller than the architecture's full size after shrinking."""
    setting: Setting

    def by_index(self, index: int) -> TierPlan:
        """Return the plan of the tier at this position of the fleet."""
        return next(plan for plan in self.tiers if plan.index == index)

    @property
    def serving(self) -> dict[Submodel, list[TierPlan]]:
        """The distinct submodels that serve tiers, largest first, with those tiers."""
        tiers: dict[Submodel, list[TierPlan]] = {}
        for plan in self.tiers:
            tiers.setdefault(plan.serves, []).append(plan)
        return tiers

    def trained_by(self, tier: TierPlan) -> list[TierPlan]:
        """Return the tiers whose submodels the devices of a tier train: none, its own, or the smaller ones too."""
        if tier.trains is None or self.setting.rule.trains != "affordable":
            return [] if tier.trains is None else [tier]
        # Of tiers of one size, which share a model, the first one stands for it.
        smaller = [tiers[0] for size, tiers in self.serving.items() if size.cost.params < tier.trains.cost.params]
        return [tier, *smaller]

    def by_name(self, name: str) -> TierPlan:
        """Return the plan of the tier of this name."""
        return next(plan for plan in self.tiers if plan.tier.name == name)


def make_plan(
    architecture: Architecture,
    tiers: tuple[Tier, ...],
    rule: SubmodelRule,
    *,
    batch_size: int,
    slots: int = 0,
    passes: Passes = OWN_PASS,
    match_macs: bool = False,
    match_by: Quantity = "macs",
    examples: int = 1,
    per_tier: Collection[str] = (),
) -> Plan:
    """Fit every tier's size to its budgets: one rank fraction (or width) per tier.

    Args:
        architecture: the LoD form; ``rule.form`` turns it into the dense one where needed.
        tiers: the fleet.
        rule: see ``SubmodelRule``. Where a network has no narrower form, one that cuts both cuts ranks only.
        batch_size: see ``Setting``, as for ``slots`` and ``passes``.
        slots: see there.
        passes: see there.
        match_macs: give ranks and widths the same MACs per tier, those of the width next to the tier's ranks: widths
            are the coarser of the two, so ranks follow them, layer by layer (not uniform any more). Tiers that cut both
            take the largest width whose chain fits these MACs, and then as many ranks more. Of other sizes, the largest
            that has no more; masked entries save none.
        match_by: what is to be the same instead of MACs.
        examples: that a device trains on in a round, for the same time.
        per_tier: kinds of tensors of which each tier has its own (``models.kinds``).

    Raises:
        UserError: a tier that affords no size; ``capable`` without a tier that affords the whole model; a kind of
            tensors that the model does not have.
    """
    _check_ranked(architecture, tiers)
    if rule.narrows and not architecture.can_narrow:
        rule = replace(rule, narrows=False)
    setting = Setting(rule=rule, batch_size=batch_size, slots=slots, passes=passes)
    dense = replace(architecture, form="dense")
    fractions = _fit_fractions(architecture, [_at_width(tier, architecture, setting) for tier in tiers], setting)
    sizes, full = [architecture.size_at(fraction) for fraction in fractions], architecture.full_size
    if match_macs and match_by != "macs":
        costs = [_cost(architecture, size, setting) for size in sizes]
        limits = [spent(match_by, tier, [x], OWN_PASS, examples) for tier, x in zip(tiers, costs, strict=True)]
        architecture = _formed(architecture, rule)
        sizes = _equal_sizes(
            architecture, tiers, setting, limits, lambda i, levels: spent(match_by, tiers[i], levels, passes, examples)
        )
        full = max(sizes, key=lambda size: _cost(architecture, size, setting).params)
    elif rule.form == "dense" or rule.narrows or match_macs:
        costs, pairs = [_cost(architecture, size, setting) for size in sizes], list[Matched]()
        if match_macs:
            macs = _macs_to_match(dense, tiers, costs, setting)
            pairs = matched_sizes(dense, trace_of(architecture), macs, trace_of)
        if rule.form == "dense":
            architecture = _formed(architecture, rule)
            sizes, full = _dense_sizes(architecture, tiers, setting, costs, pairs), architecture.full_size
        elif rule.narrows:
            macs = [_cost(dense, pair.width, setting).macs_per_example for pair in pairs]
            macs = macs or [x.macs_per_example for x in costs]
            architecture = _formed(architecture, rule)
            sizes, full = _narrow_sizes(architecture, tiers, setting, macs), architecture.full_size
            if match_macs:
                sizes = _filled(architecture, sizes, macs)
        else:
            sizes = [pair.ranks for pair in pairs]
        if match_macs and (rule.form == "lod" or rule.trains in ("full", "capable")):
            # What no tier can train is no part of the model to be compared.
            full = max(sizes, key=lambda size: _cost(architecture, size, setting).params)
    if per_tier:
        setting = replace(setting, own=tensors_of(architecture.full, per_tier, architecture.name))
    plan = _assemble(architecture, list(enumerate(tiers)), sizes, full, setting)
    if all(tier.trains is None for tier in plan.tiers):
        raise UserError(
            f"no tier affords the whole model (largest fraction {float(max(fractions)):.3g}), so nobody would train: "
            "use another strategy or fleet"
        )
    return plan


def _dense_sizes(
    dense: Architecture, tiers: tuple[Tier, ...], setting: Setting, ranked: Sequence[Cost], pairs: Sequence[Matched]
) -> list[Size]:
    """Return what every tier affords of a dense model.

    Args:
        dense: with what makes it smaller.
        tiers: the fleet.
        setting: what their plans have in common.
        ranked: what each tier's ranks cost, for which a rank fraction stands.
        pairs: sizes of equal MACs, where these are asked for.
    """
    if dense.scales == "width" and pairs:
        return [pair.width for pair in pairs]
    if dense.scales == "entries":
        return _fit_entries(dense, tiers, setting, ranked)
    macs = [x.macs_per_example for x in ranked]
    if pairs:
        width = replace(dense, scales="width", exits="none")
        macs = [_cost(width, pair.width, setting).macs_per_example for pair in pairs]
    if dense.exits != "none":
        least = _cost(dense, dense.size_at(dense.fractions()[0]), setting).macs_per_example
        # As with ranks: below what there is, a rank fraction means the smallest size. Budgets bind.
        macs = [max(x, least) if tier.rank_fraction else x for tier, x in zip(tiers, macs, strict=True)]
    by_macs = [with_macs_budget(tier, limit) for tier, limit in zip(tiers, macs, strict=True)]
    return [dense.size_at(fraction) for fraction in _fit_fractions(dense, by_macs, setting)]


def _fit_entries(dense: Architecture, tiers: tuple[Tier, ...], setting: Setting, ranked: Sequence[Cost]) -> list[Size]:
    """Fit the shares of entries that tiers keep: a rank fraction stands for the parameters of its ranks.

    Not for their MACs: those of masked tensors are the whole model's, whatever the share.
    """
    chain = [dense.size_at(fraction) for fraction in dense.fractions()]
    costs = [_cost(dense, size, setting) for size in chain]
    reach = [
        max(1, sum(x.params <= own.params for x in costs)) if tier.rank_fraction else len(chain)
        for tier, own in zip(tiers, ranked, strict=True)
    ]
    return [chain[i] for i in _fit_all(tiers, reach, lambda i: costs[i], costs[-1], setting.together)]


def affordable(plan: Plan, chain: Sequence[Size], worth: Callable[[str, int], float]) -> list[Size]:
    """Return what every tier affords of another chain's last size, by position in the fleet; the sizes are nested.

    First the largest size of the chain that fits every budget of the tier. It suits no budget exactly: where the
    chain's next column is dear (a convolution's), cheap ones of other layers still fit. So then single columns, as far
    as the next larger tier has them. A rank fraction binds as the MACs and the traffic of the tier's size in ``plan``.

    Args:
        plan: the tiers with their budgets and uniform ranks.
        chain: nested LoD sizes, ascending from rank 1 everywhere.
        worth: of a layer's next column, at its rank so far: the one of the highest worth is added first.
    """
    planned = sorted(plan.tiers, key=lambda tier: tier.index)
    tiers = [without_fraction(x.tier, x.serves.cost) for x in planned]

    def cost_of(size: Size) -> Cost:
        return _cost(plan.architecture, size, plan.setting)

    reach, together = [len(chain)] * len(tiers), plan.setting.together
    fitted = _fit_all(tiers, reach, lambda position: cost_of(chain[position]), plan.full.cost, together)
    sizes, limits = [chain[i] for i in fitted], [budgets(tier, plan.full.cost) for tier in tiers]
    costs = [cost_of(size) for size in sizes]

    def fits(i: int, costs: Sequence[Cost]) -> bool:
        own = _beside(costs[i], [x for x in costs if together and x.params < costs[i].params])
        return not any(budget.excess(own) for budget in limits[i])

    # Larger tiers first; where sizes are equal, first who afforded more uniform ranks.
    order = sorted(range(len(tiers)), key=lambda i: (-fitted[i], -planned[i].serves.cost.params))
    most = chain[-1].ranks or {}
    for place, i in enumerate(order):

        def fit_with(ranks: dict[str, int], i: int = i, place: int = place) -> bool:
            now = [*costs[:i], cost_of(Size(ranks=ranks)), *costs[i + 1 :]]
            # Larger tiers too: they may have to hold this one's activations beside their own.
            return all(fits(j, now) for j in order[: place + 1])

        most = add_columns(sizes[i].ranks or {}, most, worth, fit_with)
        sizes[i] = Size(ranks=most)
        costs[i] = cost_of(sizes[i])
    return sizes


def replan(plan: Plan, full: Size, sizes: Sequence[Size]) -> Plan:
    """Return ``plan`` with other sizes of one chain.

    Args:
        plan: architecture, tiers and their order where sizes are equal.
        full: the whole model.
        sizes: what each tier affords, by position in the fleet.
    """
    order = [(tier.index, tier.tier) for tier in plan.tiers]
    return _assemble(plan.architecture, order, [sizes[index] for index, _ in order], full, plan.setting)


def encode_ranks(plan: Plan) -> str:
    """Return the ranks of a LoD plan as compact JSON: the whole model's, then each tier's by position in the fleet."""
    sizes = [plan.full.size, *(plan.by_index(i).serves.size for i in range(len(plan.tiers)))]
    names = list(plan.architecture.full_size.ranks or {})
    table = [[(size.ranks or {})[name] for name in names] for size in sizes]
    return json.dumps(table, separators=(",", ":"))


def decode_ranks(plan: Plan, text: str) -> Plan:
    """Return ``plan`` with the ranks that ``encode_ranks`` wrote."""
    names = list(plan.architecture.full_size.ranks or {})
    now = [plan.full, *(plan.by_index(i).serves for i in range(len(plan.tiers)))]
    full, *sizes = [
        replace(known.size, ranks=dict(zip(names, ranks, strict=True)))
        for known, ranks in zip(now, json.loads(text), strict=True)
    ]
    return replan(plan, full, sizes)


def smaller_levels(trains: Submodel, serving: Iterable[Submodel]) -> list[Submodel]:
    """Return the distinct submodels inside ``trains`` that serve smaller tiers, largest first: a device's levels."""
    distinct = {
        (other.signature, other.size.share): other for other in serving if other.cost.params < trains.cost.params
    }
    return sorted(distinct.values(), key=lambda other: -other.cost.params)


def _check_ranked(architecture: Architecture, tiers: tuple[Tier, ...]) -> None:
    if not architecture.full_size.ranks and any(tier.rank_fraction not in (None, 1) for tier in tiers):
        raise UserError(
            f"model.keep-dense={architecture.keep_dense!r} leaves no layer of {architecture.name!r} to factorise, "
            "so no tier can be smaller: keep fewer layers dense"
        )


def _assemble(
    architecture: Architecture,
    tiers: Sequence[tuple[int, Tier]],
    sizes: Sequence[Size],
    full: Size,
    setting: Setting,
) -> Plan:
    """Return the plan of tiers (with their positions in the fleet) that afford these sizes, all of one chain."""
    known: dict[Submodel, Submodel] = {}

    def submodel(size: Size, tier: str | None = None) -> Submodel:
        # Two widths can have the same channels: then they are one size.
        shapes, costs = architecture.shapes(size), _cost(architecture, size, setting)
        new = Submodel(size=size, shapes=shapes, cost=costs, tier=tier if setting.own else None)
        return known.setdefault(new, new)

    whole = submodel(full)
    own = [submodel(size, tier.name) for size, (_, tier) in zip(sizes, tiers, strict=True)]
    smallest = min(own, key=lambda x: x.cost.params)
    serving = [smallest if setting.rule.trains == "smallest" else x for x in own]
    order = sorted(range(len(tiers)), key=lambda i: -own[i].cost.params)
    plans = tuple(
        _tier_plan(*tiers[i], serving[i], _trained(setting.rule, own[i], smallest, whole), serving, setting.passes)
        for i in order
    )
    return Plan(architecture=architecture, tiers=plans, full=whole, setting=setting)


def _tier_plan(
    index: int,
    tier: Tier,
    serves: Submodel,
    trains: Submodel | None,
    serving: Sequence[Submodel],
    passes: Passes,
) -> TierPlan:
    macs = memory = 0
    saved = 0, 0
    if trains is not None:
        smaller = smaller_levels(trains, serving)
        levels = [trains, *smaller]
        expected = passes.expected(len(levels))
        macs = round(sum(p * x.cost.train_macs_per_example for p, x in zip(expected, levels, strict=True)))
        both = (sum(p * x.cost.saved_macs[i] for p, x in zip(expected, levels, strict=True)) for i in range(2))
        saved = round(next(both)), round(next(both))
        memory = trains.cost.train_memory_bytes
        if passes.together and smaller:
            memory += smaller[0].cost.activation_bytes
    return TierPlan(
        tier=tier,
        index=index,
        serves=serves,
        trains=trains,
        step_macs=macs,
        saved_macs=saved,
        step_memory_bytes=memory,
    )


def _trained(rule: SubmodelRule, own: Submodel, smallest: Submodel, whole: Submodel) -> Submodel | None:
    if rule.trains == "capable" and own != whole:
        return None
    return {"own": own, "affordable": own, "smallest": smallest}.get(rule.trains, whole)


def _formed(architecture: Architecture, rule: SubmodelRule) -> Architecture:
    """Return the LoD architecture in the form that a rule cuts, as it cuts it."""
    if rule.form == "dense":
        return replace(architecture, form="dense", scales=rule.scales, exits=rule.exits)
    return replace(architecture, narrows=rule.narrows, rank_power=rule.rank_power)


def _equal_sizes(
    architecture: Architecture, tiers: Sequence[Tier], setting: Setting, limits: Sequence[float], spend: Spend
) -> list[Size]:
    """Return the largest sizes that spend no more than ``limits``, and fit all budgets but the rank fraction."""
    chain = architecture.fractions()
    free = [tier.model_copy(update={"rank_fraction": None, "width": None}) for tier in tiers]
    reach = [chain.index(fraction) + 1 for fraction in _fit_fractions(architecture, free, setting)]

    @cache
    def cost_at(position: int) -> Cost:
        return _cost(architecture, architecture.size_at(chain[position]), setting)

    found = fit_equal(limits, reach, lambda own, smaller: [cost_at(i) for i in (own, *smaller)], spend)
    return [architecture.size_at(chain[position]) for position in found]


def _narrow_sizes(
    architecture: Architecture, tiers: Sequence[Tier], setting: Setting, macs: Sequence[int]
) -> list[Size]:
    """Return the largest narrower LoD sizes that have no more than these MACs, and fit all budgets."""
    by_macs = [with_macs_budget(tier, limit) for tier, limit in zip(tiers, macs, strict=True)]
    return [architecture.size_at(fraction) for fraction in _fit_fractions(architecture, by_macs, setting)]


def _filled(architecture: Architecture, sizes: Sequence[Size], macs: Sequence[int]) -> list[Size]:
    """Return narrower LoD sizes with the ranks that use ``macs`` best: at least those of the next smaller size."""
    filled: dict[int, Size] = {}
    least: dict[str, int] = {}
    for i in sorted(range(len(sizes)), key=lambda i: macs[i]):
        least = least or dict.fromkeys(sizes[i].ranks or {}, 1)
        least = ranks_of_macs(trace_of(architecture, sizes[i].width), macs[i], least)
        filled[i] = replace(sizes[i], ranks=least)
    return [filled[i] for i in range(len(sizes))]


def _at_width(tier: Tier, architecture: Architecture, setting: Setting) -> Tier:
    """Return ``tier`` for a rank model: the MACs of its width are a budget, or those of the smallest ranks if more."""
    if tier.width is None:
        return tier
    dense = replace(architecture, form="dense")
    sizes = (dense, dense.size_at(exact(tier.width))), (architecture, architecture.size_at(architecture.fractions()[0]))
    macs = max(_cost(of, size, setting).macs_per_example for of, size in sizes)
    return tier.model_copy(update={"macs": macs if tier.macs is None else min(macs, tier.macs)})


def _macs_to_match(dense: Architecture, tiers: tuple[Tier, ...], ranked: Sequence[Cost], setting: Setting) -> list[int]:
    """Return the MACs of each tier's ranks; of the width itself where a tier is given by one."""
    macs = [x.macs_per_example for x in ranked]
    if all(tier.width is None for tier in tiers):
        return macs
    widths = [dense.size_at(fraction) for fraction in _fit_fractions(dense, tiers, setting)]
    return [
        own if tier.width is None else _cost(dense, width, setting).macs_per_example
        for own, tier, width in zip(macs, tiers, widths, strict=True)
    ]


def _fit_fractions(architecture: Architecture, tiers: Sequence[Tier], setting: Setting) -> list[Fraction]:
    """Fit every tier to the chain of the architecture's fractions."""
    chain = architecture.fractions()

    @cache
    def cost_at(position: int) -> Cost:
        return _cost(architecture, architecture.size_at(chain[position]), setting)

    within = within_widths if architecture.form == "dense" else within_ranks
    reach = [len(within(tier, chain)) for tier in tiers]
    return [chain[i] for i in _fit_all(tiers, reach, cost_at, cost_at(len(chain) - 1), setting.together)]


def _fit_all(
    tiers: Sequence[Tier], reach: Sequence[int], cost_at: Callable[[int], Cost], full: Cost, together: bool
) -> list[int]:
    """Fit every tier to the first ``reach`` positions of a chain.

    With ``together``, its memory must also hold the largest smaller tier's activations.
    """
    alone = [fit(tier, range(count), cost_at, full) for tier, count in zip(tiers, reach, strict=True)]
    if not together:
        return alone
    fitted: dict[int, int] = {}

    def with_smaller(position: int) -> Cost:
        return _beside(cost_at(position), [cost_at(other) for other in fitted.values() if other < position])

    for i in sorted(range(len(tiers)), key=lambda i: alone[i]):
        fitted[i] = fit(tiers[i], range(reach[i]), with_smaller, full)
    return [fitted[i] for i in range(len(tiers))]


def _beside(own: Cost, smaller: Iterable[Cost]) -> Cost:
    """Return ``own`` with the memory for the activations of the largest of ``smaller`` too."""
    below = max((x.activation_bytes for x in smaller), default=0)
    return replace(own, train_memory_bytes=own.train_memory_bytes + below)


def _cost(architecture: Architecture, size: Size, setting: Setting) -> Cost:
    traced = trace_of(architecture, size.width, size.depth)
    dense = cost(traced, size.ranks or {}, batch_size=setting.batch_size, slots=setting.slots)
    if size.share is None:
        return dense
    weights = _weight_entries(architecture)
    return with_kept_entries(dense, kept=kept_count(weights, size.share), of=weights)


@lru_cache(maxsize=16)
def _weight_entries(architecture: Architecture) -> int:
    """Return how many entries masks choose from."""
    return num_elements({name: shape for name, shape in shapes_of(architecture.full).items() if maskable(shape)})
