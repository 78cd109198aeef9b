"""Several devices of a tier as one model: each tensor has a dimension of devices in front (``torch.func``).

A small model spends most of a step on what goes around the arithmetic, and an accelerator has room for many devices at
once: one step of a stack replaces a step of each device. Linear layers become batched matrix products, convolutions
grouped ones. What comes out is what ``device.train_device`` gives, up to the rounding of sums in another order.

The devices of a stack are a node of their tier's tree (``rounds.tree``) that cohorts are never cut below, so a result
does not depend on who trains with whom on which host.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.rounds.training import Draws, LocalTraining, check_finite
from fedmaestro.rounds.tree import Span
from fedmaestro.submodel import State
from fedmaestro.tasks.task import Batch

log = logging.getLogger("fedmaestro")

SIZES = (8, 32)
"""That ``auto`` tries."""

WORTH = 0.9
"""Of the time of one after the other: a stack that takes longer is not worth the other rounding."""

_OF_LABELS = ("offsets", "classes", "skew")
"""What a device's own labels say (``Prefixes``)."""

Trained = tuple[State, float]
"""Tensors after training, and the mean loss of a step."""


class Stacks:
    """The results of a cohort's devices, one by one, though those of a stack are trained together.

    Args:
        cohort: its devices.
        size: of a stack at most; 1: each device is trained alone.
        alone: ``position -> result`` of one device; raises where it failed.
        together: ``positions -> results``.
    """

    def __init__(
        self,
        cohort: Span,
        size: int,
        alone: Callable[[int], Trained],
        together: Callable[[Sequence[int]], Sequence[Trained]],
    ) -> None:
        self.size, self._alone, self._together = size, alone, together
        self._node_of = {i: node for node in nodes(cohort, size) for i in range(node.first, node.last)}
        self._ready: dict[int, Trained] = {}

    def __call__(self, position: int) -> Trained:
        """Return the result of a device; raises DivergedError, or whatever its training raised."""
        node = self._node_of[position]
        if self.size > 1 and len(node) > 1 and position not in self._ready:
            positions = range(node.first, node.last)
            try:
                self._ready = dict(zip(positions, self._together(positions), strict=True))
            except Exception as error:
                # What cannot be stacked cannot on any host: the result still depends on the seed only.
                self.give_up(f"{type(error).__name__}: {error}")
        if position not in self._ready:
            return self._alone(position)
        state, loss = self._ready.pop(position)
        check_finite(state, loss)
        return state, loss

    def give_up(self, reason: str) -> None:
        """Train each device alone, and say why, once in a process."""
        self.size = 1
        if reason not in _said:
            _said.add(reason)
            log.warning("train.stack: devices are trained one by one: %s", " ".join(reason.split())[:200])


_said: set[str] = set()


def nodes(span: Span, size: int) -> Iterator[Span]:
    """Yield the largest nodes at and below ``span`` of ``size`` leaves at most."""
    if len(span) <= size:
        yield span
    else:
        for half in span.halves:
            yield from nodes(half, size)


Augmented = Callable[[int, np.random.Generator], Batch]
"""``(position in the stack, its generator) -> the examples of an epoch``."""


def why_not(
    prefixes: Prefixes, objective: Objective, settings: LocalTraining, padding: int | None, controls: object = None
) -> str | None:
    """Return what keeps devices from being stacked; None: nothing that is known before it is tried."""
    if controls is not None:
        return "control variates correct each device's steps"
    if objective.choices is None:
        return f"objective {objective.name!r} does not say what it draws (Objective.choices)"
    if settings.optimizer.name != "sgd":
        return f"optimiser {settings.optimizer.name!r} keeps a state of its own"
    if objective.masked and settings.weight_decay:
        return "weight decay is taken back from rows that a device does not train"
    if settings.masks:
        return "weights are masked"
    if settings.group_lasso:
        return "the group lasso is a term of each model"
    if padding is not None:
        return "batches of tokens differ in length"
    if prefixes.state.keys() != prefixes.parameters.keys():
        return "the model has buffers"
    if any(isinstance(x, nn.modules.dropout._DropoutNd) and x.p > 0 for x in prefixes.model.modules()):
        return "the model draws in its forward pass"
    return None


