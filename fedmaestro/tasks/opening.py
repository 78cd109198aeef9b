"""The tasks that ``fedmaestro train`` knows: classification of every image dataset, and translation of Multi30k."""

from collections.abc import Callable

import numpy as np

from fedmaestro import rng
from fedmaestro.config.training import TrainingConfig
from fedmaestro.data import DATASETS, data_folder, load_dataset
from fedmaestro.data.translation import load_translation
from fedmaestro.errors import UserError, check_name
from fedmaestro.tasks.images import image_task
from fedmaestro.tasks.task import Task
from fedmaestro.tasks.translation import translation_task

TRANSLATION = "multi30k"

Progress = Callable[[int, int], None]


def open_task(config: TrainingConfig, progress: Progress | None = None) -> Task:
    """Load the data of ``config`` and return its task.

    Raises:
        UserError: an unknown dataset, missing files, settings that the data does not allow.
    """
    data = config.data
    check_name("data.name", data.name, [*DATASETS, TRANSLATION])
    folder = data_folder(data.dir)
    if data.name == TRANSLATION:
        for key, value in (("data.validation", data.validation), ("data.augment", data.augment)):
            if value not in (0, "none"):
                raise UserError(f"{key}={value!r}: {TRANSLATION} has a validation split of its own and no augmentation")
        pairs = load_translation(folder, min_count=data.min_count)
        return translation_task(pairs, train=_split(config, len(pairs.train))[0], test_limit=data.test_limit)
    images = load_dataset(data.name, folder, progress=progress)
    train, held_out = _split(config, len(images.train_labels))
    return image_task(
        images,
        train=train,
        held_out=held_out if len(held_out) else None,
        test_limit=data.test_limit,
        crop_flip=data.augment == "crop-flip",
    )


def _split(config: TrainingConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out; the latter depend on the seed only."""
    held, limit = config.data.validation, config.data.limit
    if held >= count:
        raise UserError(f"data.validation={held} leaves nothing of {count} training examples: lower it")
    order = rng.generator(config.seed, "split").permutation(count)
    rest = order[held:]
    if limit is not None and limit > len(rest):
        raise UserError(f"data.limit={limit} is more than the {len(rest)} training examples: lower it, or say all")
    return np.sort(rest[:limit]), np.sort(order[:held])
