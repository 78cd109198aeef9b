"""From the name of a dataset to its task."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fedmaestro.config.training import TrainingConfig
from fedmaestro.data import DATASETS, TRANSLATION, DatasetRow, cache, data_folder, load_dataset, translation
from fedmaestro.data.files import KINDS as FILE_KINDS
from fedmaestro.data.files import file_row
from fedmaestro.data.holdout import hold_out
from fedmaestro.data.load import has_files
from fedmaestro.data.own import OwnRow, own_dataset
from fedmaestro.errors import UserError, check_name
from fedmaestro.runs.code import user_code
from fedmaestro.tasks.augment import augmented
from fedmaestro.tasks.goal import TASKS
from fedmaestro.tasks.images import image_task
from fedmaestro.tasks.metrics import metrics_of
from fedmaestro.tasks.own import own_task
from fedmaestro.tasks.task import Task
from fedmaestro.tasks.translation import translation_task

Progress = Callable[[int, int], None]

_KINDS = ", ".join(FILE_KINDS)

Choice = Callable[[int, np.ndarray | None], tuple[np.ndarray | None, np.ndarray | None]]
"""``(number of training examples, users of them) -> (indices to train on, indices held out)``; None: all, or none."""


def _all(count: int, users: np.ndarray | None) -> tuple[None, None]:  # noqa: ARG001
    return None, None


def held_out_by(amount: float, seed: int, *, users_stay: bool) -> Choice:
    """Return what holds out ``amount`` of the training examples; with ``users_stay``, each user keeps one."""

    def choose(count: int, users: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        rest, held = hold_out(count, amount, seed, users if users_stay else None)
        return np.sort(rest), held

    return choose if amount else _all


def open_data(
    name: str,
    folder: str,
    *,
    progress: Progress | None = None,
    data_fingerprint: str = "",
    augment: str = "none",
    normalize: Literal["dataset", "unit"] = "dataset",
    min_count: int = 3,
    test_limit: int | None = None,
    choose: Choice = _all,
    spares_test: bool = False,
    file: str = "",
    columns: str = "",
) -> Task:
    """Load a dataset and return its task.

    Args:
        name: a key of ``DATASETS``.
        folder: of local files; empty: the hub.
        progress: is told (done, total) while images are decoded for the first time.
        data_fingerprint: of the data that another process has; the cache is searched for them where this machine has
            no files, and before a dataset of the user's is made anew.
        augment: ``data.augment``.
        normalize: ``data.normalize``.
        min_count: tokens of a translation that are rarer in the training sentences become unknown.
        test_limit: score only this many test examples, the first.
        choose: which training examples to use.
        spares_test: whether the examples that it holds out take the test set's place.
        file: ``data.file``.
        columns: ``data.columns``.

    Raises:
        UserError: an unknown dataset, missing files, settings that the data do not allow.
    """
    check_name("data.name", name, DATASETS)
    row = DATASETS[name]
    picked: dict[str, Any] = {"test_limit": test_limit, "spares_test": spares_test}
    if name in FILE_KINDS:
        row = file_row(name, file, columns)
    elif file or columns:
        raise UserError(f"data.{'file' if file else 'columns'}: dataset {name!r} reads no files: it is for {_KINDS}")
    if normalize != "dataset" and (isinstance(row, OwnRow) or name == TRANSLATION):
        raise UserError(
            f"data.normalize={normalize!r}: dataset {name!r} is none of the built-in sets of images: leave it out"
        )
    if isinstance(row, OwnRow):
        with user_code(f"dataset {name!r}"):
            own = own_dataset(row, data_fingerprint)
        train, held_out = choose(len(own.train.targets), own.train.groups)
        return augmented(own_task(own, train=train, held_out=held_out, **picked), augment)
    if name == TRANSLATION:
        pairs = translation.load_translation(folder, min_count=min_count, fingerprint=data_fingerprint)
        train, held_out = choose(len(pairs.train), None)
        return augmented(translation_task(pairs, train=train, held_out=held_out, **picked), augment)
    images = load_dataset(name, folder, progress=progress, fingerprint=data_fingerprint)
    train, held_out = choose(len(images.train_labels), None)
    return augmented(image_task(images, train=train, held_out=held_out, unit=normalize == "unit", **picked), augment)


def is_here(name: str, folder: str, data_fingerprint: str) -> bool:
    """Return whether ``open_data`` finds data on this machine: their files, or an entry of the cache with the content.

    Args:
        name: a key of ``DATASETS`` here or, of a dataset of the user's, elsewhere.
        folder: of local files.
        data_fingerprint: of the data that another process has.
    """
    row = DATASETS.get(name)
    if name == TRANSLATION:
        by_path = translation.has_files(folder)
    else:
        by_path = isinstance(row, DatasetRow) and name not in FILE_KINDS and has_files(row, folder)
    return by_path or cache.find(data_fingerprint, lambda entry: entry) is not None


def as_asked(task: Task, goal: str | None, metrics: str | None) -> Task:
    """Return the task with the goal and the metrics that an experiment names (None: the data's own).

    Raises:
        UserError: an unknown name, or a goal for other targets.
    """
    if goal is not None:
        check_name("data.task", goal, TASKS)
        row = TASKS[goal]
        if row.targets != task.goal.targets:
            raise UserError(
                f"data.task={goal!r} learns {row.targets}, and the targets of dataset {task.name!r} are "
                f"{task.goal.targets}"
            )
        task = replace(task, goal=row, metrics=metrics_of(row))
    return task if metrics is None else replace(task, metrics=metrics_of(task.goal, metrics))


def open_task(config: TrainingConfig, progress: Progress | None = None) -> Task:
    """Load the data of ``config`` and return its task; ``open_data`` says the errors."""
    data = config.data
    if data.name == TRANSLATION and data.validation:
        raise UserError(f"data.validation={data.validation}: {TRANSLATION} has a validation split of its own")

    def choose(count: int, users: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:  # noqa: ARG001
        train, held_out = _split(config, count)
        return train, held_out if len(held_out) else None

    task = open_data(
        data.name,
        data_folder(data.dir),
        progress=progress,
        augment=data.augment,
        normalize=data.normalize,
        min_count=data.min_count,
        test_limit=data.test_limit,
        choose=choose,
        file=data.file,
        columns=data.columns,
    )
    return as_asked(task, data.task, data.metrics)


def _split(config: TrainingConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out; the latter depend on the seed only."""
    limit = config.data.limit
    rest, held = hold_out(count, config.data.validation, config.seed)
    if limit is not None and limit > len(rest):
        raise UserError(f"data.limit={limit} is more than the {len(rest)} training examples: lower it, or say all")
    return np.sort(rest[:limit]), held
