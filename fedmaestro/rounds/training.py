"""A device's local training, without Flower, and what a round says of it."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from fedmaestro import rng
from fedmaestro.clients import Objective
from fedmaestro.clients.base import Prefixes
from fedmaestro.clients.optimizers import OPTIMIZERS, LocalOptimizer
from fedmaestro.clients.scaffold import Control
from fedmaestro.errors import DivergedError
from fedmaestro.lod import group_lasso
from fedmaestro.lod.suffix import Tail
from fedmaestro.models.masks import threshold_of
from fedmaestro.rounds.environment import Environment
from fedmaestro.submodel import State, load
from fedmaestro.tasks.task import Batch


@dataclass(frozen=True)
class Draws:
    """What is random in a device's training, each from a generator of its own.

    So rows of a comparison whose objectives draw differently, or not at all, see examples in the same order, and
    augmented alike.
    """

    seed: int
    """The experiment's."""
    indices: tuple[int, ...]
    """Round and device."""

    @cached_property
    def order(self) -> np.random.Generator:
        """Of the examples."""
        return rng.generator(self.seed, "order", *self.indices)

    @cached_property
    def objective(self) -> np.random.Generator:
        """Of whatever the objective draws."""
        return rng.generator(self.seed, "objective", *self.indices)

    @cached_property
    def examples(self) -> np.random.Generator:
        """Of augmentation."""
        return rng.generator(self.seed, "device-augment", *self.indices)


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
    masks: bool = False
    """Whether a device keeps the largest of its weights only (``models.masks``)."""
    mixed: bool = False
    """Whether passes compute in bfloat16 where PyTorch's autocast does; parameters and steps stay in float32."""

    def passes(self, where: torch.device) -> AbstractContextManager[object]:
        """Return the context of forward passes on ``where``."""
        return torch.autocast(where.type, torch.bfloat16) if self.mixed else nullcontext()


def local_training(
    env: Environment,
    server_round: int,
    tails: Mapping[str, Tail] | None = None,
    frozen: frozenset[str] = frozenset(),
) -> LocalTraining:
    """Return the local optimiser's settings of a round (from 1 on)."""
    train = env.config.train
    factor = env.method.schedule.factor(server_round, train.rounds, env.method.decay)
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
        masks=env.method.submodel.scales == "entries",
        mixed=train.precision == "bfloat16",
    )


def train_device(
    prefixes: Prefixes,
    start: State,
    objective: Objective,
    examples: Batch,
    settings: LocalTraining,
    draws: Draws,
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
        draws: what is random.
        padding: token that fills up short sequences; None: there are none.
        augmented: makes the examples of an epoch anew; None: they are as they are.
        control: control variates that correct every step; None: none do.

    Returns:
        The mean loss of a step, weighted by examples; without the group lasso and the proximal term, so that runs of
        any weight compare, but with the logit adjustment, whose strengths do not.

    Raises:
        DivergedError: the loss or a parameter is not finite.
    """
    model, where = prefixes.model, examples.targets.device
    if not model.training:
        model.train()
    load(prefixes.state, start)
    count = len(examples)
    prefixes = prefixes.of_device(examples.targets, objective, settings.logit_adjustment)
    if settings.masks:
        prefixes = replace(prefixes, threshold=threshold_of(start))
    for name, parameter in prefixes.parameters.items():
        parameter.requires_grad_(name not in settings.frozen)
    trained = {name: parameter for name, parameter in prefixes.parameters.items() if parameter.requires_grad}
    parameters = list(trained.values())
    optimizer = settings.optimizer.make(parameters, settings.lr, settings.momentum, settings.weight_decay)
    anchor = [start[name].to(where) for name in trained] if settings.proximal else []
    rows = UntrainedRows(trained) if objective.masked and settings.weight_decay else None
    total = torch.zeros((), device=where)
    for _ in range(settings.epochs):
        order = torch.from_numpy(draws.order.permutation(count)).to(where)
        if augmented is not None:
            examples = augmented(draws.examples)
        for indices in torch.split(order, settings.batch_size):
            batch = examples.take(indices, padding)
            optimizer.zero_grad(set_to_none=True)
            with settings.passes(where):
                loss = objective.loss(prefixes, batch.x, batch.targets, draws.objective)
            penalised = _penalised(loss, model, settings)
            if settings.proximal:
                distance = sum(((x - y) ** 2).sum() for x, y in zip(parameters, anchor, strict=True))
                penalised = penalised + settings.proximal / 2 * distance
            penalised.backward()  # type: ignore[no-untyped-call]
            if control is not None:
                control.correct(model)
            if rows is not None:
                rows.see_gradients()
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            total += loss.detach() * len(indices)
    if rows is not None:
        rows.restore(start)
    mean = float(total) / (settings.epochs * count)
    check_finite(prefixes.state, mean)
    return mean


class UntrainedRows:
    """Takes weight decay back from rows (dimension 0 of a tensor) that no step had a gradient for.

    Under a masked objective these are the classifier's rows of classes that the device lacks, which HeteroFL's server
    ignores and ``masked_mean`` tells from the others by their bits; and those of units that no example activated.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._trained = trained
        self._seen = {name: torch.zeros(x.shape[:1], dtype=torch.bool, device=x.device) for name, x in trained.items()}

    def see_gradients(self) -> None:
        """Note which rows the step at hand has a gradient for."""
        for name, parameter in self._trained.items():
            if (gradient := parameter.grad) is not None:
                self._seen[name] |= gradient.flatten(1).any(1) if gradient.dim() > 1 else gradient != 0

    @torch.no_grad()
    def restore(self, start: Mapping[str, Tensor]) -> None:
        """Put the other rows back to what the server sent."""
        for name, parameter in self._trained.items():
            untrained = ~self._seen[name]
            parameter[untrained] = start[name].to(parameter.device)[untrained]


def check_finite(state: State, loss: float) -> None:
    """Raise DivergedError where the mean loss of a device, or one of its tensors after training, is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"the training loss is {loss}")
    # Sums take a sixth of the time of a look at every number, and are not finite where one of them is not.
    if math.isfinite(sum(float(x.sum()) for x in state.values() if x.is_floating_point())):
        return
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"parameter {name} is not finite after training")


def _penalised(loss: Tensor, model: nn.Module, settings: LocalTraining) -> Tensor:
    """Return ``loss`` plus the weighted group lasso of ``model``; ``loss`` itself where there is none."""
    return loss + settings.group_lasso * group_lasso(model, settings.tails) if settings.group_lasso else loss
