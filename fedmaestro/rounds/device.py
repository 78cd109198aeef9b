"""The work of a host, without Flower: train the devices of a cohort, evaluate a submodel on a part of the test set.

Models stay resident per process and are reused, one per size of a plan; the environment is cached (``environment_of``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from fedmaestro import rng
from fedmaestro.clients.base import LocalTraining, Prefixes, train_device
from fedmaestro.data import normalize
from fedmaestro.fleet.plan import Plan, Submodel, smaller_levels
from fedmaestro.lod.suffix import Tail
from fedmaestro.models.static_norm import calibrate
from fedmaestro.rounds import spectrum
from fedmaestro.rounds.environment import Environment
from fedmaestro.strategies.base import Block
from fedmaestro.submodel import State, load
from fedmaestro.tasks.evaluate import Score, score

CALIBRATION = 512
"""Training examples whose statistics stand in for those of all devices (``static_norm``)."""


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """One device's metrics row."""

    device: int
    examples: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class CohortResult:
    """What one message brings back."""

    mean: State = field(default_factory=dict)
    """What is uploaded: the reduction's sums over the devices that succeeded, by ``1 / weight``, in float32."""
    weight: float = 0.0
    """``Σ weight`` of these devices; 0 when none succeeded."""
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
        logit_adjustment=env.strategy.logit_adjustment,
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
        raise ValueError(f"devices of tier {tier_name!r} do not train under {env.strategy.name!r}")
    prefixes = resident_prefixes(plan, submodel)
    aggregation = env.strategy.aggregation
    partial = aggregation.init(start)
    pairs = zip(tails[::2], tails[1::2], strict=True)
    frozen = env.strategy.frozen(start, server_round)
    settings = local_training(env, server_round, dict(zip(submodel.size.ranks or {}, pairs, strict=False)), frozen)
    ends = rank_segments(plan) if env.config.train.record_bias and submodel.size.ranks else {}
    probes: State = {}
    reports: list[DeviceReport] = []
    failures: dict[int, str] = {}
    for device in devices:
        indices = env.parts[device]
        images = _to_model_layout(normalize(env.dataset.train_images[indices], env.dataset.mean, env.dataset.std))
        labels = torch.from_numpy(env.dataset.train_labels[indices])
        generator = rng.generator(env.config.seed, "train", server_round, device)
        try:
            loss = train_device(prefixes, start, env.objective, images, labels, settings, generator)
        except Exception as error:
            failures[device] = f"{type(error).__name__}: {error}"
            continue
        state = prefixes.model.state_dict()
        sent = {name: tensor for name, tensor in state.items() if name not in frozen}
        partial = aggregation.add(partial, sent, len(indices), start=start)
        if ends:
            weight = aggregation.weigh(sent, len(indices))
            probes = {x: weight * m + probes.get(x, 0.0) for x, m in spectrum.probe(state, ends).items()}
        reports.append(DeviceReport(device=device, examples=len(indices), loss=loss))
    block = next(iter(partial.values()), Block())
    scale = 1.0 / (block.weight or 1.0)
    return CohortResult(
        mean={name: x.float() for name, x in aggregation.reduction.scale(block.sums, scale).items()},
        weight=block.weight,
        probes={name: (x * scale).float() for name, x in probes.items()},
        reports=tuple(reports),
        failures=failures,
    )


def rank_segments(plan: Plan) -> dict[str, list[int]]:
    """Return the ends of the rank segments between the sizes that the tiers train."""
    return spectrum.bounds([tier.trains.size.ranks or {} for tier in plan.tiers if tier.trains is not None])


def evaluate_part(env: Environment, plan: Plan, tier_name: str, state: State, first: int, last: int) -> Score:
    """Evaluate a tier's submodel on test examples ``first … last - 1``."""
    model = _resident_model(plan, plan.by_name(tier_name).serves)
    load(model, state)
    model.eval()
    if plan.architecture.norm == "static" and plan.architecture.has_norms:
        calibrate(model, _to_model_layout(_calibration_images(env)))
    return score(model, env.dataset, env.dataset.test_images[first:last], env.dataset.test_labels[first:last])


def _calibration_images(env: Environment) -> torch.Tensor:
    """Return the training images that fix the statistics of static norms: ``(CALIBRATION, C, H, W)``, by the seed."""
    count = len(env.dataset.train_labels)
    drawn = rng.generator(env.config.seed, "calibration").choice(count, min(CALIBRATION, count), replace=False)
    return normalize(env.dataset.train_images[drawn], env.dataset.mean, env.dataset.std)


def resident_prefixes(plan: Plan, submodel: Submodel) -> Prefixes:
    """Return the reused model of this size, with the serving sizes of all smaller tiers as its levels."""
    smaller = smaller_levels(submodel, (tier.serves for tier in plan.tiers))
    return Prefixes(_resident_model(plan, submodel), [(_template(plan, x), x.shapes) for x in smaller])


@dataclass(frozen=True, kw_only=True)
class _Residents:
    """Models of one plan by their parameters, which identify a size there."""

    models: dict[int, nn.Module] = field(default_factory=dict)
    templates: dict[int, nn.Module] = field(default_factory=dict)


@lru_cache(maxsize=2)
def _residents(plan: Plan) -> _Residents:  # noqa: ARG001
    """Return the models that stay: when ranks change, those of the plan before the last one go."""
    return _Residents()


def _resident_model(plan: Plan, submodel: Submodel) -> nn.Module:
    models, params = _residents(plan).models, submodel.cost.params
    if params not in models:
        model = plan.architecture.materialize(submodel.size)
        models[params] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return models[params]


def _template(plan: Plan, submodel: Submodel) -> nn.Module:
    templates, params = _residents(plan).templates, submodel.cost.params
    if params not in templates:
        templates[params] = plan.architecture.build(submodel.size)
    return templates[params]


def _to_model_layout(images: torch.Tensor) -> torch.Tensor:
    # A LeNet step takes 2.9 instead of 4.1 ms in this layout.
    return images.contiguous(memory_format=torch.channels_last)
