"""Everything that an experiment's configuration stands for; server and hosts build the same one."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fedmaestro import rng
from fedmaestro.clients import OBJECTIVES
from fedmaestro.config.base import describe
from fedmaestro.config.experiment import NESTED, PREFIXES, ExperimentConfig
from fedmaestro.data import DATASETS, PARTITIONS, cached_partition, data_folder
from fedmaestro.data.parts import NO_PARTS, DealtParts, Indices, Parts, SplitParts
from fedmaestro.errors import UserError, check_name
from fedmaestro.fleet.attacks import Attackers, find_attackers
from fedmaestro.fleet.budgets import exact
from fedmaestro.fleet.learned import Rederivation
from fedmaestro.fleet.plan import Plan, TierPlan, decode_ranks, make_plan
from fedmaestro.fleet.tiers import Tier, assign_tiers, load_tiers
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.kinds import kinds_in
from fedmaestro.rounds.method import Method, method_of
from fedmaestro.rounds.privacy import Privacy, find_privacy
from fedmaestro.runs.code import NO_CODE, Code, activate, shipped, user_code
from fedmaestro.strategies.base import equally, factor_layers
from fedmaestro.strategies.entry_mean import ENTRY_MEAN
from fedmaestro.tasks.fitting import fitted
from fedmaestro.tasks.opening import as_asked, held_out_by, open_data
from fedmaestro.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class DeviceTests:
    """Examples that devices are tested on, one by one; none of a federation that does not do that."""

    examples: Parts = NO_PARTS
    """Of every device."""
    held_out: bool = False
    """Whether they are training examples that nobody trains on, and not test examples."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A validated experiment with its task, fleet and plan."""

    config: ExperimentConfig
    method: Method
    task: Task
    parts: Parts
    """Training examples of every device."""
    tier_of: Indices
    """``(devices,)``: tier of every device, as an index into the fleet; in a dynamic fleet, before the first round."""
    device_tests: DeviceTests
    """What every device is tested on, besides the test set."""
    plan: Plan
    """The run's first plan; ranks may change later (``rederivation``, ``plan_at``)."""
    privacy: Privacy | None = None
    """How devices' data are protected."""
    attackers: Attackers | None = None
    """Devices that mean harm."""
    code: Code = NO_CODE
    """The user's."""

    @cached_property
    def shipped_code(self) -> dict[str, Any]:
        """What messages say of the user's code."""
        return shipped(self.code)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What every message says of the experiment."""
        return {
            "experiment": self.config.model_dump_json(by_alias=True),
            "fingerprint": self.fingerprint,
            "data": self.task.fingerprint,
            **self.shipped_code,
        }

    def tier(self, device: int) -> TierPlan:
        """Return the plan of a device's tier."""
        return self.plan.by_index(int(self.tier_of[device]))

    def tiers_in(self, server_round: int) -> Indices:
        """Return ``(devices,)``: the tier of every device in a round, as an index into the fleet."""
        if self.config.fleet.assignment == "fixed":
            return self.tier_of
        shares = np.array([self.plan.by_index(index).tier.share for index in range(len(self.plan.tiers))])
        drawn = rng.generator(self.config.seed, "tiers-of-round", server_round).random(len(self.tier_of))
        return np.minimum(np.searchsorted(np.cumsum(shares), drawn, side="right"), len(shares) - 1)

    @cached_property
    def devices_of(self) -> dict[int, int]:
        """How many devices each tier has, by its index."""
        return dict(enumerate(np.bincount(self.tier_of, minlength=len(self.plan.tiers)).tolist()))

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
        """Hash of data, partition, fleet and the user's code: whoever differs in it would train something else."""
        tiers = [(plan.tier.model_dump_json(), plan.serves.size.describe()) for plan in self.plan.tiers]
        held = f" validation {self.config.data.validation}" if self.config.data.validation else ""
        devices = f"{self.parts.fingerprint} {hashlib.sha256(self.tier_of.astype('<i8').tobytes()).hexdigest()}"
        code = f" {self.code.fingerprint}" if self.code else ""
        return hashlib.sha256(f"{self.task.fingerprint}{held} {devices} {tiers}{code}".encode()).hexdigest()


