"""The work of a host, without Flower: train the devices of a cohort, evaluate a submodel on a part of the test set.

Models stay resident per process and are reused, one per size of a plan; the environment is cached (``environment_of``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from fedmaestro import rng
from fedmaestro.clients import Objective
from fedmaestro.clients.base import Prefixes
from fedmaestro.clients.optimizers import OPTIMIZERS, LocalOptimizer
from fedmaestro.clients.scaffold import Control
from fedmaestro.errors import DivergedError
from fedmaestro.fleet.plan import Plan, Submodel, smaller_levels
from fedmaestro.lod import group_lasso
from fedmaestro.lod.suffix import Tail
from fedmaestro.rounds import spectrum
from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.code import located
from fedmaestro.strategies.base import Parts
from fedmaestro.submodel import State, load, state_of
from fedmaestro.tasks.task import Batch, Score, Task, evaluate


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The local optimiser, and what is added to an objective."""

    epochs: int
    batch_size: int
    optimizer: LocalOptimizer = OPTIMIZERS["sgd"]
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float = 0.0
    """Largest L2 norm of a step's gradient; 0: no clipping."""
    logit_adjustment: float = 0.0
    """τ of ``clients.base.logit_offsets``; 0: the plain cross-entropy."""
    proximal: float = 0.0
    """μ of FedProx (Li et al., MLSys 2020, equation 2); 0: none."""
    group_lasso: float = 0.0
    """Weight of ``lod.group_lasso`` of all columns that the device holds; 0: none."""
    tails: Mapping[str, Tail] = field(default_factory=dict)
    """For the group lasso, by layer: what the columns behind the device's prefix add to its suffix norms."""
    frozen: frozenset[str] = frozenset()
    """Parameters that stay as they were sent."""


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """One device's metrics row."""

    device: int
    examples: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class CohortResult:
    """What one message brings back."""

    mean: Parts = field(default_factory=dict)
    """What is uploaded (``Aggregation.mean``) of the devices that succeeded; empty when none did."""
    weight: float = 0.0
    """``Σ weight`` of these devices."""
    controls: Mapping[int, State] = field(default_factory=dict)
    """New control variate of each device, with ``train.correction = scaffold``."""
    probes: State = field(default_factory=dict)
    """``Σ weight · spectrum.probe / weight`` of the same devices in float32, with ``train.record-bias``."""
    reports: tuple[DeviceReport, ...]
    failures: dict[int, str]
    """Reason by device."""


def local_training(
    env: Environment,
    server_round: int,
    tails: Mapping[str, Tail] | None = None,
    frozen: frozenset[str] = frozenset(),
) -> LocalTraining:
    """Return the local optimiser's settings of a round (from 1 on)."""
    train = env.config.train
    factor = env.method.schedule.factor(server_round, train.rounds, train.lr_final_factor)
    if train.warmup_rounds:
        factor *= min(1.0, server_round / (train.warmup_rounds + 1))
    return LocalTraining(
        epochs=train.local_epochs,
        batch_size=train.batch_size,
        optimizer=env.method.optimizer,
        lr=train.lr * factor,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        logit_adjustment=env.method.logit_adjustment,
        proximal=env.method.proximal,
        group_lasso=train.group_lasso,
        tails=tails or {},
        frozen=frozen,
    )


