"""Everything that an experiment's configuration stands for; server and hosts build the same one."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np

from fedmaestro import rng
from fedmaestro.clients import OBJECTIVES, Objective
from fedmaestro.config.experiment import ExperimentConfig, Value, from_flat
from fedmaestro.data import (
    DATASETS,
    PARTITIONS,
    ImageDataset,
    cached_partition,
    load_dataset,
    partition_fingerprint,
)
from fedmaestro.errors import UserError, check_name
from fedmaestro.fleet.learned import Rederivation
from fedmaestro.fleet.plan import Plan, TierPlan, decode_ranks, make_plan
from fedmaestro.fleet.tiers import assign_tiers, load_tiers
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.rounds import storage
from fedmaestro.strategies import AGGREGATIONS, SERVER_OPTIMIZERS, STRATEGIES, SUBMODELS, Strategy
from fedmaestro.strategies.tail_start import expected_holders, start_tails
from fedmaestro.submodel import State

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A validated experiment with its data, fleet and plan."""

    config: ExperimentConfig
    dataset: ImageDataset
    parts: tuple[np.ndarray, ...]
    """Sorted training indices of every device."""
    tier_of: tuple[int, ...]
    """Tier of every device, as an index into the fleet."""
    plan: Plan
    """The run's first plan; ranks may change later (``rederivation``, ``plan_at``)."""
    strategy: Strategy
    objective: Objective

    def tier(self, device: int) -> TierPlan:
        """Return the plan of a device's tier."""
        return self.plan.by_index(self.tier_of[device])

    def initial_state(self) -> State:
        """Return the global state before the first round, as the server stores it."""
        seed = rng.derived_seed(self.config.seed, "init")
        state = storage.stored(self.plan, self.plan.architecture.initial_state(seed))
        holders = expected_holders(self.plan, self.tier_of, self.config.train.devices_per_round)
        return start_tails(state, holders, self.strategy.tail_start)

    @property
    def rederivation(self) -> Rederivation:
        """When ranks change during the run, and how."""
        train = self.config.train
        return Rederivation(
            every=train.shrink_every,
            threshold=train.shrink_threshold,
            min_updates=train.shrink_min_updates,
            learned=self.config.fleet.ranks == "learned",
        )

    @cached_property
    def plan_at(self) -> Callable[[str], Plan]:
        """``ranks -> plan``: the plan at the ranks that a message or a checkpoint names; the last one is kept."""
        return lru_cache(maxsize=1)(lambda ranks: decode_ranks(self.plan, ranks) if ranks else self.plan)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of data, partition and fleet: whoever differs in it would train something else."""
        tiers = [(plan.tier.model_dump_json(), plan.serves.size.describe()) for plan in self.plan.tiers]
        parts = partition_fingerprint(self.parts)
        return hashlib.sha256(f"{self.dataset.fingerprint} {parts} {self.tier_of} {tiers}".encode()).hexdigest()


def open_environment(config: ExperimentConfig, progress: Callable[[int, int], None] | None = None) -> Environment:
    """Build the environment; data and partitions come from the cache from the second time on.

    Raises:
        UserError: whatever is wrong with the configuration or the data, before anything of the run is written.
    """
    strategy, objective = choose(config)
    tiers = load_tiers(config.fleet.preset, config.fleet.file)
    for key, name, known in (
        ("model.name", config.model.name, MODELS),
        ("data.name", config.data.name, DATASETS),
        ("data.partition", config.data.partition, PARTITIONS),
    ):
        check_name(key, name, known)
    if config.train.devices_per_round > config.data.devices:
        raise UserError(
            f"train.devices-per-round={config.train.devices_per_round} is more than "
            f"data.devices={config.data.devices}: lower it, or simulate more devices"
        )
    tier_of = assign_tiers(tiers, config.data.devices, config.seed)
    dataset = load_dataset(config.data.name, data_dir(config), progress=progress)
    architecture = Architecture(
        name=config.model.name,
        input_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        keep_dense=config.model.keep_dense,
        norm=_switch(config.model.norm, strategy, "model.norm", "group"),
    )
    if _switch(config.model.scaler, strategy, "model.scaler", "off") == "on" and (
        config.model.scaler == "on" or architecture.has_norms
    ):
        # By default only where a norm layer follows: evaluation does not scale, and without norms it would see other
        # activations than training did.
        architecture = replace(architecture, scaler=True)
    plan = make_plan(
        architecture,
        tiers,
        strategy.submodel,
        batch_size=config.train.batch_size,
        momentum=config.train.momentum > 0,
        passes=objective.passes,
        match_macs=config.fleet.match_macs,
    )
    _check_prefix_settings(config, plan, strategy)
    parts = cached_partition(
        dataset,
        scheme=config.data.partition,
        num_devices=config.data.devices,
        seed=config.seed,
        alpha=config.data.alpha,
        classes_per_device=config.data.classes_per_device,
        min_examples=config.data.min_examples,
    )
    return Environment(
        config=config,
        dataset=dataset,
        parts=parts,
        tier_of=tier_of,
        plan=plan,
        strategy=strategy,
        objective=objective,
    )


def _switch(setting: str, strategy: Strategy, key: str, otherwise: str) -> Any:
    """Return a switch of the model: as set, or as the strategy's published method has it."""
    return strategy.defaults.get(key, otherwise) if setting == "default" else setting


