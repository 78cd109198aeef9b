"""The work of a host, without Flower: train the devices of a cohort, evaluate a submodel on a part of the test set.

Models stay resident per process and are reused, one per size of a plan; the environment is cached (``environment_of``).
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn

from fedmaestro import rng
from fedmaestro.clients.base import Prefixes
from fedmaestro.clients.scaffold import Control
from fedmaestro.fleet.plan import Plan, Submodel, smaller_levels
from fedmaestro.rounds import spectrum, storage
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.failure import Failure, failure_of
from fedmaestro.rounds.norms import checked_norm
from fedmaestro.rounds.placement import placed
from fedmaestro.rounds.stacked import Stacks, best_size, train_stack, why_not
from fedmaestro.rounds.storage import Owner
from fedmaestro.rounds.training import Draws, local_training, train_device
from fedmaestro.rounds.tree import Join, Span, reduced
from fedmaestro.runs.code import located
from fedmaestro.strategies.base import SUMS, AnyAggregation, AnyPartial, Parts
from fedmaestro.submodel import Signature, State, load
from fedmaestro.tasks.goal import Goal
from fedmaestro.tasks.task import Batch, Score, evaluate
from fedmaestro.threads import one_thread

log = logging.getLogger("fedmaestro")


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """One device's metrics row."""

    device: int
    examples: int
    loss: float
    norm: float
    """``norms.update_norm`` of what it sends."""


@dataclass(frozen=True, kw_only=True)
class CohortResult:
    """What one message brings back."""

    parts: Parts = field(default_factory=dict)
    """What is uploaded: of a cohort of one device its submodel as it is, of others ``Aggregation.pack`` of the devices
    that succeeded; empty when none did."""
    controls: Mapping[int, State] = field(default_factory=dict)
    """New control variate of each device, with ``train.correction = scaffold``."""
    probes: State = field(default_factory=dict)
    """``Σ weight · spectrum.probe`` of the same devices in float64, with ``train.record-bias``."""
    reports: tuple[DeviceReport, ...]
    failures: dict[int, Failure]
    """By device."""
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