def open_environment(
    config: ExperimentConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    code: Code = NO_CODE,
    data_fingerprint: str = "",
) -> Environment:
    """Build the environment; data and partitions come from the cache from the second time on.

    Args:
        config: the experiment.
        progress: is told (done, total) while the data are decoded for the first time.
        code: the user's; it is loaded before any name is looked up.
        data_fingerprint: of the data that the server has made of a dataset of the user's.

    Raises:
        UserError: whatever is wrong with the configuration or the data, before anything of the run is written.
    """
    activate(code)
    method = method_of(config)
    data, train = config.data, config.train
    tiers = load_tiers(config.fleet.preset, config.fleet.file)
    for key, name, known in (
        ("model.name", config.model.name, MODELS),
        ("data.name", data.name, DATASETS),
        ("data.partition", data.partition, PARTITIONS),
    ):
        check_name(key, name, known)
    if data.devices is not None:
        # What is wrong with it shows before data are decoded.
        _attackers(config, assign_tiers(tiers, data.devices, config.seed), tiers)
    task = open_data(
        data.name,
        data_folder(data.dir),
        progress=progress,
        data_fingerprint=data_fingerprint,
        augment=data.augment,
        normalize=data.normalize,
        choose=held_out_by(data.validation, config.seed, users_stay=data.partition == "natural"),
        spares_test=True,
        file=data.file,
        columns=data.columns,
    )
    task = as_asked(task, data.task, data.metrics)
    method = _of_task(config, method, task)
    devices = data.devices if data.devices is not None else _users(task)
    if train.devices_per_round > devices:
        raise UserError(
            f"train.devices-per-round={train.devices_per_round} is more than "
            f"data.devices={devices}: lower it, or simulate more devices"
        )
    _check_correction(config, method)
    _check_dynamic(config, method)
    _check_per_tier(method)
    _check_whole_factors(method)
    _check_masks(method)
    privacy = find_privacy(config, method, devices)
    if privacy is not None:
        # The server divides the sum itself, by what does not depend on who took part.
        aggregation = replace(method.aggregation, name="private-mean", weigh=equally)
        method = replace(method, aggregation=aggregation)
    tier_of = assign_tiers(tiers, devices, config.seed)
    attackers = _attackers(config, tier_of, tiers)
    if attackers is not None and attackers.attack.labels is not None and task.goal.targets != "classes":
        raise UserError(
            f"fleet.attack={config.fleet.attack!r} changes classes, and task {task.goal.name!r} has none: use another"
        )
    if config.fleet.match_by != "macs" and not config.fleet.match_macs:
        raise UserError(
            f"fleet.match-by={config.fleet.match_by} has no effect: fleet.match-macs is false: set it to true, or "
            "leave match-by out"
        )
    architecture, task = _architecture(config, method, task)
    _check_rank_power(config, method, architecture)
    if config.train.per_tier is None:
        method = _of_model(method, architecture)
    plan = make_plan(
        architecture,
        tiers,
        method.submodel,
        batch_size=train.batch_size,
        slots=method.optimizer.slots(train.momentum),
        passes=method.objective.passes,
        match_macs=config.fleet.match_macs,
        match_by=config.fleet.match_by,
        examples=task.examples * train.local_epochs // devices,
        per_tier=method.per_tier,
    )
    _check_needs(config, plan, method)
    _check_left(config, task, devices)
    with user_code(f"partition {data.partition!r}"):
        parts = cached_partition(
            f"{task.fingerprint} less {data.validation}" if data.validation else task.fingerprint,
            task.labels,
            groups=task.groups,
            count=task.examples,
            scheme=data.partition,
            num_devices=devices,
            seed=config.seed,
            alpha=data.alpha,
            classes_per_device=data.classes_per_device,
            min_examples=data.min_examples,
            share_examples=data.share_examples,
            self_balancing=data.self_balancing,
        )
    parts, device_tests = _device_tests(config, task, parts)
    return Environment(
        config=config,
        method=method,
        task=task,
        parts=parts,
        tier_of=tier_of,
        device_tests=device_tests,
        plan=plan,
        attackers=attackers,
        privacy=privacy,
        code=code,
    )


