"""One learning problem: batches to train on, batches to score, and what is learnt from them (``goal``).

Shapes: ``B`` examples, ``K`` classes or vocabulary, ``T`` tokens, ``D`` values.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedmaestro import rng
from fedmaestro.models.shape import Input, InputShape
from fedmaestro.models.static_norm import calibrate, has_static_norms
from fedmaestro.runs.records import MetricFacts
from fedmaestro.tasks.goal import Goal
from fedmaestro.tasks.metrics import METRICS, Metric, Sums

Split = Literal["validation", "test"]
_POOL_BATCHES = 50
CALIBRATION = 512
"""Training examples whose statistics stand in for those of all devices (``static_norm``)."""


@dataclass(frozen=True)
class Batch:
    """Inputs of the model and targets."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        return Batch(tuple(x.to(device, non_blocking=True) for x in self.inputs), self.targets.to(device))

    @property
    def x(self) -> Tensor | tuple[Tensor, ...]:
        """The inputs as objectives get them: the one tensor, or several."""
        return self.inputs[0] if len(self.inputs) == 1 else self.inputs

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def take(self, indices: Tensor, padding: int | None = None) -> "Batch":
        """Return some of the examples; with ``padding``, columns of tokens that hold nothing else are cut off."""
        chosen = Batch(tuple(x[indices] for x in self.inputs), self.targets[indices])
        return chosen if padding is None else chosen.trimmed(padding)

    def trimmed(self, padding: int) -> "Batch":
        """Return the batch without the columns at the end that are ``padding`` in all examples of a sequence."""
        *first, last = self.inputs
        width = _width(last, padding)
        targets = self.targets[:, :width] if self.targets.dim() == 2 else self.targets
        return Batch((*(x[:, : _width(x, padding)] for x in first), last[:, :width]), targets)


def _width(tokens: Tensor, padding: int) -> int:
    used = (tokens != padding).any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


