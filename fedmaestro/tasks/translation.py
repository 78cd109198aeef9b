"""Translation, sentence by sentence. Shapes: B pairs, S source and T target tokens."""

from collections.abc import Iterable

import numpy as np
import torch

from fedmaestro.data.translation import PAD, TranslationDataset, TranslationSplit
from fedmaestro.models.shape import inputs_of
from fedmaestro.tasks.goal import SEQUENCE_TO_SEQUENCE, cross_entropy
from fedmaestro.tasks.metrics import metrics_of
from fedmaestro.tasks.task import Batch, Split, Task

_SCORED_PAIRS = 100


def translation_task(
    dataset: TranslationDataset,
    *,
    train: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    spares_test: bool = False,
    test_limit: int | None = None,
) -> Task:
    """Return the task of predicting each next English token from the German sentence and the tokens before it.

    Args:
        dataset: the sentences.
        train: indices of the training pairs to learn from; None: all.
        held_out: indices of those that the validation split consists of; None: it has one of its own.
        spares_test: whether the validation split takes the test set's place too, which nothing reads then.
        test_limit: score only this many pairs of a split, the first.
    """
    chosen = np.arange(len(dataset.train)) if train is None else train
    validation = (dataset.val, np.arange(len(dataset.val))) if held_out is None else (dataset.train, held_out)
    test = dataset.test, np.arange(len(dataset.test))
    if spares_test and held_out is not None:
        test = validation

    def pairs(split: TranslationSplit, indices: np.ndarray) -> Batch:
        """Cut the padding that no pair of the batch needs; PAD is the target that does not count."""
        source = split.source[indices, : int(split.source_lengths[indices].max())]
        target = torch.from_numpy(split.target[indices, : int(split.target_lengths[indices].max())].astype(np.int64))
        return Batch((torch.from_numpy(source.astype(np.int64)), target[:, :-1]), target[:, 1:])

    def scored(name: Split, first: int, last: int | None) -> Iterable[Batch]:
        split, rows = validation if name == "validation" else test
        rows = rows[:test_limit]
        by_length = rows[np.argsort(split.source_lengths[rows], kind="stable")][first:last]
        for start in range(0, len(by_length), _SCORED_PAIRS):
            yield pairs(split, by_length[start : start + _SCORED_PAIRS])

    goal = cross_entropy(
        SEQUENCE_TO_SEQUENCE.name, "tokens", SEQUENCE_TO_SEQUENCE.metrics, SEQUENCE_TO_SEQUENCE.summary, PAD
    )
    return Task(
        name=dataset.name,
        inputs=inputs_of(dataset.input_shape),
        num_classes=len(dataset.vocabulary),
        goal=goal,
        metrics=metrics_of(goal),
        examples=len(chosen),
        batch=lambda indices, _generator: pairs(dataset.train, chosen[indices]),
        plain=lambda indices: pairs(dataset.train, chosen[indices]),
        scored=scored,
        test_examples=len(test[1][:test_limit]),
        tested=lambda indices: pairs(test[0], test[1][indices]),
        has_validation=True,
        fingerprint=dataset.fingerprint,
        lengths=np.asarray(dataset.train.source_lengths[chosen]),
        padding=PAD,
        facts={"vocabulary": list(dataset.vocabulary)},
    )
