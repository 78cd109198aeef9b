"""Classification of images. Shapes: B examples, C channels, H, W pixels."""

from collections.abc import Iterable

import numpy as np
import torch

from fedmaestro.data import ImageDataset, normalize
from fedmaestro.models.shape import inputs_of
from fedmaestro.tasks.goal import CLASSIFICATION
from fedmaestro.tasks.metrics import metrics_of
from fedmaestro.tasks.task import Batch, Split, Task

SCORED_BATCH = 500


def image_task(
    dataset: ImageDataset,
    *,
    train: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    spares_test: bool = False,
    test_limit: int | None = None,
    unit: bool = False,
) -> Task:
    """Return the task of naming the class of an image.

    Args:
        dataset: the images.
        train: indices of the training examples to learn from; None: all.
        held_out: indices of those that the validation split consists of; None: there is none.
        spares_test: whether they take the test set's place too, which nothing reads then.
        test_limit: score only this many test examples, the first.
        unit: leave pixels in [0, 1] instead of standardising them by the channels' moments.
    """
    channels = len(dataset.mean)
    mean, std = ((0.0,) * channels, (1.0,) * channels) if unit else (dataset.mean, dataset.std)
    chosen_labels = dataset.train_labels if train is None else dataset.train_labels[train]
    validation = None if held_out is None else (dataset.train_images, dataset.train_labels, held_out)
    test = dataset.test_images, dataset.test_labels, np.arange(len(dataset.test_labels))[:test_limit]
    if spares_test and validation is not None:
        test = validation

    def make(images: np.ndarray, labels: np.ndarray) -> Batch:
        # Convolutions bring them into their weights' layout; a model that flattens them would have to bring them back.
        return Batch((normalize(images, mean, std),), torch.from_numpy(np.asarray(labels)))

    def plain(indices: np.ndarray) -> Batch:
        chosen = indices if train is None else train[indices]
        return make(dataset.train_images[chosen], dataset.train_labels[chosen])

    def scored(split: Split, first: int, last: int | None) -> Iterable[Batch]:
        images, labels, chosen = validation if split == "validation" and validation is not None else test
        chosen = chosen[first:last]
        for start in range(0, len(chosen), SCORED_BATCH):
            part = chosen[start : start + SCORED_BATCH]
            yield make(images[part], labels[part])

    def tested(indices: np.ndarray) -> Batch:
        images, labels, chosen = test
        return make(images[chosen[indices]], labels[chosen[indices]])

    return Task(
        name=dataset.name,
        inputs=inputs_of(dataset.image_shape),
        num_classes=dataset.num_classes,
        goal=CLASSIFICATION,
        metrics=metrics_of(CLASSIFICATION),
        examples=len(chosen_labels),
        batch=lambda indices, _generator: plain(indices),
        plain=plain,
        scored=scored,
        test_examples=len(test[-1]),
        tested=tested,
        labels=chosen_labels,
        has_validation=held_out is not None,
        fingerprint=dataset.fingerprint,
        facts={"mean": list(mean), "std": list(std)},
    )
