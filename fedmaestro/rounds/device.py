"""The work of a host, without Flower: train the devices of a cohort, evaluate a submodel on a part of the test set.

Models stay resident per process and are reused, one per size of a plan; the environment is cached (``environment_of``).
"""

import math
import time
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
from fedmaestro.rounds import spectrum, storage
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.storage import Owner
from fedmaestro.rounds.tree import Join, Span, reduced
from fedmaestro.runs.code import located
from fedmaestro.strategies.base import SUMS, AnyAggregation, AnyPartial, Parts
from fedmaestro.submodel import Signature, State, load
from fedmaestro.tasks.goal import Goal
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

    parts: Parts = field(default_factory=dict)
    """What is uploaded: of a cohort of one device its submodel as it is, of others ``Aggregation.pack`` of the devices
    that succeeded; empty when none did."""
    weight: float = 0.0
    """``Σ weight`` of these devices."""
    controls: Mapping[int, State] = field(default_factory=dict)
    """New control variate of each device, with ``train.correction = scaffold``."""
    probes: State = field(default_factory=dict)
    """``Σ weight · spectrum.probe`` of the same devices in float64, with ``train.record-bias``."""
    reports: tuple[DeviceReport, ...]
    failures: dict[int, str]
    """Reason by device."""
    seconds: float = 0.0
    """What the work took."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The value of a node of a tier's tree: what some of its devices amount to."""

    partial: AnyPartial
    probes: State = field(default_factory=dict)


def join(aggregation: AnyAggregation) -> Join[Node]:
    """Return what adds two nodes."""

    def add(left: Node, right: Node) -> Node:
        probes = {name: x + right.probes[name] for name, x in left.probes.items()}
        return Node(partial=aggregation.merge(left.partial, right.partial), probes=probes)

    return add


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
    """Train ``devices``, all of one tier, from the submodel ``start`` and add up their results along the tree.

    A device whose training raises or gives NaN is reported as failed with its reason and left out.

    Args:
        env: the experiment.
        plan: the tiers' submodels in this round.
        tier_name: the tier of the devices.
        devices: by number, ascending: a node of the tier's tree.
        start: the tier's submodel.
        server_round: from 1 on.
        tails: for the group lasso, what the submodel lacks: two numbers for each LoD layer (``lod.suffix.Tail``).
        controls: the control variates of each device; None: there are none.
    """
    began = time.perf_counter()
    submodel = plan.by_name(tier_name).trains
    if submodel is None:
        raise ValueError(f"devices of tier {tier_name!r} do not train under {env.method.name!r}")
    prefixes = resident_prefixes(env, plan, submodel)
    aggregation = env.method.aggregation
    pairs = zip(tails[::2], tails[1::2], strict=True)
    frozen = env.method.frozen(start, server_round)
    settings = local_training(env, server_round, dict(zip(submodel.size.ranks or {}, pairs, strict=False)), frozen)
    ends = spectrum.rank_segments(plan) if env.config.train.record_bias and submodel.size.ranks else {}
    empty = aggregation.init(start, sizes_of(env, plan, server_round)[storage.owner_of(plan, submodel)])
    alone = len(devices) == 1
    uploads: list[State] = []
    reports: list[DeviceReport] = []
    failures: dict[int, str] = {}
    new_controls: dict[int, State] = {}

    def leaf(position: int) -> Node | None:
        device = devices[position]
        part = env.parts[device]
        batch = env.task.plain(part)
        generator = rng.generator(env.config.seed, "train", server_round, device)
        control = None if controls is None else controls[device]
        # Dropout, and whatever else an own model draws. ``torch.manual_seed`` takes 1 ms: it keeps a stack trace for
        # every kind of accelerator that is not there.
        torch.default_generator.manual_seed(rng.derived_seed(env.config.seed, "device-dropout", server_round, device))
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
            return None
        if control is not None:
            steps = settings.epochs * math.ceil(len(batch) / settings.batch_size)
            new_controls[device] = control.after(start, prefixes.model, steps, settings.lr)
        state = prefixes.state
        sent = {name: tensor for name, tensor in state.items() if name not in frozen}
        reports.append(DeviceReport(device=device, examples=len(batch.targets), loss=loss))
        probes = spectrum.probe(state, ends) if ends else {}
        if probes:
            weight = aggregation.weigh(sent, len(batch.targets))
            probes = {name: weight * x.double() for name, x in probes.items()}
        if alone:
            uploads.append(sent)
            return Node(partial=empty, probes=probes)
        return Node(partial=aggregation.add(empty, sent, len(batch.targets), start=start), probes=probes)

    node = reduced(Span(0, len(devices)), leaf, join(aggregation))
    parts: Parts = {}
    if node is not None:
        parts = {SUMS: uploads[0]} if alone else aggregation.pack(node.partial)
    return CohortResult(
        parts=parts,
        weight=0.0 if node is None else float(node.partial.weight),
        controls=new_controls,
        probes={} if node is None else node.probes,
        reports=tuple(reports),
        failures=failures,
        seconds=time.perf_counter() - began,
    )