def _attackers(config: ExperimentConfig, tier_of: Indices, tiers: Sequence[Tier]) -> Attackers | None:
    fleet = config.fleet
    return find_attackers(
        fleet.attack,
        fleet.attackers,
        fleet.attack_tiers,
        fleet.attack_strength,
        tier_of=tier_of,
        names=[tier.name for tier in tiers],
        seed=config.seed,
    )


def _device_tests(config: ExperimentConfig, task: Task, parts: Parts) -> tuple[Parts, DeviceTests]:
    """Return what devices train on and what they are tested on."""
    if share := config.data.device_test:
        kept, held = (SplitParts(parts, share, config.seed, held=held) for held in (False, True))
        return kept, DeviceTests(examples=held, held_out=True)
    if task.groups is None or task.test_groups is None or config.data.partition != "natural":
        return parts, DeviceTests()
    if config.fleet.assignment == "dynamic":  # no tier's submodel is a device's own
        return parts, DeviceTests()
    assert isinstance(parts, DealtParts)
    users, first = np.unique(task.groups, return_index=True)
    device_of = np.empty(len(task.groups), np.int64)
    device_of[parts.indices] = np.repeat(np.arange(len(parts)), parts.sizes)
    place = np.minimum(np.searchsorted(users, task.test_groups), len(users) - 1)
    owners = np.where(users[place] == task.test_groups, device_of[first[place]], -1)
    return parts, DeviceTests(examples=DealtParts.of_owners(owners, len(parts)))


def _check_left(config: ExperimentConfig, task: Task, devices: int) -> None:
    """Refuse a validation split that leaves too little to be dealt: other errors would not say that it is the cause."""
    data = config.data
    needed = data.share_examples or devices * data.min_examples
    if data.validation and task.examples < needed:
        raise UserError(
            f"data.validation={data.validation} leaves {task.examples} training examples, and {devices} devices need "
            f"{needed} (data.min-examples, data.share-examples): lower it"
        )


def _check_correction(config: ExperimentConfig, method: Method) -> None:
    """Refuse control variates where the tensors that they belong to do not stay what they were."""
    if method.correction == "none":
        return
    train, ranks = config.train, config.ranks
    changes = [
        step.name for step in method.server if any(step.rebases(number) for number in range(1, train.rounds + 1))
    ]
    for wrong, why in (
        (train.optimizer != "sgd" or train.momentum > 0, "train.optimizer=sgd without momentum"),
        (method.submodel.separate or method.submodel.rolls, "one model whose tensors stay in place"),
        (method.freeze != "none", "train.freeze=none"),
        (method.submodel.scales == "entries", "tensors that devices hold as a whole"),
        (method.per_tier, "train.per-tier=none: control variates are of tensors that all tiers share"),
        (method.aggregation.mixes or changes, "factors that keep their basis (no re-ordering of columns)"),
        (ranks.rule != "uniform" or ranks.shrink_threshold > 0, "ranks that stay (ranks.rule, ranks.shrink-threshold)"),
    ):
        if wrong:
            raise UserError(f"train.correction={method.correction} needs {why}: strategy {method.name!r} differs")


def _check_dynamic(config: ExperimentConfig, method: Method) -> None:
    """Refuse what belongs to a tier's devices where devices have no tier of their own."""
    if config.fleet.assignment == "fixed":
        return
    for wrong, why in (
        (method.correction != "none", f"train.correction={method.correction}"),
        (config.fleet.attack != "none" and config.fleet.attack_tiers != "all", "fleet.attack-tiers"),
        (config.data.device_test > 0, "data.device-test"),
    ):
        if wrong:
            raise UserError(
                f"fleet.assignment=dynamic draws a device's tier anew in every round, and {why} needs it to stay: "
                "change one of them"
            )


def _check_masks(method: Method) -> None:
    """Refuse what masked weights and aggregations by entry do not go with, or without each other."""
    masks, by_entry = method.submodel.scales == "entries", method.aggregation.name == ENTRY_MEAN.name
    if masks and not by_entry:
        raise UserError(
            f"train.aggregation={method.aggregation.name!r} takes zeros for weights, and under strategy "
            f"{method.name!r} devices have some of the weights only: use {ENTRY_MEAN.name}, or another train.submodel"
        )
    if masks and any(method.objective.passes.expected(2)[1:]):
        raise UserError(
            f"train.objective={method.objective.name!r} trains smaller tiers' submodels too, which strategy "
            f"{method.name!r} has none of inside a device's: use another"
        )


