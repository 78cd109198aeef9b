"""The work of a host, without Flower: train the devices of a cohort, evaluate a submodel on a part of the test set.

Models stay resident per process and are reused, one per size; the environment is cached (``environment_of``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import nn

from fedmaestro import rng
from fedmaestro.clients.base import LocalTraining, Prefixes, train_device
from fedmaestro.data import normalize
from fedmaestro.evaluate import Score, score
from fedmaestro.flower.environment import Environment
from fedmaestro.models.architecture import Architecture, Size
from fedmaestro.plan import Submodel, smaller_levels
from fedmaestro.strategies.base import Block
from fedmaestro.submodel import State, load


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """One device's metrics row."""

    device: int
    examples: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class CohortResult:
    """What one message brings back."""

    block: Block | None
    """Partial sum of the devices that succeeded; None when none did."""
    reports: tuple[DeviceReport, ...]
    failures: dict[int, str]
    """Reason by device."""


def local_training(env: Environment, server_round: int) -> LocalTraining:
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
    )


def train_cohort(
    env: Environment, tier_name: str, devices: Sequence[int], start: State, server_round: int
) -> CohortResult:
    """Train ``devices``, all of one tier, from the submodel ``start`` and add up their results.

    A device whose training raises or gives NaN is reported as failed with its reason and left out.
    """
    submodel = env.plan.by_name(tier_name).trains
    if submodel is None:
        raise ValueError(f"devices of tier {tier_name!r} do not train under {env.strategy.name!r}")
    prefixes = resident_prefixes(env, submodel)
    aggregation = env.strategy.aggregation
    partial = aggregation.init(start)
    settings = local_training(env, server_round)
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
        partial = aggregation.add(partial, prefixes.model.state_dict(), len(indices))
        reports.append(DeviceReport(device=device, examples=len(indices), loss=loss))
    block = next(iter(partial.values()), None)
    return CohortResult(block=block, reports=tuple(reports), failures=failures)


def evaluate_part(env: Environment, tier_name: str, state: State, first: int, last: int) -> Score:
    """Evaluate a tier's submodel on test examples ``first … last - 1``."""
    model = _resident_model(env.plan.architecture, _key(env.plan.by_name(tier_name).serves.size))
    load(model, state)
    return score(model.eval(), env.dataset, env.dataset.test_images[first:last], env.dataset.test_labels[first:last])


def resident_prefixes(env: Environment, submodel: Submodel) -> Prefixes:
    """Return the reused model of this size, with the serving sizes of all smaller tiers as its levels."""
    model = _resident_model(env.plan.architecture, _key(submodel.size))
    smaller = smaller_levels(submodel, (tier.serves for tier in env.plan.tiers))
    return Prefixes(model, [(_template(env.plan.architecture, _key(x.size)), x.shapes) for x in smaller])


_Key = tuple[tuple[tuple[str, int], ...], Fraction | None]


def _key(size: Size) -> _Key:
    return tuple((size.ranks or {}).items()), size.width


def _size(key: _Key) -> Size:
    return Size(width=key[1]) if key[1] is not None else Size(ranks=dict(key[0]))


@lru_cache(maxsize=32)
def _resident_model(architecture: Architecture, key: _Key) -> nn.Module:
    model = architecture.materialize(_size(key))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@lru_cache(maxsize=32)
def _template(architecture: Architecture, key: _Key) -> nn.Module:
    return architecture.build(_size(key))


def _to_model_layout(images: torch.Tensor) -> torch.Tensor:
    # A LeNet step takes 2.9 instead of 4.1 ms in this layout.
    return images.contiguous(memory_format=torch.channels_last)
