"""Which device holds which training examples.

flwr-datasets draws the partitions, over an in-memory table of labels in a seeded random order: its IID
partitioner cuts without shuffling, and the others hand out the examples of a class in the order of the file.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmaestro.data import cache
from fedmaestro.data.load import ImageDataset
from fedmaestro.errors import UserError, check_name

Indices = npt.NDArray[np.int64]

PARTITIONS = {
    "iid": "equal random shares: sizes differ by one at most",
    "dirichlet": "each class is split by a Dirichlet(alpha) draw: a small alpha makes devices unlike",
    "pathological": "each device holds examples of exactly classes-per-device classes",
}

_FORMAT = 1  # part of the cache key: raise it when the same arguments give other partitions


def partition(
    labels: Indices,
    *,
    scheme: str,
    num_devices: int,
    seed: int,
    alpha: float = 0.5,
    classes_per_device: int = 2,
    min_examples: int = 1,
) -> tuple[Indices, ...]:
    """Deal every example to exactly one device; the result depends on the arguments only.

    "pathological" gives device i class i mod C first and draws the others ("first-deterministic" of
    flwr-datasets, Li et al., arXiv 2102.02079), with the classes and the devices renamed at random so that a
    device's number tells nothing about its classes. Plain random assignment can leave a class to nobody. With
    fewer devices than classes, device i takes the classes i … i + classes_per_device - 1; it is an error
    where such windows do not reach every class.

    Args:
        labels: (N,) classes of the examples.
        scheme: a key of `PARTITIONS`.
        num_devices: number of parts, at most N.
        seed: non-negative.
        alpha: concentration of "dirichlet", > 0.
        classes_per_device: of "pathological", 1 to the number of classes.
        min_examples: every device has as many; "dirichlet" draws again up to 10 times to reach it.

    Returns:
        One sorted index array per device, disjoint, together 0 … N - 1.

    Raises:
        UserError: an argument is out of range, or no such partition was found.

    """
    _check(labels, scheme, num_devices, seed, alpha, classes_per_device, min_examples)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each repeated draw warns; the last one is our error
        if scheme == "iid":
            parts = _iid(order, num_devices)
        elif scheme == "dirichlet":
            parts = _dirichlet(labels, order, num_devices, seed, alpha, min_examples)
        else:
            parts = _pathological(labels, order, num_devices, seed, classes_per_device, rng)
    smallest = min(len(part) for part in parts)
    if smallest < min_examples:
        raise UserError(
            f"data.min-examples = {min_examples}: a device of the {scheme!r} partition got {smallest}: "
            f"lower data.min-examples or data.devices (now {num_devices})"
        )
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    return tuple(np.sort(part) for part in parts)


def _check(
    labels: Indices,
    scheme: str,
    num_devices: int,
    seed: int,
    alpha: float,
    classes_per_device: int,
    min_examples: int,
) -> None:
    check_name("partition", scheme, PARTITIONS)
    for setting, value, lowest in (
        ("data.devices", num_devices, 1),
        ("data.min-examples", min_examples, 1),
        ("data.classes-per-device", classes_per_device, 1),
        ("seed", seed, 0),
    ):
        if value < lowest:
            raise UserError(f"{setting} = {value}: must be at least {lowest}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UserError(f"data.alpha = {alpha}: must be a positive number")
    if num_devices > len(labels):
        raise UserError(f"data.devices = {num_devices}: more than the {len(labels)} training examples")
    if num_devices * min_examples > len(labels):
        raise UserError(
            f"data.min-examples = {min_examples}: {num_devices} devices (data.devices) would need "
            f"{num_devices * min_examples} of the {len(labels)} training examples"
        )


def _iid(order: Indices, num_devices: int) -> list[Indices]:
    from flwr_datasets.partitioner import IidPartitioner

    return _parts(IidPartitioner(num_partitions=num_devices), {"index": order})


def _dirichlet(
    labels: Indices, order: Indices, num_devices: int, seed: int, alpha: float, min_examples: int
) -> list[Indices]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=num_devices,
        partition_by="label",
        alpha=float(alpha),
        min_partition_size=min_examples,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    try:
        return _parts(partitioner, {"index": order, "label": labels[order]})
    except ValueError as error:  # also numpy's, for an alpha that its generator cannot draw from
        raise UserError(
            f"data.alpha = {alpha}: no draw gave each of {num_devices} devices at least {min_examples} "
            "examples: raise data.alpha, or lower data.min-examples or data.devices"
        ) from error


def _pathological(
    labels: Indices,
    order: Indices,
    num_devices: int,
    seed: int,
    classes_per_device: int,
    rng: np.random.Generator,
) -> list[Indices]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    classes, compact = np.unique(labels, return_inverse=True)
    _check_classes(len(classes), num_devices, classes_per_device)
    partitioner = PathologicalPartitioner(
        num_partitions=num_devices,
        partition_by="label",
        num_classes_per_partition=classes_per_device,
        class_assignment_mode="first-deterministic" if num_devices >= len(classes) else "deterministic",
        shuffle=False,
        seed=seed,
    )
    renamed = rng.permutation(len(classes))[compact]
    try:
        parts = _parts(partitioner, {"index": order, "label": renamed[order]})
    except ValueError as error:  # a class has fewer examples than devices that should share it
        raise UserError(
            f"data.classes-per-device = {classes_per_device}: a class has too few examples for its share of "
            f"{num_devices} devices: lower data.classes-per-device or data.devices"
        ) from error
    return [parts[device] for device in rng.permutation(num_devices)]


def _check_classes(num_classes: int, num_devices: int, classes_per_device: int) -> None:
    if classes_per_device > num_classes:
        raise UserError(f"data.classes-per-device = {classes_per_device}: the data has {num_classes} classes")
    missing = num_classes - (num_devices + classes_per_device - 1)
    if missing > 0:
        raise UserError(
            f"data.devices = {num_devices}: with data.classes-per-device = {classes_per_device} they "
            f"leave out {missing} of {num_classes} classes: raise data.devices to {num_devices + missing} or "
            f"data.classes-per-device to {classes_per_device + missing}"
        )


def _parts(partitioner: Any, columns: dict[str, Indices]) -> list[Indices]:
    """Return the "index" column of each partition of the table ``columns``."""
    import datasets

    # No numpy format here: the partitioners turn the labels into an array row by row, which it makes slower.
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    loaded = (partitioner.load_partition(device) for device in range(partitioner.num_partitions))
    return [part.with_format("arrow")[:]["index"].to_numpy() for part in loaded]


def cached_partition(
    dataset: ImageDataset,
    *,
    scheme: str,
    num_devices: int,
    seed: int,
    alpha: float = 0.5,
    classes_per_device: int = 2,
    min_examples: int = 1,
    cache_dir: str | Path | None = None,
) -> tuple[Indices, ...]:
    """Return `partition` of the training labels, drawn once and then read from the cache.

    The cache's entry depends on ``dataset.fingerprint`` and all the arguments of `partition`.
    """
    arguments = {
        "scheme": scheme,
        "num_devices": num_devices,
        "seed": seed,
        "alpha": alpha,
        "classes_per_device": classes_per_device,
        "min_examples": min_examples,
    }
    name = f"{scheme}-{cache.key(_FORMAT, dataset.fingerprint, arguments)}"

    def build(folder: Path) -> None:
        parts = partition(dataset.train_labels, **arguments)  # type: ignore[arg-type]
        np.save(folder / "indices.npy", np.concatenate(parts))
        np.save(folder / "ends.npy", np.cumsum([len(part) for part in parts]))

    return cache.fetch(cache.cache_root(cache_dir) / "partitions" / name, build, _read)


def _read(folder: Path) -> tuple[Indices, ...]:
    return tuple(np.split(np.load(folder / "indices.npy"), np.load(folder / "ends.npy")[:-1]))


def class_counts(labels: Indices, parts: Sequence[Indices], num_classes: int) -> Indices:
    """Return (devices, classes): how many examples of each class each device holds."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def partition_fingerprint(parts: Sequence[Indices]) -> str:
    """Return the sha256 hex of the parts: equal for equal parts in the same order, on every platform."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()