def _check_whole_factors(method: Method) -> None:
    """Refuse products of factors where devices of different tiers send different rows of them."""
    if method.submodel.narrows and method.aggregation.whole_factors:
        raise UserError(
            f"train.aggregation={method.aggregation.name!r} takes products of whole factors, and under "
            f"train.submodel={method.settings['train.submodel']!r} smaller tiers have some of their rows: use another "
            "aggregation, or train.submodel=own"
        )


def _check_rank_power(config: ExperimentConfig, method: Method, architecture: Architecture) -> None:
    """Refuse a power for ranks that nothing would read."""
    power = f"train.rank-power={config.train.rank_power}"
    if config.train.rank_power == 1:
        return
    if not method.submodel.narrows:
        raise UserError(
            f"{power} is for submodels with fewer channels and lower ranks, and those of train.submodel="
            f"{method.settings['train.submodel']!r} have not both: leave it out, or use train.submodel=rank-and-width"
        )
    if not architecture.can_narrow:
        raise UserError(
            f"{power} is for submodels with fewer channels and lower ranks, and model {config.model.name!r} has no "
            "narrower form: leave it out, or give the model's class a parameter scale"
        )


def _check_per_tier(method: Method) -> None:
    """Refuse own tensors of tiers where tiers do not train sizes of their own within one model."""
    rule = method.submodel
    for wrong, why in (
        (rule.separate, "each tier has a model of its own already"),
        (rule.trains != "own", "tiers do not train sizes of their own"),
        (rule.rolls, "a tier trains other channels in every round"),
    ):
        if method.per_tier and wrong:
            raise UserError(
                f"train.per-tier={' '.join(method.per_tier)!r} does not go with strategy {method.name!r}: {why}: leave "
                "it out, or use another strategy or train.submodel"
            )


def _users(task: Task) -> int:
    if task.groups is None:
        raise UserError(
            f"data.partition = 'natural': dataset {task.name!r} names no users: return groups from its function, or "
            "use another partition"
        )
    return len(np.unique(task.groups))


def _of_task(config: ExperimentConfig, method: Method, task: Task) -> Method:
    """Return the method as it goes with the task: what the classes of a device's labels say is for classification."""
    if task.labels is not None and task.goal.targets == "classes":
        return method
    if config.train.logit_adjustment:
        raise UserError(
            f"train.logit-adjustment={config.train.logit_adjustment}: task {task.goal.name!r} has no classes: leave it "
            "out"
        )
    objective = method.objective
    if objective.masked or objective.by_skew:
        if config.train.objective is not None:
            raise UserError(
                f"train.objective={objective.name!r} reads the classes of labels, and task {task.goal.name!r} has "
                "none: use another"
            )
        objective = OBJECTIVES["own-prefix" if objective.masked else "self-distillation"]
    return replace(
        method,
        logit_adjustment=0.0,
        objective=objective,
        settings={**method.settings, "train.logit-adjustment": 0.0, "train.objective": objective.name},
    )


def _of_model(method: Method, architecture: Architecture) -> Method:
    """Return the method with those of its row's own kinds of tensors that the model has."""
    rule = method.submodel
    formed = replace(architecture, form=rule.form, scales=rule.scales, exits=rule.exits)
    kinds = kinds_in(formed.full, method.per_tier) if method.per_tier else ()
    return replace(method, per_tier=kinds, settings={**method.settings, "train.per-tier": " ".join(kinds) or "none"})