def train_cohort(
    env: Environment,
    plan: Plan,
    tier_name: str,
    devices: Sequence[int],
    start: State,
    server_round: int,
    tails: Sequence[float] = (),
    controls: Mapping[int, Control] | None = None,
    stack: int = 1,
    bound: float = math.inf,
) -> CohortResult:
    """Train ``devices``, all of one tier, from the submodel ``start`` and add up their results along the tree.

    A device whose training raises or gives NaN, or whose update is too long, is reported as failed and left out.

    Args:
        env: the experiment.
        plan: the tiers' submodels in this round.
        tier_name: the tier of the devices.
        devices: by number, ascending: a node of the tier's tree.
        start: the tier's submodel.
        server_round: from 1 on.
        tails: for the group lasso, what the submodel lacks: two numbers for each LoD layer (``lod.suffix.Tail``).
        controls: the control variates of each device; None: there are none.
        stack: devices that train as one stacked model at most (``rounds.stacked``).
        bound: of each update (``rounds.norms``).
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
    ends = spectrum.rank_segments(plan) if spectrum.is_recorded(env.config, submodel) else {}
    empty = aggregation.init(start, sizes_of(env, plan, server_round)[storage.owner_of(plan, submodel)])
    alone = len(devices) == 1
    uploads: list[State] = []
    reports: list[DeviceReport] = []
    failures: dict[int, Failure] = {}
    new_controls: dict[int, State] = {}
    where, augments = placed(), env.config.data.augment != "none"

    def own(device: int, batch: Batch) -> Batch:
        """Return examples as the device sees them."""
        if env.attackers is not None:
            batch = replace(batch, targets=env.attackers.labels(device, batch.targets, env.task.num_classes))
        return batch.to(where)

    def augmented(device: int, generator: np.random.Generator) -> Batch:
        return own(device, env.task.batch(env.parts[device], generator))

    def trained(position: int) -> tuple[State, float]:
        device, batch = devices[position], own(devices[position], env.task.plain(env.parts[devices[position]]))
        control = None if controls is None else controls[device]
        # Dropout, and whatever else an own model draws. ``torch.manual_seed`` takes 1 ms: it keeps a stack trace for
        # every kind of accelerator that is not there.
        seed = rng.derived_seed(env.config.seed, "device-dropout", server_round, device)
        torch.default_generator.manual_seed(seed)
        if where.type == "cuda":
            torch.cuda.manual_seed(seed)
        loss = train_device(
            prefixes,
            start,
            env.method.objective,
            batch,
            settings,
            Draws(env.config.seed, (server_round, device)),
            padding=env.task.padding,
            augmented=partial(augmented, device) if augments else None,
            control=control,
        )
        if control is not None:
            steps = settings.epochs * math.ceil(len(batch) / settings.batch_size)
            new_controls[device] = control.after(start, prefixes.model, steps, settings.lr)
        return prefixes.state, loss

    def trained_together(positions: Sequence[int]) -> list[tuple[State, float]]:
        chosen = [devices[position] for position in positions]
        states, losses = train_stack(
            prefixes,
            start,
            env.method.objective,
            [own(device, env.task.plain(env.parts[device])) for device in chosen],
            settings,
            [Draws(env.config.seed, (server_round, device)) for device in chosen],
            augmented=(lambda i, generator: augmented(chosen[i], generator)) if augments else None,
        )
        return [({name: x[i] for name, x in states.items()}, loss) for i, loss in enumerate(losses)]

    stacks = Stacks(Span(0, len(devices)), stack, trained, trained_together)
    if stacks.size > 1 and (reason := why_not(prefixes, env.method.objective, settings, env.task.padding, controls)):
        stacks.give_up(reason)

    def leaf(position: int) -> Node | None:
        device, count = devices[position], int(env.parts.sizes[devices[position]])
        try:
            state, loss = stacks(position)
            sent = {name: tensor for name, tensor in state.items() if name not in frozen}
            if env.attackers is not None:
                sent = env.attackers.sent(device, server_round, sent, start)
            if env.privacy is not None:
                sent = env.privacy.clipped(sent, start)
            norm = checked_norm(sent, start, bound)
        except Exception as error:
            failures[device] = failure_of(error, located(error))
            new_controls.pop(device, None)
            return None
        reports.append(DeviceReport(device=device, examples=count, loss=loss, norm=norm))
        probes = spectrum.probe(state, ends) if ends else {}
        if probes:
            weight = aggregation.weigh(sent, count)
            probes = {name: weight * x.double() for name, x in probes.items()}
        if alone:
            uploads.append(sent)
            return Node(partial=empty, probes=probes)
        return Node(partial=aggregation.add(empty, sent, count, start=start), probes=probes)

    node = reduced(Span(0, len(devices)), leaf, join(aggregation))
    parts: Parts = {}
    if node is not None:
        parts = {SUMS: uploads[0]} if alone else aggregation.pack(node.partial)
    return CohortResult(
        parts=parts,
        controls=new_controls,
        probes={} if node is None else node.probes,
        reports=tuple(reports),
        failures=failures,
        seconds=time.perf_counter() - began,
    )


def measured_stack(env: Environment, models: storage.Models) -> int:
    """Return how many devices to stack, as measured here with the largest tier's submodel and the device that has most.

    Args:
        env: the experiment.
        models: the server's, at the start of the run.

    Returns:
        1 where nothing is gained, or where devices cannot be stacked.
    """
    plan = env.plan
    tier = next(tier for tier in plan.tiers if tier.trains is not None)
    assert tier.trains is not None
    prefixes, settings = resident_prefixes(env, plan, tier.trains), local_training(env, 1)
    objective, start = env.method.objective, storage.download(plan, models, tier.trains)
    if (reason := why_not(prefixes, objective, settings, env.task.padding)) is not None:
        log.info("train.stack: 1: %s", reason)
        return 1
    part = env.parts[int(np.argmax(env.parts.sizes))]
    settings = replace(settings, epochs=1, frozen=env.method.frozen(start, 1))
    batch = env.task.plain(part[: 2 * settings.batch_size]).to(placed())

    def draws(count: int) -> list[Draws]:
        return [Draws(env.config.seed, (i,)) for i in range(count)]

    with one_thread():
        chosen = best_size(
            lambda: train_device(prefixes, start, objective, batch, settings, draws(1)[0]),
            lambda size: train_stack(prefixes, start, objective, [batch] * size, settings, draws(size)),
        )
    log.info("train.stack: %d, as measured here", chosen)
    return chosen


def read_node(
    env: Environment, plan: Plan, submodel: Submodel, start: State, result: CohortResult, count: int, server_round: int
) -> Node | None:
    """Return what a cohort of ``count`` devices amounts to; None for nothing. The inverse of what a host sends.

    Args:
        env: the experiment.
        plan: the tiers' submodels in this round.
        submodel: what the devices trained.
        start: as it was sent to them.
        result: what came back, as ``admission`` lets it in.
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
        weight = aggregation.weight_of(report.examples for report in result.reports)
        partial = aggregation.unpack(result.parts, sent, weight, len(result.reports), sizes)
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


def evaluate_part(env: Environment, plan: Plan, tier_name: str, state: State, first: int, last: int) -> Score:
    """Evaluate a tier's submodel on test examples ``first … last - 1``."""
    model = _resident_model(plan, plan.by_name(tier_name).serves)
    load(model, state)
    return evaluate(model, env.task, env.task.scored("test", first, last), placed(), env.config.seed)


def evaluate_devices(
    env: Environment, plan: Plan, tier_name: str, state: State, devices: Sequence[int]
) -> dict[int, Score]:
    """Evaluate a tier's submodel on the own test examples of each of ``devices``; those without any are left out."""
    model = _resident_model(plan, plan.by_name(tier_name).serves)
    load(model, state)
    tests = env.device_tests
    batch_of = env.task.plain if tests.held_out else env.task.tested
    batches = {device: [batch_of(tests.examples[device])] for device in devices if len(tests.examples[device])}
    return {device: evaluate(model, env.task, batch, placed(), env.config.seed) for device, batch in batches.items()}


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
        models[submodel] = model.to(placed())
    return models[submodel]


def _template(plan: Plan, submodel: Submodel) -> nn.Module:
    templates = _residents(plan).templates
    if submodel not in templates:
        templates[submodel] = plan.architecture.build(submodel.size)
    return templates[submodel]
