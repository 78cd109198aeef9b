"""A method: a row of ``STRATEGIES`` with the experiment's settings laid over it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, cast

from fedmaestro.clients import OBJECTIVES, Objective
from fedmaestro.clients.optimizers import OPTIMIZERS, SCHEDULES, Decay, LocalOptimizer, Schedule, decay_of
from fedmaestro.config.base import Value
from fedmaestro.config.experiment import BY_STRATEGY, ExperimentConfig, decided_by_rows
from fedmaestro.errors import UserError, check_name
from fedmaestro.fleet.plan import TierPlan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.selection import SELECTIONS, Selection
from fedmaestro.models.architecture import Norm
from fedmaestro.models.kinds import KINDS
from fedmaestro.strategies.base import AnyAggregation, factor_layers
from fedmaestro.strategies.rows import PLAIN, STRATEGIES, SUBMODELS
from fedmaestro.strategies.server_optimizers import OPTIMIZER
from fedmaestro.strategies.server_step import ServerStep
from fedmaestro.strategies.tables import AGGREGATIONS, chain_of


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a run does, switch by switch."""

    name: str
    """Of the row."""
    summary: str
    source: str
    settings: Mapping[str, Value]
    """Every switch by its dotted key, as it was resolved."""
    submodel: SubmodelRule
    objective: Objective
    aggregation: AnyAggregation
    server: tuple[ServerStep, ...]
    optimizer: LocalOptimizer
    schedule: Schedule
    decay: Decay
    selection: Selection
    freeze: Literal["none", "v", "alternating"]
    per_tier: tuple[str, ...]
    """Kinds of tensors of which each tier has its own (``models.kinds``)."""
    logit_adjustment: float
    proximal: float
    correction: Literal["none", "scaffold"]
    norm: Norm
    scaler: bool

    def frozen(self, submodel: Collection[str], server_round: int) -> frozenset[str]:
        """Return the names of ``submodel`` that devices leave as they are in this round (from 1 on)."""
        factor = self.frozen_factor(server_round)
        return frozenset() if factor is None else frozenset(f"{layer}.{factor}" for layer in factor_layers(submodel))

    def frozen_factor(self, server_round: int) -> Literal["u", "v"] | None:
        """Return which factors devices leave as they are in this round (from 1 on)."""
        if self.freeze == "alternating":
            return "v" if server_round % 2 else "u"
        return "v" if self.freeze == "v" else None

    def step_macs(self, tier: TierPlan, server_round: int) -> int:
        """Return the training MACs per example of a tier's local step in this round (from 1 on)."""
        factor = self.frozen_factor(server_round)
        return tier.step_macs - (0 if factor is None else tier.saved_macs["uv".index(factor)])

    @property
    def trains_prefixes(self) -> bool:
        """Whether tiers are prefixes of one model all of whose tensors their devices train, or only send."""
        return not self.submodel.separate and self.freeze == "none"

    def describe_server(self) -> str:
        """Return the server's settings that differ from a plain row's: ``reorder-every 1``, or none."""
        idle = OPTIMIZER.settings.values() if self.settings["server.optimizer"] == "none" else ()
        own = {
            key: value
            for key, value in self.settings.items()
            if key.startswith("server.") and value != PLAIN.get(key) and (key not in idle or key == "server.damping")
        }
        return ", ".join(f"{key.removeprefix('server.')} {value}" for key, value in own.items()) or "none"


def _chain(
    value: Callable[[str], Value | None], config: ExperimentConfig, aggregation: AnyAggregation
) -> tuple[tuple[ServerStep, ...], str]:
    """Return the server's steps, and the space that its optimiser works in: products where factors are re-ordered."""

    def chain(space: str) -> tuple[ServerStep, ...]:
        return chain_of(lambda key: space if key == "server.space" else value(key), config.get)

    rounds = range(1, config.train.rounds + 1)
    rebased = aggregation.rebases or any(step.rebases(number) for step in chain("factors") for number in rounds)
    space = str(value("server.space") or ("product" if rebased else "factors"))
    server = chain(space)
    if rebased and any(step.remembers_factors for step in server):
        who = f"aggregation {aggregation.name!r}" if aggregation.rebases else "server.reorder-every"
        raise UserError(
            f"server.space=factors: server.optimizer={value('server.optimizer')} keeps moments of factors, and {who} "
            "gives them another basis: leave server.space out (the optimiser then works on products)"
        )
    return server, space


def switches() -> list[str]:
    """Return the settings that each strategy has a value of its own for."""
    return list(decided_by_rows())


def method_of(config: ExperimentConfig) -> Method:
    """Return the method of an experiment.

    Raises:
        UserError: an unknown name, or a setting that the rules do not go with.
    """
    check_name("train.strategy", config.train.strategy, STRATEGIES)
    row = STRATEGIES[config.train.strategy]
    unset = ExperimentConfig()

    def value(key: str) -> Value | None:
        if (own := config.get(key)) is not None:
            return cast(Value, own)
        if any(config.get(other) not in (None, unset.get(other)) for other in row.unless.get(key, ())):
            return PLAIN.get(key)
        return row.value(key)

    settings = {key: found for key in switches() if (found := value(key)) is not None}
    for key, table in (
        ("train.submodel", SUBMODELS),
        ("train.objective", OBJECTIVES),
        ("train.aggregation", AGGREGATIONS),
    ):
        check_name(key, str(settings[key]), [*table, BY_STRATEGY.word])
    train = config.train
    for key, name, rows in (
        ("train.optimizer", train.optimizer, OPTIMIZERS),
        ("train.schedule", train.schedule, SCHEDULES),
        ("train.selection", train.selection, SELECTIONS),
    ):
        check_name(key, name, rows)
    aggregation = AGGREGATIONS[str(settings["train.aggregation"])]
    for key, reason in aggregation.forbids.items():
        if set_to := config.get(key):
            raise UserError(f"{key}={set_to} {reason}")
    server, settings["server.space"] = _chain(value, config, aggregation)
    return Method(
        name=row.name,
        summary=row.summary,
        source=row.source,
        settings=settings,
        submodel=replace(
            SUBMODELS[str(settings["train.submodel"])], rank_power=Fraction(train.rank_power).limit_denominator(100)
        ),
        objective=OBJECTIVES[str(settings["train.objective"])],
        aggregation=aggregation.of(config.get),
        server=server,
        optimizer=OPTIMIZERS[train.optimizer],
        schedule=SCHEDULES[train.schedule],
        decay=decay_of(train.schedule, train.rounds, train.lr_final_factor, train.lr_milestones, train.lr_gamma),
        selection=SELECTIONS[train.selection],
        freeze=settings["train.freeze"],  # type: ignore[arg-type]
        per_tier=_kinds(str(settings["train.per-tier"])),
        logit_adjustment=cast(float, settings["train.logit-adjustment"]),
        proximal=cast(float, settings["train.proximal"]),
        correction=settings["train.correction"],  # type: ignore[arg-type]
        norm=settings["model.norm"],  # type: ignore[arg-type]
        scaler=settings["model.scaler"] == "on",
    )


def _kinds(words: str) -> tuple[str, ...]:
    """Return the kinds of tensors that ``train.per-tier`` names; none for none."""
    names = words.replace(",", " ").split()
    for name in names:
        check_name("train.per-tier", name, ["none", *KINDS])
    if "none" in names and len(names) > 1:
        raise UserError(f"train.per-tier={words!r}: none goes with no other word")
    return tuple(name for name in KINDS if name in names)