def train_stack(
    prefixes: Prefixes,
    start: State,
    objective: Objective,
    examples: Sequence[Batch],
    settings: LocalTraining,
    draws: Sequence[Draws],
    *,
    augmented: Augmented | None = None,
) -> tuple[State, list[float]]:
    """Train one model for each device from ``start``, all at once.

    Args:
        prefixes: the resident model and its smaller levels, which stay as they are.
        start: the submodel that the server sent.
        objective: what a step minimises; one whose draws are known (``Objective.choices``).
        examples: of each of ``D`` devices.
        settings: as for ``device.train_device``.
        draws: of each device, as there.
        augmented: makes the examples of an epoch anew.

    Returns:
        The tensors ``(D, …)`` after training, those that are not trained included, and the mean loss of each device;
        neither need be finite.
    """
    stack = _Stack(prefixes.model.train(), start, settings, len(examples))
    devices = [prefixes.of_device(batch.targets, objective, settings.logit_adjustment) for batch in examples]
    labels = [_stacked([getattr(x, key) for x in devices]) for key in _OF_LABELS]
    counts = [len(batch) for batch in examples]
    assert objective.choices is not None
    choices = objective.choices(prefixes.levels)
    totals = torch.zeros(len(examples), device=stack.where)

    def step(chosen: list[int], batches: Sequence[Batch], draw: int) -> None:
        def loss(trained: State, x: tuple[Tensor, ...], y: Tensor, *of_labels: Tensor | None) -> tuple[Tensor, Tensor]:
            """Return what a step minimises, and the loss that is reported."""
            parameters: Any = {**stack.fixed, **trained}
            model: Any = _Called(prefixes.model, parameters)
            known: Any = dict(zip(_OF_LABELS, of_labels, strict=True))
            inner = replace(prefixes, model=model, parameters=parameters, **known)
            of_step: Any = _Drawn(draw)
            with settings.passes(stack.where):
                value = objective.loss(inner, x[0] if len(x) == 1 else x, y, of_step)
            if settings.proximal:
                distance = sum(((trained[name] - start[name].to(stack.where)) ** 2).sum() for name in trained)
                return value + settings.proximal / 2 * distance, value
            return value, value

        x = tuple(torch.stack(parts) for parts in zip(*(batch.inputs for batch in batches), strict=True))
        y = torch.stack([batch.targets for batch in batches])
        whole = len(chosen) == len(examples)
        of = [t if t is None or whole else t[chosen] for t in labels]
        dims = (0, 0, 0, *(None if t is None else 0 for t in of))
        gradients, (_, losses) = vmap(grad_and_value(loss, has_aux=True), in_dims=dims)(stack.of(chosen), x, y, *of)
        stack.move(chosen, gradients)
        totals[chosen] += losses.detach() * len(batches[0])

    for _ in range(settings.epochs):
        pairs = zip(draws, counts, strict=True)
        orders = [torch.from_numpy(of_device.order.permutation(count)).to(stack.where) for of_device, count in pairs]
        if augmented is not None:
            examples = [augmented(i, of_device.examples) for i, of_device in enumerate(draws)]
        for first in range(0, max(counts), settings.batch_size):
            groups: dict[tuple[int, int], list[int]] = defaultdict(list)
            for i, (of_device, count) in enumerate(zip(draws, counts, strict=True)):
                if first < count:
                    draw = int(of_device.objective.integers(choices)) if choices else 0
                    groups[min(settings.batch_size, count - first), draw].append(i)
            for (size, draw), chosen in sorted(groups.items()):
                step(chosen, [examples[i].take(orders[i][first : first + size]) for i in chosen], draw)
    steps = settings.epochs * np.array(counts)
    return stack.state(), (totals.cpu().numpy() / steps).tolist()


class _Stack:
    """The tensors of the models, and the steps of ``clients.optimizers.Sgd`` on some of them."""

    def __init__(self, model: nn.Module, start: State, settings: LocalTraining, devices: int) -> None:
        self.where = next(model.parameters()).device
        self.settings, self._names, self._devices = settings, list(start), devices
        self.fixed = {name: x.to(self.where) for name, x in start.items() if name in settings.frozen}
        self.trained = {
            name: x.to(self.where).expand(devices, *x.shape).contiguous()
            for name, x in start.items()
            if name not in settings.frozen
        }
        self._velocity = {name: torch.zeros_like(x) for name, x in self.trained.items()} if settings.momentum else {}

    def of(self, chosen: list[int]) -> State:
        """Return the tensors of some devices."""
        return self.trained if len(chosen) == self._devices else {n: x[chosen] for n, x in self.trained.items()}

    @torch.no_grad()
    def move(self, chosen: list[int], gradients: State) -> None:
        """Take a step of some devices."""
        settings, rows = self.settings, slice(None) if len(chosen) == self._devices else chosen
        if settings.clip_norm:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            factors = (settings.clip_norm / (norms + 1e-6)).clamp(max=1.0)
            gradients = {n: g * factors.reshape(-1, *(1,) * (g.dim() - 1)) for n, g in gradients.items()}
        for name, gradient in gradients.items():
            here = self.trained[name]
            if settings.weight_decay:
                gradient = gradient.add(here[rows], alpha=settings.weight_decay)
            if settings.momentum:
                velocity = self._velocity[name]
                gradient = velocity[rows] * settings.momentum + gradient
                velocity[rows] = gradient
            if rows == slice(None):
                here.add_(gradient, alpha=-settings.lr)
            else:
                here[rows] = here[rows].add_(gradient, alpha=-settings.lr)

    def state(self) -> State:
        """Return all tensors, in the order of what was sent."""
        fixed = {name: x.expand(self._devices, *x.shape) for name, x in self.fixed.items()}
        return {name: self.trained[name] if name in self.trained else fixed[name] for name in self._names}


class _Called:
    """A module with other tensors."""

    def __init__(self, model: nn.Module, parameters: State) -> None:
        self._model, self._parameters = model, parameters

    def __call__(self, *inputs: Tensor) -> Any:
        return functional_call(self._model, self._parameters, inputs)


class _Drawn:
    """Stands for a generator whose one draw of a step is known."""

    def __init__(self, value: int) -> None:
        self._value = value

    def integers(self, _count: int) -> int:
        """Return it."""
        return self._value


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [x for x in tensors if x is not None]
    return torch.stack(known) if len(known) == len(tensors) else None


def best_size(alone: Callable[[], object], stacked: Callable[[int], object]) -> int:
    """Return how many devices to stack, by measurement: 1, where one after the other is as fast.

    Args:
        alone: trains one device.
        stacked: trains so many at once.
    """
    best, least = 1, WORTH * _seconds(alone)
    for size in SIZES:
        try:
            took = _seconds(partial(stacked, size)) / size
        except Exception as error:
            log.debug("a stack of %d devices: %s", size, error)
            break
        if took < least:
            best, least = size, took
    return best


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    work()
    took = math.inf
    for _ in range(times):
        began = time.perf_counter()
        work()
        took = min(took, time.perf_counter() - began)
    return took
