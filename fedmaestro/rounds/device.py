"""The work of a host, without Flower: train the devices of a cohort, evaluate a submodel on a part of the test set.

Models stay resident per process and are reused, one per size of a plan; the environment is cached (``environment_of``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from fedmaestro import rng
from fedmaestro.clients import Objective
from fedmaestro.clients.base import Prefixes
from fedmaestro.errors import DivergedError
from fedmaestro.fleet.plan import Plan, Submodel, smaller_levels
from fedmaestro.lod import group_lasso
from fedmaestro.lod.suffix import Tail
from fedmaestro.models.static_norm import calibrate
from fedmaestro.rounds import spectrum
from fedmaestro.rounds.environment import Environment
from fedmaestro.strategies.base import Parts
from fedmaestro.submodel import State, load
from fedmaestro.tasks.task import Score, evaluate

CALIBRATION = 512
"""Training examples whose statistics stand in for those of all devices (``static_norm``)."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The local optimiser: plain SGD, as every method here uses it, and what it adds to an objective."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float = 0.0
    """Largest L2 norm of a step's gradient; 0: no clipping."""
    logit_adjustment: float = 0.0
    """τ of ``clients.base.logit_offsets``; 0: the plain cross-entropy."""
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
    """Return the local optimiser's settings of a round: the learning rate decays along a cosine."""
    train = env.config.train
    done = (server_round - 1) / max(1, train.rounds - 1)
    factor = train.lr_final_factor + (1 - train.lr_final_factor) * (1 + math.cos(math.pi * done)) / 2
    return LocalTraining(
        epochs=train.local_epochs,
        batch_size=train.batch_size,
        lr=train.lr * factor,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        logit_adjustment=env.method.logit_adjustment,
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
    """
    submodel = plan.by_name(tier_name).trains
    if submodel is None:
        raise ValueError(f"devices of tier {tier_name!r} do not train under {env.method.name!r}")
    prefixes = resident_prefixes(plan, submodel)
    aggregation = env.method.aggregation
    partial = aggregation.init(start)
    pairs = zip(tails[::2], tails[1::2], strict=True)
    frozen = env.method.frozen(start, server_round)
    settings = local_training(env, server_round, dict(zip(submodel.size.ranks or {}, pairs, strict=False)), frozen)
    ends = spectrum.rank_segments(plan) if env.config.train.record_bias and submodel.size.ranks else {}
    probes: State = {}
    reports: list[DeviceReport] = []
    failures: dict[int, str] = {}
    for device in devices:
        batch = env.task.plain(env.parts[device])
        generator = rng.generator(env.config.seed, "train", server_round, device)
        try:
            loss = train_device(
                prefixes, start, env.method.objective, batch.inputs[0], batch.targets, settings, generator
            )
        except Exception as error:
            failures[device] = f"{type(error).__name__}: {error}"
            continue
        state = prefixes.model.state_dict()
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
        probes={name: (x * (1.0 / (block.weight or 1.0))).float() for name, x in probes.items()},
        reports=tuple(reports),
        failures=failures,
    )


def train_device(
    prefixes: Prefixes,
    start: State,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    settings: LocalTraining,
    generator: np.random.Generator,
) -> float:
    """Train a device's model in place from ``start``; ``prefixes.model`` then holds the result.

    Args:
        prefixes: the resident model and its smaller levels.
        start: the submodel that the server sent.
        objective: what a step minimises.
        images: ``(N, C, H, W)``, all examples of the device.
        labels: ``(N,)``.
        settings: epochs, batch size and SGD parameters; the last batch of an epoch may be smaller.
        generator: order of the examples and whatever the objective draws.

    Returns:
        The mean loss of a step, weighted by examples; without the group lasso, so that runs of any weight compare, but
        with the logit adjustment, whose strengths do not.

    Raises:
        DivergedError: the loss or a parameter is not finite.
    """
    model = prefixes.model.train()
    load(model, start)
    prefixes = prefixes.of_device(labels, masked=objective.masked, logit_adjustment=settings.logit_adjustment)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in settings.frozen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    total = torch.zeros(())
    for _ in range(settings.epochs):
        order = torch.from_numpy(generator.permutation(len(labels)))
        for batch in torch.split(order, settings.batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = objective.loss(prefixes, images[batch], labels[batch], generator)
            _penalised(loss, model, settings).backward()  # type: ignore[no-untyped-call]
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            total += loss.detach() * len(batch)
    mean = float(total) / (settings.epochs * len(labels))
    if not np.isfinite(mean):
        raise DivergedError(f"the training loss is {mean}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError(f"parameter {name} is not finite after training")
    return mean


def _penalised(loss: Tensor, model: nn.Module, settings: LocalTraining) -> Tensor:
    """Return ``loss`` plus the weighted group lasso of ``model``; ``loss`` itself where there is none."""
    return loss + settings.group_lasso * group_lasso(model, settings.tails) if settings.group_lasso else loss


def evaluate_part(env: Environment, plan: Plan, tier_name: str, state: State, first: int, last: int) -> Score:
    """Evaluate a tier's submodel on test examples ``first … last - 1``."""
    model = _resident_model(plan, plan.by_name(tier_name).serves)
    load(model, state)
    model.eval()
    if plan.architecture.norm == "static" and plan.architecture.has_norms:
        calibrate(model, _calibration_images(env))
    return evaluate(model, env.task, env.task.scored("test", first, last))


def _calibration_images(env: Environment) -> Tensor:
    """Return the training images that fix the statistics of static norms: ``(CALIBRATION, C, H, W)``, by the seed."""
    count = env.task.examples
    drawn = rng.generator(env.config.seed, "calibration").choice(count, min(CALIBRATION, count), replace=False)
    return env.task.plain(drawn).inputs[0]


def resident_prefixes(plan: Plan, submodel: Submodel) -> Prefixes:
    """Return the reused model of this size, with the serving sizes of all smaller tiers as its levels."""
    smaller = smaller_levels(submodel, (tier.serves for tier in plan.tiers))
    return Prefixes(
        model=_resident_model(plan, submodel),
        smaller=[(_template(plan, x), x.shapes) for x in smaller],
        num_classes=plan.architecture.num_classes,
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
        # A LeNet step takes 2.9 instead of 4.1 ms in this layout.
        models[submodel] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return models[submodel]


def _template(plan: Plan, submodel: Submodel) -> nn.Module:
    templates = _residents(plan).templates
    if submodel not in templates:
        templates[submodel] = plan.architecture.build(submodel.size)
    return templates[submodel]
