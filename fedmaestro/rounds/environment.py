"""Everything that an experiment's configuration stands for; server and hosts build the same one."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from fedmaestro.config.base import describe
from fedmaestro.config.experiment import PREFIXES, ExperimentConfig
from fedmaestro.data import (
    DATASETS,
    PARTITIONS,
    cached_partition,
    data_folder,
    load_dataset,
    partition_fingerprint,
)
from fedmaestro.errors import UserError, check_name
from fedmaestro.fleet.learned import Rederivation
from fedmaestro.fleet.plan import Plan, TierPlan, decode_ranks, make_plan
from fedmaestro.fleet.tiers import assign_tiers, load_tiers
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.rounds.method import Method, method_of
from fedmaestro.tasks.images import image_task
from fedmaestro.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A validated experiment with its task, fleet and plan."""

    config: ExperimentConfig
    method: Method
    task: Task
    parts: tuple[np.ndarray, ...]
    """Sorted training indices of every device."""
    tier_of: tuple[int, ...]
    """Tier of every device, as an index into the fleet."""
    plan: Plan
    """The run's first plan; ranks may change later (``rederivation``, ``plan_at``)."""

    def tier(self, device: int) -> TierPlan:
        """Return the plan of a device's tier."""
        return self.plan.by_index(self.tier_of[device])

    @cached_property
    def examples(self) -> list[int]:
        """Training examples of every device."""
        return [len(part) for part in self.parts]

    @property
    def rederivation(self) -> Rederivation:
        """When ranks change during the run, and how."""
        ranks = self.config.ranks
        return Rederivation(
            every=ranks.shrink_every,
            threshold=ranks.shrink_threshold,
            min_updates=ranks.shrink_min_updates,
            learned=ranks.rule == "learned",
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
        return hashlib.sha256(f"{self.task.fingerprint} {parts} {self.tier_of} {tiers}".encode()).hexdigest()


def open_environment(config: ExperimentConfig, progress: Callable[[int, int], None] | None = None) -> Environment:
    """Build the environment; data and partitions come from the cache from the second time on.

    Raises:
        UserError: whatever is wrong with the configuration or the data, before anything of the run is written.
    """
    method = method_of(config)
    data, train = config.data, config.train
    tiers = load_tiers(config.fleet.preset, config.fleet.file)
    for key, name, known in (
        ("model.name", config.model.name, MODELS),
        ("data.name", data.name, DATASETS),
        ("data.partition", data.partition, PARTITIONS),
    ):
        check_name(key, name, known)
    if train.devices_per_round > data.devices:
        raise UserError(
            f"train.devices-per-round={train.devices_per_round} is more than "
            f"data.devices={data.devices}: lower it, or simulate more devices"
        )
    tier_of = assign_tiers(tiers, data.devices, config.seed)
    dataset = load_dataset(data.name, data_folder(data.dir), progress=progress)
    task = image_task(dataset)
    plan = make_plan(
        _architecture(config, method, task),
        tiers,
        method.submodel,
        batch_size=train.batch_size,
        momentum=train.momentum > 0,
        passes=method.objective.passes,
        match_macs=config.fleet.match_macs,
    )
    _check_needs(config, plan, method)
    parts = cached_partition(
        dataset,
        scheme=data.partition,
        num_devices=data.devices,
        seed=config.seed,
        alpha=data.alpha,
        classes_per_device=data.classes_per_device,
        min_examples=data.min_examples,
    )
    return Environment(config=config, method=method, task=task, parts=parts, tier_of=tier_of, plan=plan)


def _architecture(config: ExperimentConfig, method: Method, task: Task) -> Architecture:
    architecture = Architecture(
        name=config.model.name,
        input_shape=task.input_shape,
        num_classes=task.num_classes,
        keep_dense=config.model.keep_dense,
        norm=method.norm,
    )
    # A row's own scaler only where a norm layer follows: evaluation does not scale, and without norms it would see
    # other activations than training did.
    scales = method.scaler and (config.model.scaler == "on" or architecture.has_norms)
    return replace(architecture, scaler=True) if scales else architecture


def _check_needs(config: ExperimentConfig, plan: Plan, method: Method) -> None:
    """Refuse settings of the user's that need what the method does not have."""
    row = f"strategy {method.name!r}"
    cuts = row if config.train.submodel is None else f"train.submodel={config.train.submodel!r}"
    given = config.flat()
    for setting in describe(ExperimentConfig):
        value = given[setting.key]
        if setting.needs != PREFIXES or not value or value == setting.default:
            continue
        if not plan.full.size.ranks:
            raise UserError(
                f"{setting.key}={value} needs LoD layers, and under {cuts} model {config.model.name!r} has none: leave "
                "it out, or use another strategy, train.submodel or model.keep-dense"
            )
        if not method.trains_prefixes:
            raise UserError(
                f"{setting.key}={value} needs tiers that are prefixes of one model whose factors all devices train, "
                f"and those of {cuts if method.freeze == 'none' else row} are not: leave it out, or use another "
                "strategy or train.submodel"
            )


@lru_cache(maxsize=2)
def environment_of(experiment: str) -> Environment:
    """Return the environment of a message's experiment (``ExperimentConfig`` as JSON), cached per process."""
    return open_environment(ExperimentConfig.model_validate_json(experiment))