def train_cohort(
    env: Environment,
    plan: Plan,
    tier_name: str,
    devices: Sequence[int],
    start: State,
    server_round: int,
    tails: Sequence[float] = (),
    controls: Mapping[int, Control] | None = None,
) -> CohortResult:
    """Train ``devices``, all of one tier, from the submodel ``start`` and add up their results.

    A device whose training raises or gives NaN is reported as failed with its reason and left out.

    Args:
        env: the experiment.
        plan: the tiers' submodels in this round.
        tier_name: the tier of the devices.
        devices: by number.
        start: the tier's submodel.
        server_round: from 1 on.
        tails: for the group lasso, what the submodel lacks: two numbers for each LoD layer (``lod.suffix.Tail``).
        controls: the control variates of each device; None: there are none.
    """
    submodel = plan.by_name(tier_name).trains
    if submodel is None:
        raise ValueError(f"devices of tier {tier_name!r} do not train under {env.method.name!r}")
    prefixes = resident_prefixes(env, plan, submodel)
    aggregation = env.method.aggregation
    partial = aggregation.init(start)
    pairs = zip(tails[::2], tails[1::2], strict=True)
    frozen = env.method.frozen(start, server_round)
    settings = local_training(env, server_round, dict(zip(submodel.size.ranks or {}, pairs, strict=False)), frozen)
    ends = spectrum.rank_segments(plan) if env.config.train.record_bias and submodel.size.ranks else {}
    probes: State = {}
    reports: list[DeviceReport] = []
    failures: dict[int, str] = {}
    new_controls: dict[int, State] = {}
    for device in devices:
        part = env.parts[device]
        batch = env.task.plain(part)
        generator = rng.generator(env.config.seed, "train", server_round, device)
        control = None if controls is None else controls[device]
        try:
            loss = train_device(
                prefixes,
                start,
                env.method.objective,
                batch,
                settings,
                generator,
                padding=env.task.padding,
                augmented=partial_batch(env.task, part) if env.config.data.augment != "none" else None,
                control=control,
            )
        except Exception as error:
            failures[device] = located(error)
            continue
        if control is not None:
            steps = settings.epochs * math.ceil(len(batch) / settings.batch_size)
            new_controls[device] = control.after(start, prefixes.model, steps, settings.lr)
        state = state_of(prefixes.model)
        sent = {name: tensor for name, tensor in state.items() if name not in frozen}
        partial = aggregation.add(partial, sent, len(batch.targets), start=start)
        if ends:
            weight = aggregation.weigh(sent, len(batch.targets))
            probes = {x: weight * m + probes.get(x, 0.0) for x, m in spectrum.probe(state, ends).items()}
        reports.append(DeviceReport(device=device, examples=len(batch.targets), loss=loss))
    block = next((block for _, block in partial), None)
    if block is None:
        return CohortResult(reports=(), failures=failures)
    return CohortResult(
        mean=aggregation.mean(block),
        weight=block.weight,
        controls=new_controls,
        probes={name: (x * (1.0 / (block.weight or 1.0))).float() for name, x in probes.items()},
        reports=tuple(reports),
        failures=failures,
    )


