"""Which device holds which training examples.

Schemes that go by labels take the examples in a seeded random order: flwr-datasets' partitioners, which deal IID and
pathological shares, cut without shuffling. Dirichlet shares are drawn here, to the same result as flwr-datasets' (same
generator, same draws), in a fraction of its time: it took 103 s to find that 10,000 devices are too many.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmaestro import rng
from fedmaestro.data import cache
from fedmaestro.errors import UserError, check_name

Indices = npt.NDArray[np.int64]

_FORMAT = 1  # part of the cache key: raise it when the same arguments give other partitions
_DRAWS = 11  # of a Dirichlet partition, until every device has enough


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """What a partition may look at.

    Attributes:
        count: ``N`` training examples.
        labels: ``(N,)`` classes; None: the task has none.
        groups: ``(N,)`` users from 0 on; None: the data name none.
        devices: how many there are.
        seed: the experiment's.
        alpha: ``data.alpha``.
        classes_per_device: ``data.classes-per-device``.
        min_examples: ``data.min-examples``.
    """

    count: int
    labels: Indices | None
    groups: Indices | None
    devices: int
    seed: int
    alpha: float = 0.5
    classes_per_device: int = 2
    min_examples: int = 1

    @property
    def classes(self) -> Indices:
        """The labels, of a partition that needs them."""
        assert self.labels is not None
        return self.labels

    def order(self) -> tuple[Indices, np.random.Generator]:
        """Return a random order of the examples, and the generator that drew it."""
        generator = np.random.default_rng(self.seed)
        return generator.permutation(self.count), generator


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One row of ``PARTITIONS``."""

    name: str
    deal: Callable[..., Sequence[Any]]
    """``(dealing) -> indices of each device``; of user code: ``(examples, devices, generator)``."""
    summary: str
    needs: str = ""
    """``labels`` or ``groups``; empty: neither."""
    built_in: bool = False


def partition(
    labels: Indices | None,
    *,
    scheme: str,
    num_devices: int,
    seed: int,
    alpha: float = 0.5,
    classes_per_device: int = 2,
    min_examples: int = 1,
    groups: Indices | None = None,
    count: int | None = None,
) -> tuple[Indices, ...]:
    """Deal the examples to devices, each to one at most; the result depends on the arguments only.

    "pathological" gives device i class i mod C first and draws the others ("first-deterministic" of
    flwr-datasets, Li et al., arXiv 2102.02079), with the classes and the devices renamed at random so that a
    device's number tells nothing about its classes. Plain random assignment can leave a class to nobody. With
    fewer devices than classes, device i takes the classes i … i + classes_per_device - 1; it is an error
    where such windows do not reach every class.

    Args:
        labels: (N,) classes of the examples; None: they have none.
        scheme: a key of `PARTITIONS`.
        num_devices: number of parts, at most N.
        seed: non-negative.
        alpha: concentration of "dirichlet" and "quantity", > 0.
        classes_per_device: of "pathological", 1 to the number of classes.
        min_examples: every device has as many; "dirichlet" draws again up to 10 times to reach it.
        groups: (N,) users of the examples, for "natural".
        count: N, where there are neither labels nor groups.

    Returns:
        One sorted index array per device, disjoint; of the built-in schemes, together 0 … N - 1.

    Raises:
        UserError: an argument is out of range, or no such partition was found.

    """
    known = labels if labels is not None else groups
    dealing = Dealing(
        count=len(known) if known is not None else count or 0,
        labels=labels,
        groups=groups,
        devices=num_devices,
        seed=seed,
        alpha=alpha,
        classes_per_device=classes_per_device,
        min_examples=min_examples,
    )
    _check(dealing, scheme)
    row = PARTITIONS[scheme]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each repeated draw warns; the last one is our error
        if row.built_in:
            parts = [np.sort(np.asarray(part, np.int64)) for part in row.deal(dealing)]
        else:
            parts = _checked(row, row.deal(dealing, num_devices, rng.generator(seed, "partition")), dealing)
    smallest = min(len(part) for part in parts)
    if smallest < min_examples:
        raise UserError(
            f"data.min-examples = {min_examples}: a device of the {scheme!r} partition got {smallest}: "
            f"lower data.min-examples or data.devices (now {num_devices})"
        )
    if row.built_in:
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(dealing.count))
    return tuple(parts)


def _checked(row: Partition, returned: Any, dealing: Dealing) -> list[Indices]:
    """Return what user code has dealt, sorted; UserError unless it is a partition."""
    where = f"data.partition = {row.name!r}"
    try:
        parts = [np.sort(np.asarray(part).astype(np.int64, casting="same_kind")) for part in returned]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} must return an array of indices for each device: {error}") from None
    if len(parts) != dealing.devices:
        raise UserError(f"{where} returned {len(parts)} parts for {dealing.devices} devices (data.devices)")
    dealt = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(dealt) and (dealt.min() < 0 or dealt.max() >= dealing.count):
        raise UserError(f"{where} returned indices outside of 0 … {dealing.count - 1}")
    if len(np.unique(dealt)) < len(dealt):
        raise UserError(f"{where} gives an example to more than one device, or twice to one")
    return parts


