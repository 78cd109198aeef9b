"""The examples of a classification task: splits, augmentation, calibration."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmaestro.config.base import read
from fedmaestro.errors import UserError
from fedmaestro.tasks.opening import open_task
from fedmaestro.tasks.task import Task
from fedmaestro.training import TrainingConfig


def examples(task: Task, split: str) -> Counter[bytes]:
    """The multiset of examples of a split (``train``, ``validation``, ``test``)."""
    batches = [task.plain(np.arange(task.examples))] if split == "train" else task.split(split)  # type: ignore[arg-type]
    return Counter(
        image.numpy().tobytes() + bytes([int(label)])
        for batch in batches
        for image, label in zip(batch.inputs[0], batch.targets, strict=True)
    )


def task_of(**data: Any) -> Task:
    flat = {f"data.{key}": value for key, value in data.items() if key != "seed"}
    return open_task(read(TrainingConfig, None, {**flat, "seed": data.get("seed", 0)}))


def test_training_and_validation_examples_are_disjoint() -> None:
    everything = examples(task_of(), "train")
    assert everything.total() == 1437
    split = task_of(validation=300)
    assert (split.examples, split.has_validation) == (1137, True)
    assert examples(split, "train") + examples(split, "validation") == everything
    assert examples(split, "test") == examples(task_of(), "test")
    limited = task_of(validation=300, limit=200)
    assert examples(limited, "validation") == examples(split, "validation")
    assert examples(limited, "train") <= examples(split, "train")
    assert examples(limited, "train").total() == limited.examples == 200
    assert examples(task_of(validation=300, seed=1), "validation") != examples(split, "validation")
    assert examples(task_of(limit=200, seed=1), "train") != examples(task_of(limit=200), "train")


def test_without_validation_the_test_set_is_scored() -> None:
    task = task_of()
    assert not task.has_validation
    assert examples(task, "validation") == examples(task, "test")


def test_crops_and_mirror_images_are_those_of_a_loop() -> None:
    plain, task = task_of(), task_of(augment="crop-flip")
    indices = np.array([5, 900, 3, 3, *range(60)])
    images = plain.plain(indices).inputs[0]
    batch = task.batch(indices, np.random.default_rng(11))
    generator = np.random.default_rng(11)
    top, left = (generator.integers(9, size=(len(indices), 1))[:, 0] for _ in range(2))
    mirrored = generator.random((len(indices), 1))[:, 0] < 0.5
    expected = torch.zeros_like(images)
    for i, image in enumerate(images):
        for y in range(8):
            for x in range(8):
                row, column = y + int(top[i]) - 4, (7 - x if mirrored[i] else x) + int(left[i]) - 4
                if 0 <= row < 8 and 0 <= column < 8:
                    expected[i, :, y, x] = image[:, row, column]
    assert batch.inputs[0].shape == images.shape == (64, 1, 8, 8)
    assert batch.inputs[0].equal(expected)
    assert batch.targets.equal(plain.plain(indices).targets)
    assert {len(np.unique(draw)) for draw in (top, left, mirrored)} == {9, 2}
    again = task.batch(indices, np.random.default_rng(11))
    assert again.inputs[0].equal(expected)
    assert not task.batch(indices, np.random.default_rng(12)).inputs[0].equal(expected)


def test_only_training_batches_are_augmented() -> None:
    plain, task = task_of(), task_of(augment="crop-flip")
    assert examples(task, "train") == examples(plain, "train")
    assert examples(task, "test") == examples(plain, "test")
    for ours, theirs in zip(task.calibration(0, 100), plain.calibration(0, 100), strict=True):
        assert ours.inputs[0].equal(theirs.inputs[0])


def test_calibration_takes_distinct_training_examples() -> None:
    task = task_of(limit=100)
    batches = task.calibration(3, 70, batch_size=32)
    assert [len(batch.targets) for batch in batches] == [32, 32, 6]
    assert sum(len(batch.targets) for batch in task.calibration(3, 2048)) == 100
    everything = Counter(
        image.numpy().tobytes() + bytes([int(label)])
        for batch in task.calibration(3, 2048)
        for image, label in zip(batch.inputs[0], batch.targets, strict=True)
    )
    assert everything == examples(task, "train")


@pytest.mark.slow
def test_translation_is_learnt_in_a_federation(data_dir: Path, federate: Callable[..., Any]) -> None:
    settings = {
        "data.name": "multi30k",
        "data.dir": str(data_dir),
        "data.partition": "iid",
        "data.devices": 290,
        "model.name": "transformer-small",
        "train.optimizer": "adam",
        "train.lr": 0.003,
        "train.rounds": 2,
        "fleet.preset": "phones",
        "train.local-epochs": 1,
        "train.batch-size": 25,
        "train.strategy": "nested",
    }
    summary, folder, _ = federate(settings)
    assert summary["failed"] == 0
    assert summary["metric"]["name"] == "perplexity"
    first, *_, last = folder.read_rounds()
    for tier in summary["tiers"]:
        assert list(last.tiers[tier]) == ["perplexity", "accuracy", "loss"]
        assert last.tiers[tier]["loss"] < 0.95 * first.tiers[tier]["loss"]  # type: ignore[operator]
    with pytest.raises(UserError, match="goes by classes, and the data have none"):
        federate({**settings, "data.partition": "dirichlet"})
