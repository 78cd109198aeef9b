"""Translation, sentence by sentence. Shapes: B pairs, S source and T target tokens."""

from collections.abc import Iterable

import numpy as np
import torch

from fedmaestro.data.translation import PAD, TranslationDataset, TranslationSplit
from fedmaestro.tasks.task import Batch, Split, Task

_SCORED_PAIRS = 100


def translation_task(dataset: TranslationDataset, *, train: np.ndarray, test_limit: int | None = None) -> Task:
    """Return the task of predicting each next English token from the German sentence and the tokens before it.

    Args:
        dataset: the sentences.
        train: indices of the training pairs to learn from.
        test_limit: score only this many pairs of a split, the first.
    """

    def pairs(split: TranslationSplit, indices: np.ndarray) -> Batch:
        """Cut the padding that no pair of the batch needs; PAD is the target that does not count."""
        source = split.source[indices, : int(split.source_lengths[indices].max())]
        target = torch.from_numpy(split.target[indices, : int(split.target_lengths[indices].max())].astype(np.int64))
        return Batch((torch.from_numpy(source.astype(np.int64)), target[:, :-1]), target[:, 1:])

    def scored(name: Split, first: int, last: int | None) -> Iterable[Batch]:
        split = dataset.val if name == "validation" else dataset.test
        by_length = np.argsort(split.source_lengths[:test_limit], kind="stable")[first:last]
        for start in range(0, len(by_length), _SCORED_PAIRS):
            yield pairs(split, by_length[start : start + _SCORED_PAIRS])

    return Task(
        name=dataset.name,
        input_shape=dataset.input_shape,
        num_classes=len(dataset.vocabulary),
        metric="perplexity",
        examples=len(train),
        batch=lambda indices, _generator: pairs(dataset.train, train[indices]),
        plain=lambda indices: pairs(dataset.train, train[indices]),
        scored=scored,
        test_examples=len(dataset.test.source_lengths[:test_limit]),
        has_validation=True,
        fingerprint=dataset.fingerprint,
        lengths=np.asarray(dataset.train.source_lengths[train]),
        ignore_index=PAD,
        facts={"vocabulary": list(dataset.vocabulary)},
    )