def _architecture(config: ExperimentConfig, method: Method, task: Task) -> tuple[Architecture, Task]:
    """Return the architecture for the task's examples, and the task with the examples as that takes them."""
    architecture, task = fitted(
        task,
        lambda shaped: Architecture(
            name=config.model.name,
            input_shape=shaped.input_shape,
            num_classes=shaped.num_classes,
            inputs=shaped.inputs,
            keep_dense=config.model.keep_dense,
            norm=method.norm,
            width=exact(config.model.width),
        ),
    )
    if config.model.width != 1 and not architecture.spec.scales:
        raise UserError(
            f"model.width={config.model.width}: model {config.model.name!r} has no narrower form: give its class a "
            "parameter scale and build it with scale(channels) channels, or leave model.width out"
        )
    if method.submodel.form == "dense" and not architecture.spec.scales:
        raise UserError(
            f"strategy {method.name!r} scales widths, and model {config.model.name!r} has no narrower form: give its "
            "class a parameter scale and build it with scale(channels) channels, or use a strategy of rank prefixes"
        )
    if method.submodel.rolls and method.norm == "group" and architecture.has_norms:
        raise UserError(
            f"model.norm=group: channels of strategy {method.name!r} roll, and the groups of model "
            f"{config.model.name!r} would change their members: use model.norm=static"
        )
    if method.submodel.exits != "none" and not architecture.spec.blocks:
        known = ", ".join(name for name, spec in MODELS.items() if spec.blocks)
        raise UserError(
            f"strategy {method.name!r} puts classifiers after blocks, and model {config.model.name!r} has no table of "
            f"its blocks: use {known}, or another strategy"
        )
    # A row's own scaler only where a norm layer follows: evaluation does not scale, and without norms it would see
    # other activations than training did.
    scales = method.scaler and (config.model.scaler == "on" or architecture.has_norms)
    return replace(architecture, scaler=True) if scales else architecture, task


def _check_needs(config: ExperimentConfig, plan: Plan, method: Method) -> None:
    """Refuse settings of the user's that need what the method does not have."""
    row = f"strategy {method.name!r}"
    cuts = row if config.train.submodel is None else f"train.submodel={config.train.submodel!r}"
    given = config.flat()
    for setting in describe(ExperimentConfig):
        value = given[setting.key]
        if setting.needs not in (PREFIXES, NESTED) or not value or value == setting.default:
            continue
        if setting.needs == PREFIXES and not plan.full.size.ranks:
            raise UserError(
                f"{setting.key}={value} needs LoD layers, and under {cuts} model {config.model.name!r} has none: leave "
                "it out, or use another strategy, train.submodel or model.keep-dense"
            )
        if not method.trains_prefixes or (setting.needs == PREFIXES and method.submodel.narrows):
            raise UserError(
                f"{setting.key}={value} needs tiers that are prefixes of one model whose factors all devices train, "
                f"and those of {cuts if method.freeze == 'none' else row} are not: leave it out, or use another "
                "strategy or train.submodel"
            )
        if own := factor_layers(sorted(plan.setting.own)):
            raise UserError(
                f"{setting.key}={value} needs factors that all tiers share, and train.per-tier="
                f"{' '.join(method.per_tier)!r} gives each tier its own of {own[0]!r}: leave one of them out, or keep "
                "that layer dense (model.keep-dense)"
            )


def environment_of(experiment: str, code: Code = NO_CODE, data_fingerprint: str = "") -> Environment:
    """Return the environment of a message's experiment (``ExperimentConfig`` as JSON); the last ones are kept."""
    key = experiment, code, data_fingerprint
    with _OPENING:
        if (env := _OPEN.get(key)) is None:
            config = ExperimentConfig.model_validate_json(experiment)
            env = _keep(key, open_environment(config, code=code, data_fingerprint=data_fingerprint))
        return env


def share(env: Environment) -> None:
    """Let ``environment_of`` return an open environment: hosts in this process need not open their own."""
    with _OPENING:
        _keep((env.config.model_dump_json(by_alias=True), env.code, env.task.fingerprint), env)


def forget() -> None:
    """Close all environments of this process."""
    with _OPENING:
        _OPEN.clear()


_Key = tuple[str, Code, str]
_OPEN: dict[_Key, Environment] = {}
_OPENING = threading.RLock()
_KEPT = 2


def _keep(key: _Key, env: Environment) -> Environment:
    _OPEN[key] = env
    while len(_OPEN) > _KEPT:
        del _OPEN[next(iter(_OPEN))]
    return env
