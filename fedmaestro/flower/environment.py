"""Everything that an experiment's configuration stands for; server and hosts build the same one."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedmaestro.clients import OBJECTIVES, Objective
from fedmaestro.config import ExperimentConfig, Value, from_flat
from fedmaestro.data import (
    DATASETS,
    PARTITIONS,
    ImageDataset,
    cached_partition,
    load_dataset,
    partition_fingerprint,
)
from fedmaestro.errors import UserError, check_name
from fedmaestro.fleet import assign_tiers, load_tiers
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.plan import Plan, TierPlan, decode_ranks, make_plan
from fedmaestro.rederive import Rederivation
from fedmaestro.strategies import STRATEGIES, Strategy


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
    )
    plan = make_plan(
        architecture,
        tiers,
        strategy.submodel,
        batch_size=config.train.batch_size,
        momentum=config.train.momentum > 0,
        passes=objective.passes,
    )
    _check_ranks_can_change(config, plan)
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


def _check_ranks_can_change(config: ExperimentConfig, plan: Plan) -> None:
    train = config.train
    wanted: dict[str, Value] = {
        "train.group-lasso": train.group_lasso,
        "train.shrink-threshold": train.shrink_threshold,
    }
    if config.fleet.ranks == "learned":
        wanted["fleet.ranks"] = config.fleet.ranks
    for key, value in wanted.items():
        if value and not plan.full.size.ranks:
            raise UserError(
                f"{key}={value} needs LoD layers, and under strategy {train.strategy!r} model {config.model.name!r} "
                "has none: leave it out, or use another strategy or model.keep-dense"
            )
        if value and key != "train.group-lasso" and train.shrink_every >= train.rounds:
            raise UserError(
                f"{key}={value} has no effect: train.shrink-every={train.shrink_every} is not below "
                f"train.rounds={train.rounds}: lower it, or train for more rounds"
            )


def choose(config: ExperimentConfig) -> tuple[Strategy, Objective]:
    """Look up the strategy and the local objective (the strategy's own for ``default``)."""
    check_name("train.strategy", config.train.strategy, STRATEGIES)
    strategy = STRATEGIES[config.train.strategy]
    name = strategy.objective if config.train.objective == "default" else config.train.objective
    check_name("train.objective", name, [*OBJECTIVES, "default"])
    return strategy, OBJECTIVES[name]


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