def _check_prefix_settings(config: ExperimentConfig, plan: Plan, strategy: Strategy) -> None:
    train = config.train
    wanted: dict[str, Value] = {
        "train.group-lasso": train.group_lasso,
        "train.shrink-threshold": train.shrink_threshold,
        "train.tail-decay": max(train.tail_decay, 0.0),
        "train.tail-start": max(train.tail_start, 0.0),
    }
    if config.fleet.ranks == "learned":
        wanted["fleet.ranks"] = config.fleet.ranks
    row = f"strategy {train.strategy!r}"
    cuts = row if train.submodel == "default" else f"train.submodel={train.submodel!r}"
    for key, value in wanted.items():
        if value and not plan.full.size.ranks:
            raise UserError(
                f"{key}={value} needs LoD layers, and under {cuts} model {config.model.name!r} has none: leave it "
                "out, or use another strategy, train.submodel or model.keep-dense"
            )
        if value and (plan.setting.rule.separate or strategy.freezes):
            raise UserError(
                f"{key}={value} needs tiers that are prefixes of one model whose factors all devices train, and those "
                f"of {row if strategy.freezes else cuts} are not: leave it out, or use another strategy "
                "or train.submodel"
            )
        if value and key in ("train.shrink-threshold", "fleet.ranks") and train.shrink_every >= train.rounds:
            raise UserError(
                f"{key}={value} has no effect: train.shrink-every={train.shrink_every} is not below "
                f"train.rounds={train.rounds}: lower it, or train for more rounds"
            )


def choose(config: ExperimentConfig) -> tuple[Strategy, Objective]:
    """Look up the strategy with every switch that the configuration sets, and the local objective."""
    train = config.train
    check_name("train.strategy", train.strategy, STRATEGIES)
    row = STRATEGIES[train.strategy]
    changes: dict[str, Any] = {}
    for key, name, known in (
        ("submodel", train.submodel, SUBMODELS),
        ("aggregation", train.aggregation, AGGREGATIONS),
        ("server_optimizer", train.server_optimizer, SERVER_OPTIMIZERS),
    ):
        check_name(f"train.{key.replace('_', '-')}", name, [*known, "default"])
        if name != "default":
            changes[key.removesuffix("_optimizer")] = known[name]
    row = replace(row, **changes)
    if row.submodel.rolls and row.submodel.form != "dense":
        raise UserError(f"train.submodel={train.submodel!r} rolls channels, which LoD models do not have: use width")
    if row.aggregation is AGGREGATIONS["masked-mean"] and train.weight_decay:
        raise UserError(
            f"train.weight-decay={train.weight_decay} moves the rows that a device does not train, and aggregation "
            "'masked-mean' counts the devices that moved a row: set it to 0, or train.aggregation to coverage-mean"
        )
    server = replace(row.server, beta1=train.server_momentum)
    if train.server_lr:
        server = replace(server, lr=train.server_lr)
    if train.server_damping >= 0:
        server = replace(server, damping=train.server_damping)
    name = row.objective if train.objective == "default" else train.objective
    check_name("train.objective", name, [*OBJECTIVES, "default"])
    row = replace(
        row,
        server=server,
        reorder_every=_or_row(train.reorder_every, row.reorder_every),
        tail_decay=_or_row(train.tail_decay, row.tail_decay),
        # Learned ranks would read the small start as a spectrum.
        tail_start=_or_row(train.tail_start, 0.0 if config.fleet.ranks == "learned" else row.tail_start),
        logit_adjustment=_or_row(train.logit_adjustment, row.logit_adjustment),
    )
    return row, OBJECTIVES[name]


def _or_row(setting: Number, of_row: Number) -> Number:
    """Return a setting; where it is negative, the strategy's own."""
    return of_row if setting < 0 else setting


def data_dir(config: ExperimentConfig) -> str:
    """Return ``data.dir``, or the environment variable ``FEDMAESTRO_DATA_DIR`` where that is empty.

    The variable serves ``flwr run`` (whose run config is either a file or single settings, never both) and
    deployments, where each node has its own path.
    """
    return config.data.dir or os.environ.get("FEDMAESTRO_DATA_DIR", "")


@lru_cache(maxsize=2)
def environment_of(experiment: str) -> Environment:
    """Return the environment of a message's experiment (JSON of dotted keys), cached per process."""
    return open_environment(from_flat(json.loads(experiment)))