def _check(dealing: Dealing, scheme: str) -> None:
    check_name("partition", scheme, PARTITIONS)
    row = PARTITIONS[scheme]
    for setting, value, lowest in (
        ("data.devices", dealing.devices, 1),
        ("data.min-examples", dealing.min_examples, 0),
        ("data.classes-per-device", dealing.classes_per_device, 1),
        ("seed", dealing.seed, 0),
    ):
        if value < lowest:
            raise UserError(f"{setting} = {value}: must be at least {lowest}")
    if not (dealing.alpha > 0 and math.isfinite(dealing.alpha)):
        raise UserError(f"data.alpha = {dealing.alpha}: must be a positive number")
    if row.needs == "labels" and dealing.labels is None:
        raise UserError(
            f"data.partition = {scheme!r} goes by classes, and the data have none: use iid, quantity or natural"
        )
    if row.needs == "groups" and dealing.groups is None:
        raise UserError(
            f"data.partition = {scheme!r} goes by users, and the data name none: return groups from the dataset's "
            "function, or use another partition"
        )
    if dealing.devices > dealing.count and (dealing.min_examples or scheme == "natural"):
        raise UserError(f"data.devices = {dealing.devices}: more than the {dealing.count} training examples")
    if dealing.devices * dealing.min_examples > dealing.count:
        raise UserError(
            f"data.min-examples = {dealing.min_examples}: {dealing.devices} devices (data.devices) would need "
            f"{dealing.devices * dealing.min_examples} of the {dealing.count} training examples"
        )


def _iid(dealing: Dealing) -> list[Indices]:
    from flwr_datasets.partitioner import IidPartitioner

    order, _ = dealing.order()
    if dealing.devices > dealing.count:
        return np.array_split(order, dealing.devices)
    return _parts(IidPartitioner(num_partitions=dealing.devices), {"index": order})


def _dirichlet(dealing: Dealing) -> list[Indices]:
    """Split each class by shares from ``Dirichlet(α, …, α)`` (Yurochkin et al., ICML 2019; Hsu et al., 2019)."""
    order, _ = dealing.order()
    labels = dealing.classes[order]
    members = [order[labels == value] for value in np.unique(labels)]
    generator = np.random.default_rng(dealing.seed)
    for _ in range(_DRAWS):
        shares = _shares(generator, dealing, len(members))
        ends = np.stack([(np.cumsum(row) * len(of)).astype(int)[:-1] for row, of in zip(shares, members, strict=True)])
        # Sizes first: most draws that fail would only be dealt to be thrown away.
        counts = np.diff(ends, axis=1, prepend=0, append=np.array([[len(of)] for of in members]))
        if counts.sum(axis=0).min() >= dealing.min_examples:
            pieces = [np.split(of, at) for of, at in zip(members, ends, strict=True)]
            return [np.concatenate([piece[device] for piece in pieces]) for device in range(dealing.devices)]
    raise _no_draw(dealing)


def _shares(generator: np.random.Generator, dealing: Dealing, rows: int) -> list[npt.NDArray[np.float64]]:
    try:
        shares = [generator.dirichlet(np.full(dealing.devices, float(dealing.alpha))) for _ in range(rows)]
    except ValueError:  # an alpha that numpy's generator cannot draw from
        raise _no_draw(dealing) from None
    if not all(np.isfinite(row).all() for row in shares):
        raise _no_draw(dealing)
    return shares


def _no_draw(dealing: Dealing) -> UserError:
    return UserError(
        f"data.alpha = {dealing.alpha}: no draw gave each of {dealing.devices} devices at least {dealing.min_examples} "
        "examples: raise data.alpha, or lower data.min-examples (0: devices without examples, which never train) or "
        "data.devices"
    )


def _balanced(dealing: Dealing) -> list[Indices]:
    """Give every device the same number of examples, of classes at shares that it draws from ``Dirichlet(α · p)``.

    ``p`` are the classes' shares of all examples. Where a class is used up, the device's other classes take its place
    (as in the release of FedDyn, Acar et al., ICLR 2021).
    """
    order, _ = dealing.order()
    labels = dealing.classes[order]
    values, compact = np.unique(labels, return_inverse=True)
    generator = rng.generator(dealing.seed, "balanced")
    left = [list(order[compact == c]) for c in range(len(values))]
    prior = np.array([len(of) for of in left]) / dealing.count
    base, more = divmod(dealing.count, dealing.devices)
    quota = np.full(dealing.devices, base) + (np.arange(dealing.devices) < more)
    with np.errstate(all="ignore"):
        shares = generator.dirichlet(np.maximum(dealing.alpha * len(values) * prior, 1e-12), dealing.devices)
    parts: list[list[int]] = [[] for _ in range(dealing.devices)]
    for device in generator.permutation(np.repeat(np.arange(dealing.devices), quota)):
        there = np.array([len(of) > 0 for of in left])
        weights = np.where(there, shares[device], 0.0)
        if not (np.isfinite(weights).all() and weights.sum() > 0):
            weights = there * prior
        ends = np.cumsum(weights)
        drawn = int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))
        parts[device].append(left[min(drawn, int(np.nonzero(there)[0][-1]))].pop())
    return [np.array(part, np.int64) for part in parts]