@dataclass(frozen=True)
class Score:
    """Sums over the targets of some examples; scores of disjoint parts add up."""

    examples: int
    """Targets that count: examples, or tokens."""
    loss_sum: float
    """Of their losses."""
    sums: Mapping[str, Sums] = field(default_factory=dict)
    """Of each metric, by its name."""

    def __add__(self, other: "Score") -> "Score":
        sums = {
            metric: {name: tensor + other.sums[metric][name] for name, tensor in own.items()}
            for metric, own in self.sums.items()
        }
        return Score(self.examples + other.examples, self.loss_sum + other.loss_sum, sums)

    @property
    def loss(self) -> float:
        """The mean loss of a target; nan where none counts."""
        return self.loss_sum / self.examples if self.examples else math.nan

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, 0 to 1, of a task that has this metric."""
        return self.value(METRICS["accuracy"])

    def value(self, metric: Metric) -> float:
        """Return a metric; nan where no target counts."""
        if not self.examples:
            return math.nan
        known = {
            "loss": torch.tensor(self.loss_sum, dtype=torch.float64),
            "examples": torch.tensor(self.examples, dtype=torch.float64),
        }
        return float(metric.compute({**self.sums.get(metric.name, {}), **known}))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One learning problem.

    Attributes:
        inputs: what a model is called with, apart from the batch.
        input_shape: of the first one, as models are built for it.
        num_classes: outputs of the model for each target: classes, size of the vocabulary, or values.
        goal: loss and metrics.
        metrics: what it is scored by, the main one first.
        examples: number of training examples.
        batch: ``(indices, generator) -> Batch`` of training examples; the generator draws the augmentation.
        plain: the same without augmentation.
        scored: ``(split, first, last) -> batches`` of the examples ``first … last - 1`` of a split (last None: to its
            end), always in the same order.
        test_examples: number of test examples that are scored.
        tested: ``indices -> Batch`` of test examples.
        labels: classes of the training examples, which partitions go by; None: they have none.
        groups: user of each training example, which partition ``natural`` goes by; None: there are none.
        test_groups: user of each test example; -1: one without training examples.
        users: names of the groups.
        has_validation: whether ``validation`` is a split of its own; without one, it is the test set.
        padding: token that fills up short sequences; None: there are none.
        lengths: of the training examples, where batches of similar length save padding.
        fingerprint: hash of the data.
        facts: what ``model.json`` keeps besides shapes (normalisation, vocabulary, …).
    """

    name: str
    inputs: tuple[Input, ...]
    num_classes: int
    goal: Goal
    metrics: tuple[Metric, ...]
    examples: int
    batch: Callable[[np.ndarray, np.random.Generator], Batch]
    plain: Callable[[np.ndarray], Batch]
    scored: Callable[[Split, int, int | None], Iterable[Batch]]
    test_examples: int
    tested: Callable[[np.ndarray], Batch]
    has_validation: bool
    fingerprint: str
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None
    users: tuple[str, ...] = ()
    padding: int | None = None
    lengths: np.ndarray | None = None
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def input_shape(self) -> InputShape:
        """The shape of the first input."""
        return self.inputs[0].shape

    @property
    def main(self) -> Metric:
        """What tables and plots show."""
        return self.metrics[0]

    @property
    def metric(self) -> str:
        """The name of the main metric."""
        return self.main.name

    def with_channel(self) -> "Task | None":
        """Return the task with its examples ``(H, W)`` as pictures ``(1, H, W)``; None where they are none."""
        if len(self.inputs) != 1 or len(self.input_shape) != 2:
            return None

        def picture(batch: Batch) -> Batch:
            return Batch((batch.inputs[0][:, None],), batch.targets)

        return replace(
            self,
            inputs=(Input((1, *self.input_shape), self.inputs[0].dtype),),
            batch=lambda indices, generator: picture(self.batch(indices, generator)),
            plain=lambda indices: picture(self.plain(indices)),
            tested=lambda indices: picture(self.tested(indices)),
            scored=lambda split, first, last: map(picture, self.scored(split, first, last)),
        )

    def steps(self, batch_size: int) -> int:
        """Return the steps of an epoch; the last batch may be smaller."""
        return math.ceil(self.examples / batch_size)

    def epoch(self, seed: int, epoch: int, batch_size: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``first_step`` on, in an order that follows from seed and epoch."""
        order = self._order(rng.generator(seed, "order", epoch), batch_size)
        for step in range(first_step, self.steps(batch_size)):
            indices = order[step * batch_size : (step + 1) * batch_size]
            yield self.batch(indices, rng.generator(seed, "augment", epoch, step))

    def _order(self, generator: np.random.Generator, batch_size: int) -> np.ndarray:
        """Return a random order; with lengths, each pool of examples is sorted and its batches are shuffled again."""
        order = generator.permutation(self.examples)
        if self.lengths is None:
            return order
        pool = batch_size * _POOL_BATCHES
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        by_length = np.concatenate([p[np.argsort(self.lengths[p], kind="stable")] for p in pools])
        whole = len(order) // batch_size
        batches = by_length[: whole * batch_size].reshape(whole, batch_size)
        return np.concatenate([batches[generator.permutation(whole)].ravel(), by_length[whole * batch_size :]])

    def calibration(self, seed: int, count: int, batch_size: int = 512) -> list[Batch]:
        """Return at most ``count`` training examples, drawn by ``seed``, without augmentation."""
        drawn = rng.generator(seed, "calibration").choice(self.examples, min(count, self.examples), replace=False)
        return [self.plain(drawn[i : i + batch_size]) for i in range(0, len(drawn), batch_size)]

    def value(self, score: Score) -> float:
        """Return the main metric."""
        return score.value(self.main)

    def values(self, score: Score) -> dict[str, float]:
        """Return every metric, the main one first."""
        return {metric.name: score.value(metric) for metric in self.metrics}

    def split(self, name: Split) -> Iterable[Batch]:
        """Return the batches of a whole split."""
        return self.scored(name, 0, None)


def metric_facts(task: Task) -> MetricFacts:
    """Return what records say of the main metric."""
    main = task.main
    return MetricFacts(name=main.name, higher_is_better=main.higher_is_better, percent=main.percent)


@torch.inference_mode()
def evaluate(
    model: nn.Module, task: Task, batches: Iterable[Batch], device: torch.device | None = None, seed: int = 0
) -> Score:
    """Score ``model`` (in evaluation mode; its mode is restored) by the loss and all metrics of ``task``.

    Static norms (``static_norm``) are calibrated before, on training examples that ``seed`` draws.
    """
    device = device or torch.device("cpu")
    training = model.training
    model.eval()
    if has_static_norms(model):
        calibrate(model, *task.calibration(seed, CALIBRATION)[0].to(device).inputs)
    total: Score | None = None
    for batch in batches:
        moved = batch.to(device)
        part = scored(task, task.goal.outputs(model(*moved.inputs)).float(), moved.targets)
        total = part if total is None else total + part
    model.train(training)
    return Score(0, 0.0) if total is None else total


def scored(task: Task, outputs: Tensor, targets: Tensor) -> Score:
    """Return the score of a batch's outputs."""
    goal, count = task.goal, task.goal.count(targets)
    loss = goal.summed(outputs, targets) if goal.summed is not None else goal.loss(outputs, targets) * count
    rows = goal.counted(outputs, targets)
    sums = {
        metric.name: {key: torch.as_tensor(x).detach().cpu().double() for key, x in metric.update(*rows).items()}
        for metric in task.metrics
    }
    return Score(count, float(loss), sums)