def read_node(
    env: Environment, plan: Plan, submodel: Submodel, start: State, result: CohortResult, count: int, server_round: int
) -> Node | None:
    """Return what a cohort of ``count`` devices amounts to; None for nothing. The inverse of what a host sends.

    Args:
        env: the experiment.
        plan: the tiers' submodels in this round.
        submodel: what the devices trained.
        start: as it was sent to them.
        result: what came back.
        count: devices of the cohort, those that failed included.
        server_round: from 1 on.
    """
    if not result.reports:
        return None
    aggregation = env.method.aggregation
    sizes = sizes_of(env, plan, server_round)[storage.owner_of(plan, submodel)]
    if count == 1:
        empty = aggregation.init(start, sizes)
        partial = aggregation.add(empty, result.parts[SUMS], result.reports[0].examples, start=start)
    else:
        sent = sent_back(env, submodel, server_round)
        partial = aggregation.unpack(result.parts, sent, result.weight, len(result.reports), sizes)
    return Node(partial=partial, probes=result.probes)


def sent_back(env: Environment, submodel: Submodel, server_round: int) -> Signature:
    """Return what a device that trains ``submodel`` sends back: all of it but what it leaves as it was."""
    frozen = env.method.frozen(submodel.shapes, server_round)
    return tuple((name, shape) for name, shape in submodel.shapes.items() if name not in frozen)


def sizes_of(env: Environment, plan: Plan, server_round: int) -> dict[Owner, list[Signature]]:
    """Return all sizes that devices send back in a round, by the model that they belong to."""
    sizes: dict[Owner, list[Signature]] = {}
    for tier in plan.tiers:
        if tier.trains is not None:
            sizes.setdefault(storage.owner_of(plan, tier.trains), []).append(sent_back(env, tier.trains, server_round))
    return sizes


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
    model = prefixes.model
    if not model.training:
        model.train()
    load(prefixes.state, start)
    count = len(examples)
    prefixes = prefixes.of_device(examples.targets, masked=objective.masked, logit_adjustment=settings.logit_adjustment)
    for name, parameter in prefixes.parameters.items():
        parameter.requires_grad_(name not in settings.frozen)
    trained = {name: parameter for name, parameter in prefixes.parameters.items() if parameter.requires_grad}
    parameters = list(trained.values())
    optimizer = settings.optimizer.make(parameters, settings.lr, settings.momentum, settings.weight_decay)
    anchor = [start[name] for name in trained] if settings.proximal else []
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
    # Sums take a sixth of the time of a look at every number, and are not finite where one of them is not.
    if parameters and not math.isfinite(sum(float(x.sum()) for x in prefixes.state.values() if x.is_floating_point())):
        for name, parameter in prefixes.parameters.items():
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
    known = _residents(plan).prefixes
    if (prefixes := known.get((submodel, env.task.goal))) is None:
        smaller = smaller_levels(submodel, (tier.serves for tier in plan.tiers))
        prefixes = known[submodel, env.task.goal] = Prefixes(
            model=_resident_model(plan, submodel),
            smaller=[(_template(plan, x), x.shapes) for x in smaller],
            num_classes=plan.architecture.num_classes,
            goal=env.task.goal,
        )
    return prefixes


@dataclass(frozen=True, kw_only=True)
class _Residents:
    """Models of one plan by size."""

    models: dict[Submodel, nn.Module] = field(default_factory=dict)
    prefixes: dict[tuple[Submodel, Goal], Prefixes] = field(default_factory=dict)
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