def _quantity(dealing: Dealing) -> list[Indices]:
    """Deal shares of ``Dirichlet(α, …, α)`` of all examples, whatever their class (Li et al., arXiv 2102.02079)."""
    order, _ = dealing.order()
    generator = rng.generator(dealing.seed, "quantity")
    free = dealing.count - dealing.devices * dealing.min_examples
    [shares] = _shares(generator, dealing, 1)
    ends = np.round(np.cumsum(shares) * free).astype(int)[:-1] + dealing.min_examples * np.arange(1, dealing.devices)
    return np.split(order, ends)


def _natural(dealing: Dealing) -> list[Indices]:
    """Make every user a device; with fewer devices than users, each gets as many whole users, drawn by the seed."""
    assert dealing.groups is not None
    users = np.unique(dealing.groups)
    if dealing.devices > len(users):
        raise UserError(
            f"data.devices = {dealing.devices}: the data have {len(users)} users: lower it, or leave it out"
        )
    if dealing.devices == len(users):
        return [np.nonzero(dealing.groups == user)[0] for user in users]
    drawn = rng.generator(dealing.seed, "users").permutation(users)
    return [np.nonzero(np.isin(dealing.groups, some))[0] for some in np.array_split(drawn, dealing.devices)]


def _pathological(dealing: Dealing) -> list[Indices]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    order, generator = dealing.order()
    num_devices, per_device = dealing.devices, dealing.classes_per_device
    classes, compact = np.unique(dealing.classes, return_inverse=True)
    _check_classes(len(classes), num_devices, per_device)
    partitioner = PathologicalPartitioner(
        num_partitions=num_devices,
        partition_by="label",
        num_classes_per_partition=per_device,
        class_assignment_mode="first-deterministic" if num_devices >= len(classes) else "deterministic",
        shuffle=False,
        seed=dealing.seed,
    )
    renamed = generator.permutation(len(classes))[compact]
    try:
        parts = _parts(partitioner, {"index": order, "label": renamed[order]})
    except ValueError as error:  # a class has fewer examples than devices that should share it
        raise UserError(
            f"data.classes-per-device = {per_device}: a class has too few examples for its share of "
            f"{num_devices} devices: lower data.classes-per-device or data.devices"
        ) from error
    return [parts[device] for device in generator.permutation(num_devices)]


PARTITIONS: dict[str, Partition] = {
    row.name: row
    for row in (
        Partition(name="iid", deal=_iid, summary="equal random shares: sizes differ by one at most", built_in=True),
        Partition(
            name="dirichlet",
            deal=_dirichlet,
            summary="each class is split by a Dirichlet(alpha) draw: a small alpha makes devices unlike",
            needs="labels",
            built_in=True,
        ),
        Partition(
            name="dirichlet-balanced",
            deal=_balanced,
            summary="as many examples for every device, of classes at shares that it draws from Dirichlet(alpha)",
            needs="labels",
            built_in=True,
        ),
        Partition(
            name="pathological",
            deal=_pathological,
            summary="each device holds examples of exactly classes-per-device classes",
            needs="labels",
            built_in=True,
        ),
        Partition(
            name="quantity",
            deal=_quantity,
            summary="shares of unequal size from a Dirichlet(alpha) draw, whatever the classes",
            built_in=True,
        ),
        Partition(
            name="natural",
            deal=_natural,
            summary="each user of the data is a device (with fewer devices, as many users each)",
            needs="groups",
            built_in=True,
        ),
    )
}
"""How examples can be spread over devices."""


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
    fingerprint: str,
    labels: Indices | None,
    *,
    groups: Indices | None = None,
    count: int | None = None,
    **arguments: Any,
) -> tuple[Indices, ...]:
    """Return `partition`, drawn once and then read from the cache; that of user code is dealt anew.

    Args:
        fingerprint: of the data that the labels are of.
        labels: see `partition`, as for the rest.
        groups: see there.
        count: see there.
        arguments: see there.
    """
    scheme = str(arguments["scheme"])
    check_name("data.partition", scheme, PARTITIONS)
    if not PARTITIONS[scheme].built_in:
        return partition(labels, groups=groups, count=count, **arguments)
    name = f"{scheme}-{cache.key(_FORMAT, fingerprint, arguments)}"

    def build(folder: Path) -> None:
        parts = partition(labels, groups=groups, count=count, **arguments)
        np.save(folder / "indices.npy", np.concatenate(parts))
        np.save(folder / "ends.npy", np.cumsum([len(part) for part in parts]))

    return cache.fetch(cache.cache_root() / "partitions" / name, build, _read)


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
