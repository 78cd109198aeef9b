"""The task of data that a user brought. Shapes as in ``data.own``."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fedmaestro.data.own import Examples, OwnDataset
from fedmaestro.errors import check_name
from fedmaestro.models.shape import Input
from fedmaestro.tasks.goal import NO_INDEX, TASKS, Goal
from fedmaestro.tasks.metrics import metrics_of
from fedmaestro.tasks.task import Batch, Split, Task

SCORED_BATCH = 500


def own_task(
    dataset: OwnDataset,
    *,
    train: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    spares_test: bool = False,
    test_limit: int | None = None,
) -> Task:
    """Return the task of a dataset.

    Args:
        dataset: the data.
        train: indices of the training examples to learn from; None: all.
        held_out: indices of those that the validation split consists of; None: there is none.
        spares_test: whether they take the test set's place too, which nothing reads then.
        test_limit: score only this many test examples, the first.
    """
    check_name(f"task of dataset {dataset.name!r}", dataset.task, TASKS)
    goal = TASKS[dataset.task]
    chosen = np.arange(len(dataset.train.targets)) if train is None else train
    validation = None if held_out is None else (dataset.train, held_out)
    test = dataset.test, np.arange(len(dataset.test.targets))[:test_limit]
    if spares_test and validation is not None:
        test = validation
    scored_on, tested = test

    def make(examples: Examples, indices: np.ndarray) -> Batch:
        inputs = tuple(_tensor(dataset, i, x[indices]) for i, x in enumerate(examples.inputs))
        return Batch(inputs, _targets(dataset, goal, examples.targets[indices]))

    def plain(indices: np.ndarray) -> Batch:
        return make(dataset.train, chosen[indices])

    def scored(split: Split, first: int, last: int | None) -> Iterable[Batch]:
        examples, rows = validation if split == "validation" and validation is not None else test
        rows = rows[first:last]
        for start in range(0, len(rows), SCORED_BATCH):
            yield make(examples, rows[start : start + SCORED_BATCH])

    labels, groups = dataset.train.targets, dataset.train.groups
    facts: dict[str, object] = {"goal": dataset.task}
    facts |= {"classes": list(dataset.classes)} if dataset.classes else {}
    return Task(
        name=dataset.name,
        inputs=tuple(Input(x.shape[1:], "int64" if x.dtype == np.int64 else "float32") for x in dataset.train.inputs),
        num_classes=dataset.outputs,
        goal=goal,
        metrics=metrics_of(goal),
        examples=len(chosen),
        batch=lambda indices, _generator: plain(indices),
        plain=plain,
        scored=scored,
        test_examples=len(tested),
        tested=lambda indices: make(scored_on, tested[indices]),
        labels=np.asarray(labels[chosen]) if labels.ndim == 1 and goal.targets == "classes" else None,
        groups=None if groups is None else np.asarray(groups[chosen]),
        test_groups=None if scored_on.groups is None else np.asarray(scored_on.groups[tested]),
        users=dataset.users,
        has_validation=held_out is not None,
        padding=dataset.padding,
        fingerprint=dataset.fingerprint,
        facts=facts,
    )


def _tensor(dataset: OwnDataset, index: int, x: np.ndarray) -> Tensor:
    if x.dtype == np.int64:
        return torch.from_numpy(np.ascontiguousarray(x))
    # A copy, which read-only memory maps need before torch may share their memory.
    numbers = torch.from_numpy(x.astype(np.float32))
    if x.dtype == np.uint8:
        numbers.div_(255)
    if x.dtype == np.uint8 or dataset.standardized:
        mean, std = (torch.from_numpy(np.array(a[index])) for a in (dataset.mean, dataset.std))
        numbers.sub_(mean).div_(std)
    return numbers.contiguous(memory_format=torch.channels_last) if numbers.dim() == 4 else numbers


def _targets(dataset: OwnDataset, goal: Goal, targets: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(targets))
    if goal.targets == "tokens" and dataset.padding is not None:
        tensor = tensor.masked_fill(tensor == dataset.padding, NO_INDEX)
    return tensor