def train_device(
    prefixes: Prefixes,
    start: State,
    objective: Objective,
    examples: Batch,
    settings: LocalTraining,
    generator: np.random.Generator,
    *,
    padding: int | None = None,
    augmented: Callable[[np.random.Generator], Batch] | None = None,
    control: Control | None = None,
) -> float:
    """Train a device's model in place from ``start``; ``prefixes.model`` then holds the result.

    Args:
        prefixes: the resident model and its smaller levels.
        start: the submodel that the server sent.
        objective: what a step minimises.
        examples: all of the device.
        settings: epochs, batch size and SGD parameters; the last batch of an epoch may be smaller.
        generator: order of the examples and whatever the objective draws.
        padding: token that fills up short sequences; None: there are none.
        augmented: makes the examples of an epoch anew; None: they are as they are.
        control: control variates that correct every step; None: none do.

    Returns:
        The mean loss of a step, weighted by examples; without the group lasso and the proximal term, so that runs of
        any weight compare, but with the logit adjustment, whose strengths do not.

    Raises:
        DivergedError: the loss or a parameter is not finite.
    """
    model = prefixes.model.train()
    load(model, start)
    count = len(examples)
    prefixes = prefixes.of_device(examples.targets, masked=objective.masked, logit_adjustment=settings.logit_adjustment)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in settings.frozen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = settings.optimizer.make(parameters, settings.lr, settings.momentum, settings.weight_decay)
    anchor = [start[name] for name, x in model.named_parameters() if x.requires_grad] if settings.proximal else []
    total = torch.zeros(())
    for _ in range(settings.epochs):
        order = torch.from_numpy(generator.permutation(count))
        if augmented is not None:
            examples = augmented(generator)
        for indices in torch.split(order, settings.batch_size):
            batch = examples.take(indices, padding)
            optimizer.zero_grad(set_to_none=True)
            loss = objective.loss(prefixes, batch.x, batch.targets, generator)
            penalised = _penalised(loss, model, settings)
            if settings.proximal:
                distance = sum(((x - y) ** 2).sum() for x, y in zip(parameters, anchor, strict=True))
                penalised = penalised + settings.proximal / 2 * distance
            penalised.backward()  # type: ignore[no-untyped-call]
            if control is not None:
                control.correct(model)
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            total += loss.detach() * len(indices)
    mean = float(total) / (settings.epochs * count)
    if not np.isfinite(mean):
        raise DivergedError(f"the training loss is {mean}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError(f"parameter {name} is not finite after training")
    return mean


def partial_batch(task: Task, part: np.ndarray) -> Callable[[np.random.Generator], Batch]:
    """Return what augments a device's examples."""
    return lambda generator: task.batch(part, generator)


def _penalised(loss: Tensor, model: nn.Module, settings: LocalTraining) -> Tensor:
    """Return ``loss`` plus the weighted group lasso of ``model``; ``loss`` itself where there is none."""
    return loss + settings.group_lasso * group_lasso(model, settings.tails) if settings.group_lasso else loss


def evaluate_part(env: Environment, plan: Plan, tier_name: str, state: State, first: int, last: int) -> Score:
    """Evaluate a tier's submodel on test examples ``first … last - 1``."""
    model = _resident_model(plan, plan.by_name(tier_name).serves)
    load(model, state)
    return evaluate(model, env.task, env.task.scored("test", first, last), seed=env.config.seed)


def evaluate_devices(
    env: Environment, plan: Plan, tier_name: str, state: State, devices: Sequence[int]
) -> dict[int, Score]:
    """Evaluate a tier's submodel on the own test examples of each of ``devices``; those without any are left out."""
    model = _resident_model(plan, plan.by_name(tier_name).serves)
    load(model, state)
    tests = env.device_tests
    batch_of = env.task.plain if tests.held_out else env.task.tested
    batches = {device: [batch_of(tests.examples[device])] for device in devices if len(tests.examples[device])}
    return {device: evaluate(model, env.task, batch, seed=env.config.seed) for device, batch in batches.items()}


def resident_prefixes(env: Environment, plan: Plan, submodel: Submodel) -> Prefixes:
    """Return the reused model of this size, with the serving sizes of all smaller tiers as its levels."""
    smaller = smaller_levels(submodel, (tier.serves for tier in plan.tiers))
    return Prefixes(
        model=_resident_model(plan, submodel),
        smaller=[(_template(plan, x), x.shapes) for x in smaller],
        num_classes=plan.architecture.num_classes,
        goal=env.task.goal,
    )


@dataclass(frozen=True, kw_only=True)
class _Residents:
    """Models of one plan by size."""

    models: dict[Submodel, nn.Module] = field(default_factory=dict)
    templates: dict[Submodel, nn.Module] = field(default_factory=dict)


@lru_cache(maxsize=2)
def _residents(plan: Plan) -> _Residents:  # noqa: ARG001
    """Return the models that stay: when ranks change, those of the plan before the last one go."""
    return _Residents()


def _resident_model(plan: Plan, submodel: Submodel) -> nn.Module:
    models = _residents(plan).models
    if submodel not in models:
        model = plan.architecture.materialize(submodel.size)
        if len(plan.architecture.input_shape) == 3:
            # A LeNet step takes 2.9 instead of 4.1 ms in this layout.
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models[submodel] = model
    return models[submodel]


def _template(plan: Plan, submodel: Submodel) -> nn.Module:
    templates = _residents(plan).templates
    if submodel not in templates:
        templates[submodel] = plan.architecture.build(submodel.size)
    return templates[submodel]
