"""What is learnt: batches to train on, batches to score, the loss and the metric, for images or translation.

Shapes: ``B`` examples, ``K`` classes or vocabulary, ``T`` tokens. Targets are ``(B,)`` or ``(B, T)``, logits have one
more dimension of size ``K`` at the end.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro import rng
from fedmaestro.models.shape import InputShape

Split = Literal["validation", "test"]
_POOL_BATCHES = 50
NO_INDEX = -100
"""PyTorch's target value that does not count."""


@dataclass(frozen=True)
class Batch:
    """Inputs of the model and targets."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        return Batch(tuple(x.to(device, non_blocking=True) for x in self.inputs), self.targets.to(device))


@dataclass(frozen=True)
class Score:
    """Counts over targets that count; scores of disjoint parts add up."""

    correct: int
    loss_sum: float
    """Sum of the cross-entropies."""
    examples: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.correct + other.correct, self.loss_sum + other.loss_sum, self.examples + other.examples)

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, 0 to 1."""
        return self.correct / self.examples

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.examples


NOTHING_SCORED = Score(0, 0.0, 0)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One learning problem.

    Attributes:
        metric: what curves show: ``accuracy`` (share, higher is better) or ``perplexity`` (``exp(loss)``, lower is).
        examples: number of training examples.
        batch: ``(indices, generator) -> Batch`` of training examples; the generator draws the augmentation.
        plain: the same without augmentation.
        scored: ``(split, first, last) -> batches`` of the examples ``first … last - 1`` of a split (last None: to its
            end), always in the same order.
        test_examples: number of test examples that are scored.
        labels: classes of the training examples, which partitions go by; None: they have none.
        has_validation: whether ``validation`` is a split of its own; without one, it is the test set.
        ignore_index: target value that does not count (padding).
        lengths: of the training examples, where batches of similar length save padding.
        fingerprint: hash of the data.
        facts: what ``model.json`` keeps besides shapes (normalisation, vocabulary, …).
    """

    name: str
    input_shape: InputShape
    num_classes: int
    metric: Literal["accuracy", "perplexity"]
    examples: int
    batch: Callable[[np.ndarray, np.random.Generator], Batch]
    plain: Callable[[np.ndarray], Batch]
    scored: Callable[[Split, int, int | None], Iterable[Batch]]
    test_examples: int
    has_validation: bool
    fingerprint: str
    labels: np.ndarray | None = None
    ignore_index: int = NO_INDEX
    lengths: np.ndarray | None = None
    facts: dict[str, object] = field(default_factory=dict)

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

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy over the targets that count."""
        return F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), ignore_index=self.ignore_index, label_smoothing=label_smoothing
        )

    def distillation(self, logits: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy against ``softmax(teacher)``, over the targets that count."""
        counted = targets.flatten() != self.ignore_index
        soft = teacher.detach().flatten(0, -2)[counted].softmax(dim=-1)
        return F.cross_entropy(logits.flatten(0, -2)[counted], soft)

    def value(self, score: Score) -> float:
        """Return the metric."""
        return score.accuracy if self.metric == "accuracy" else math.exp(min(score.loss, 700.0))

    def split(self, name: Split) -> Iterable[Batch]:
        """Return the batches of a whole split."""
        return self.scored(name, 0, None)


@torch.inference_mode()
def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch], device: torch.device | None = None) -> Score:
    """Score ``model`` (in evaluation mode; its mode is restored)."""
    device = device or torch.device("cpu")
    training = model.training
    model.eval()
    total = NOTHING_SCORED
    for batch in batches:
        moved = batch.to(device)
        logits = model(*moved.inputs).float().flatten(0, -2)
        targets = moved.targets.flatten()
        valid = targets != task.ignore_index
        correct = ((logits.argmax(dim=-1) == targets) & valid).sum()
        summed = F.cross_entropy(logits, targets, ignore_index=task.ignore_index, reduction="sum")
        total += Score(int(correct), float(summed), int(valid.sum()))
    model.train(training)
    return total
