"""The tasks that ``fedmaestro train`` knows: classification of every image dataset, and translation of Multi30k."""

import os
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from fedmaestro import rng
from fedmaestro.config.training import TrainingConfig
from fedmaestro.data import DATASETS, ImageDataset, load_dataset, normalize
from fedmaestro.data.translation import PAD, TranslationSplit, load_translation
from fedmaestro.errors import UserError, check_name
from fedmaestro.tasks.task import Batch, Split, Task

TRANSLATION = "multi30k"
_SCORED_BATCH = 500
_SCORED_PAIRS = 100
_PADDING = 4

Progress = Callable[[int, int], None]


def open_task(config: TrainingConfig, progress: Progress | None = None) -> Task:
    """Load the data of ``config`` and return its task.

    Raises:
        UserError: an unknown dataset, missing files, settings that the data does not allow.
    """
    check_name("data.name", config.data.name, [*DATASETS, TRANSLATION])
    folder = config.data.dir or os.environ.get("FEDMAESTRO_DATA_DIR", "")
    if config.data.name == TRANSLATION:
        return _translation(config, folder)
    return _images(config, load_dataset(config.data.name, folder, progress=progress))


def _images(config: TrainingConfig, dataset: ImageDataset) -> Task:
    train, held_out = _split(config, len(dataset.train_labels))

    def make(images: np.ndarray, labels: np.ndarray) -> Batch:
        pixels = normalize(images, dataset.mean, dataset.std).contiguous(memory_format=torch.channels_last)
        return Batch((pixels,), torch.from_numpy(np.asarray(labels)))

    def plain(indices: np.ndarray) -> Batch:
        chosen = train[indices]
        return make(dataset.train_images[chosen], dataset.train_labels[chosen])

    def augmented(indices: np.ndarray, generator: np.random.Generator) -> Batch:
        batch = plain(indices)
        return (
            batch if config.data.augment == "none" else Batch((_crop_flip(batch.inputs[0], generator),), batch.targets)
        )

    def scored(split: Split) -> Iterable[Batch]:
        if split == "validation" and len(held_out):
            images, labels, chosen = dataset.train_images, dataset.train_labels, held_out
        else:
            images, labels = dataset.test_images, dataset.test_labels
            chosen = np.arange(len(labels))[: config.data.test_limit or None]
        for start in range(0, len(chosen), _SCORED_BATCH):
            part = chosen[start : start + _SCORED_BATCH]
            yield make(images[part], labels[part])

    return Task(
        name=dataset.name,
        input_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        metric="accuracy",
        examples=len(train),
        batch=augmented,
        plain=plain,
        scored=scored,
        has_validation=len(held_out) > 0,
        fingerprint=dataset.fingerprint,
        facts={"mean": list(dataset.mean), "std": list(dataset.std)},
    )


def _split(config: TrainingConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out; the latter depend on the seed only."""
    held, limit = config.data.validation, config.data.limit
    if held >= count:
        raise UserError(f"data.validation={held} leaves nothing of {count} training examples: lower it")
    order = rng.generator(config.seed, "split").permutation(count)
    rest = order[held:]
    if limit > len(rest):
        raise UserError(f"data.limit={limit} is more than the {len(rest)} training examples: lower it, or 0 for all")
    return np.sort(rest[:limit] if limit else rest), np.sort(order[:held])


def _crop_flip(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Return random crops of the zero-padded ``images (B, C, H, W)``, half of them mirrored (He et al. 2016)."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (_PADDING,) * 4)
    top, left = (torch.from_numpy(generator.integers(2 * _PADDING + 1, size=(count, 1))) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.from_numpy(generator.random((count, 1)) < 0.5)
    columns = torch.where(mirrored, columns.flip(1), columns)
    # Advanced indices around a slice put the channels last, which is also the memory layout that convolutions like.
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _translation(config: TrainingConfig, folder: str) -> Task:
    """Return the task of predicting each next English token from the German sentence and the tokens before it."""
    dataset = load_translation(folder, min_count=config.data.min_count)
    for key, value in (("data.validation", config.data.validation), ("data.augment", config.data.augment)):
        if value not in (0, "none"):
            raise UserError(f"{key}={value!r}: {TRANSLATION} has a validation split of its own and no augmentation")
    train = _split(config, len(dataset.train))[0]

    def pairs(split: TranslationSplit, indices: np.ndarray) -> Batch:
        """Cut the padding that no pair of the batch needs; PAD is the target that does not count."""
        source = split.source[indices, : int(split.source_lengths[indices].max())]
        target = torch.from_numpy(split.target[indices, : int(split.target_lengths[indices].max())].astype(np.int64))
        return Batch((torch.from_numpy(source.astype(np.int64)), target[:, :-1]), target[:, 1:])

    def scored(name: Split) -> Iterable[Batch]:
        split = dataset.val if name == "validation" else dataset.test
        by_length = np.argsort(split.source_lengths[: config.data.test_limit or None], kind="stable")
        for start in range(0, len(by_length), _SCORED_PAIRS):
            yield pairs(split, by_length[start : start + _SCORED_PAIRS])

    return Task(
        name=TRANSLATION,
        input_shape=dataset.input_shape,
        num_classes=len(dataset.vocabulary),
        metric="perplexity",
        examples=len(train),
        batch=lambda indices, _generator: pairs(dataset.train, train[indices]),
        plain=lambda indices: pairs(dataset.train, train[indices]),
        scored=scored,
        has_validation=True,
        fingerprint=dataset.fingerprint,
        lengths=np.asarray(dataset.train.source_lengths[train]),
        ignore_index=PAD,
        facts={"vocabulary": list(dataset.vocabulary)},
    )
