"""Evaluation of one model on test examples."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedmaestro.data import ImageDataset, normalize

BATCH = 500


@dataclass(frozen=True)
class Score:
    """Counts over test examples; scores of disjoint parts add up."""

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


@torch.inference_mode()
def score(model: nn.Module, dataset: ImageDataset, images: np.ndarray, labels: np.ndarray) -> Score:
    """Return the score of ``model`` on ``images (N, C, H, W)`` uint8 and ``labels (N,)``."""
    total = Score(0, 0.0, 0)
    for start in range(0, len(labels), BATCH):
        x = normalize(images[start : start + BATCH], dataset.mean, dataset.std)
        y = torch.from_numpy(np.asarray(labels[start : start + BATCH]))
        logits = model(x.contiguous(memory_format=torch.channels_last))
        correct = int((logits.argmax(dim=1) == y).sum())
        total += Score(correct, float(F.cross_entropy(logits, y, reduction="sum")), len(y))
    return total
