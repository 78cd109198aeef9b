"""Which device holds which training examples.

Schemes that go by labels take the examples in a seeded random order: flwr-datasets' partitioner, which deals
pathological shares, cuts without shuffling. IID and Dirichlet shares are dealt here, to the same result as
flwr-datasets' (same generator, same draws), in a fraction of its time: it took 103 s to find that 10,000 devices are
too many.

With ``share_examples`` each device draws its own examples from all of them, so fleets can be larger than the data.
"""

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
from fedmaestro.data.parts import DealtParts, DrawnParts, Indices, Parts
from fedmaestro.errors import UserError, check_name

_FORMAT = 2  # part of the cache key: raise it when the same arguments give other partitions
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
        share_examples: ``data.share-examples``.
        self_balancing: ``data.self-balancing``.
    """

    count: int
    labels: Indices | None
    groups: Indices | None
    devices: int
    seed: int
    alpha: float = 0.5
    classes_per_device: int = 2
    min_examples: int = 1
    share_examples: int = 0
    self_balancing: bool = False

    @property
    def classes(self) -> Indices:
        """The labels, of a partition that needs them."""
        assert self.labels is not None
        return self.labels

    def order(self) -> tuple[Indices, np.random.Generator]:
        """Return a random order of the examples, and the generator that drew it."""
        generator = np.random.default_rng(self.seed)
        return generator.permutation(self.count), generator

    def members(self) -> list[Indices]:
        """Return the examples of every class."""
        values, counts = np.unique(self.classes, return_counts=True)
        return np.split(np.argsort(self.classes, kind="stable"), np.cumsum(counts)[:-1]) if len(values) else []


Draw = Callable[[np.random.Generator], Indices]
"""``generator of a device -> its examples``."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One row of ``PARTITIONS``."""

    name: str
    deal: Callable[..., Sequence[Any]]
    """``(dealing) -> indices of each device``; of user code: ``(examples, devices, generator)``."""
    draw: Callable[[Dealing], Draw] | None = None
    """How a device draws its own where devices share examples; None: they cannot."""
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
    share_examples: int = 0,
    self_balancing: bool = False,
    groups: Indices | None = None,
    count: int | None = None,
) -> Parts:
    """Deal the examples to devices, each to one at most; the result depends on the arguments only.

    "pathological" gives device i class i mod C first and draws the others ("first-deterministic" of
    flwr-datasets, Li et al., arXiv 2102.02079), with the classes and the devices renamed at random so that a
    device's number tells nothing about its classes. Plain random assignment can leave a class to nobody. With
    fewer devices than classes, device i takes the classes i … i + classes_per_device - 1; it is an error
    where such windows do not reach every class.

    Args:
        labels: (N,) classes of the examples; None: they have none.
        scheme: a key of `PARTITIONS`.
        num_devices: number of parts, at most N unless ``min_examples`` is 0 or examples are shared.
        seed: non-negative.
        alpha: concentration of "dirichlet" and "quantity", > 0.
        classes_per_device: of "pathological", 1 to the number of classes.
        min_examples: every device has as many; "dirichlet" draws again up to 10 times to reach it.
        share_examples: examples that each device draws from all, independently of the others; 0: none is shared.
            "dirichlet" then draws a device's classes from its own Dirichlet draw (Hsu et al., 2019, arXiv 1909.06335).
        self_balancing: for "dirichlet": devices with more than N / num_devices examples get none of further classes.
        groups: (N,) users of the examples, for "natural".
        count: N, where there are neither labels nor groups.

    Returns:
        One sorted index array per device; unless they are shared, disjoint, and of the built-in schemes together
        0 … N - 1.

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
        share_examples=share_examples,
        self_balancing=self_balancing,
    )
    _check(dealing, scheme)
    row = PARTITIONS[scheme]
    if share_examples:
        assert row.draw is not None
        about = f"{scheme} {alpha} {classes_per_device} {dealing.count}"
        return DrawnParts(num_devices, share_examples, row.draw(dealing), seed, about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each repeated draw warns; the last one is our error
        if row.built_in:
            dealt = row.deal(dealing)
            parts = dealt if isinstance(dealt, DealtParts) else DealtParts.of_lists(dealt)
        else:
            parts = _checked(row, row.deal(dealing, num_devices, rng.generator(seed, "partition")), dealing)
    smallest = int(parts.sizes.min())
    if smallest < min_examples:
        raise UserError(
            f"data.min-examples = {min_examples}: a device of the {scheme!r} partition got {smallest}: "
            f"lower data.min-examples or data.devices (now {num_devices})"
        )
    if row.built_in:
        assert np.array_equal(np.sort(parts.indices), np.arange(dealing.count))
    return parts


def _checked(row: Partition, returned: Any, dealing: Dealing) -> DealtParts:
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
    return DealtParts.of_lists(parts)


def _check(dealing: Dealing, scheme: str) -> None:
    check_name("partition", scheme, PARTITIONS)
    row = PARTITIONS[scheme]
    for setting, value, lowest in (
        ("data.devices", dealing.devices, 1),
        ("data.min-examples", dealing.min_examples, 0),
        ("data.share-examples", dealing.share_examples, 0),
        ("data.classes-per-device", dealing.classes_per_device, 1),
        ("seed", dealing.seed, 0),
    ):
        if value < lowest:
            raise UserError(f"{setting} = {value}: must be at least {lowest}")
    if not (dealing.alpha > 0 and math.isfinite(dealing.alpha)):
        raise UserError(f"data.alpha = {dealing.alpha}: must be a positive number")
    if dealing.self_balancing and (scheme != "dirichlet" or dealing.share_examples):
        raise UserError(
            "data.self-balancing = true: it is for data.partition = 'dirichlet' without data.share-examples: leave it "
            "out"
        )
    if row.needs == "labels" and dealing.labels is None:
        raise UserError(
            f"data.partition = {scheme!r} goes by classes, and the data have none: use iid, quantity or natural"
        )
    if row.needs == "groups" and dealing.groups is None:
        raise UserError(
            f"data.partition = {scheme!r} goes by users, and the data name none: return groups from the dataset's "
            "function, or use another partition"
        )
    if dealing.share_examples:
        _check_sharing(dealing, row)
        return
    if dealing.devices > dealing.count and (dealing.min_examples or scheme == "natural"):
        more = "" if scheme == "natural" else ": lower it, or let devices share examples with data.share-examples"
        raise UserError(f"data.devices = {dealing.devices}: more than the {dealing.count} training examples{more}")
    if dealing.devices * dealing.min_examples > dealing.count:
        raise UserError(
            f"data.min-examples = {dealing.min_examples}: {dealing.devices} devices (data.devices) would need "
            f"{dealing.devices * dealing.min_examples} of the {dealing.count} training examples"
        )


def _check_sharing(dealing: Dealing, row: Partition) -> None:
    size = dealing.share_examples
    if row.draw is None:
        able = ", ".join(name for name, other in PARTITIONS.items() if other.draw is not None)
        raise UserError(f"data.share-examples = {size}: devices of partition {row.name!r} share none: use {able}")
    if size > dealing.count:
        raise UserError(f"data.share-examples = {size}: more than the {dealing.count} training examples")
    if size < dealing.min_examples:
        raise UserError(f"data.share-examples = {size}: fewer than data.min-examples = {dealing.min_examples}")


def _runs(of: Indices, ends: npt.NDArray[np.integer], devices: int, owners: Indices) -> None:
    """Give the examples ``of`` to devices, a run to each: ``ends (devices - 1,)`` are where the runs end."""
    owners[of] = np.repeat(np.arange(devices), np.diff(ends, prepend=0, append=len(of)))


def _iid(dealing: Dealing) -> DealtParts:
    order, _ = dealing.order()
    owners = np.empty(dealing.count, np.int64)
    base, more = divmod(dealing.count, dealing.devices)
    _runs(order, np.cumsum(base + (np.arange(dealing.devices) < more))[:-1], dealing.devices, owners)
    return DealtParts.of_owners(owners, dealing.devices)


def _draw_iid(dealing: Dealing) -> Draw:
    return lambda generator: generator.choice(dealing.count, dealing.share_examples, replace=False)


def _draw_dirichlet(dealing: Dealing) -> Draw:
    """Draw each device's classes at shares from its own ``Dirichlet(α C p)``, with ``p`` the classes' shares of all."""
    members, size = dealing.members(), dealing.share_examples
    counts = np.array([len(of) for of in members])
    strengths = np.maximum(dealing.alpha * len(members) * counts / dealing.count, 1e-12)

    def draw(generator: np.random.Generator) -> Indices:
        with np.errstate(all="ignore"):
            shares = generator.dirichlet(strengths)
        if not np.isfinite(shares).all():
            shares = np.eye(len(members))[generator.integers(len(members))]
        wanted = np.minimum(generator.multinomial(size, shares), counts)
        drawn = np.concatenate(
            [generator.choice(of, n, replace=False) for of, n in zip(members, wanted, strict=True) if n]
        )
        if (lacking := size - len(drawn)) > 0:  # a class has fewer examples than the device would take of it
            others = np.setdiff1d(np.arange(dealing.count), drawn, assume_unique=True)
            drawn = np.concatenate([drawn, generator.choice(others, lacking, replace=False)])
        return drawn

    return draw


def _draw_pathological(dealing: Dealing) -> Draw:
    members, size, classes = dealing.members(), dealing.share_examples, dealing.classes_per_device
    if classes > len(members):
        raise UserError(f"data.classes-per-device = {classes}: the data has {len(members)} classes")
    base, more = divmod(size, classes)
    least = min(len(of) for of in members)
    if not base or base + (more > 0) > least:
        raise UserError(
            f"data.share-examples = {size}: that makes {base + (more > 0)} of each of {classes} classes "
            f"(data.classes-per-device), and it must be 1 to {least}"
        )

    def draw(generator: np.random.Generator) -> Indices:
        chosen = generator.choice(len(members), classes, replace=False)
        wanted = base + (np.arange(classes) < more)
        return np.concatenate(
            [generator.choice(members[c], n, replace=False) for c, n in zip(chosen, wanted, strict=True)]
        )

    return draw


def _dirichlet(dealing: Dealing) -> DealtParts:
    """Split each class by shares from ``Dirichlet(α, …, α)`` (Yurochkin et al., ICML 2019; Hsu et al., 2019)."""
    order, _ = dealing.order()
    labels = dealing.classes[order]
    members = [order[labels == value] for value in np.unique(labels)]
    generator = np.random.default_rng(dealing.seed)
    for _ in range(_DRAWS):
        shares = _shares(generator, dealing, len(members))
        if dealing.self_balancing:
            shares = _self_balanced(shares, members, dealing)
        ends = np.stack([(np.cumsum(row) * len(of)).astype(int)[:-1] for row, of in zip(shares, members, strict=True)])
        # Sizes first: most draws that fail would only be dealt to be thrown away.
        counts = np.diff(ends, axis=1, prepend=0, append=np.array([[len(of)] for of in members]))
        if counts.sum(axis=0).min() >= dealing.min_examples:
            owners = np.empty(dealing.count, np.int64)
            for of, at in zip(members, ends, strict=True):
                _runs(of, at, dealing.devices, owners)
            return DealtParts.of_owners(owners, dealing.devices)
    raise _no_draw(dealing)


def _shares(generator: np.random.Generator, dealing: Dealing, rows: int) -> list[npt.NDArray[np.float64]]:
    try:
        shares = [generator.dirichlet(np.full(dealing.devices, float(dealing.alpha))) for _ in range(rows)]
    except ValueError:  # an alpha that numpy's generator cannot draw from
        raise _no_draw(dealing) from None
    if not all(np.isfinite(row).all() for row in shares):
        raise _no_draw(dealing)
    return shares


def _self_balanced(
    shares: Sequence[npt.NDArray[np.float64]], members: Sequence[Indices], dealing: Dealing
) -> list[npt.NDArray[np.float64]]:
    """Take their shares of a class from the devices that have more than ``N / devices`` examples of those before."""
    dealt, balanced = np.zeros(dealing.devices), []
    for row, of in zip(shares, members, strict=True):
        open_to = row * (dealt <= dealing.count / dealing.devices)
        total = sum(open_to.tolist())  # in this order, as flwr-datasets adds them: shares end at whole examples
        if not total > 0:
            raise _no_draw(dealing)
        balanced.append(open_to / total)
        dealt += np.diff((np.cumsum(balanced[-1]) * len(of)).astype(int)[:-1], prepend=0, append=len(of))
    return balanced


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


def _quantity(dealing: Dealing) -> DealtParts:
    """Deal shares of ``Dirichlet(α, …, α)`` of all examples, whatever their class (Li et al., arXiv 2102.02079)."""
    order, _ = dealing.order()
    generator = rng.generator(dealing.seed, "quantity")
    free = dealing.count - dealing.devices * dealing.min_examples
    [shares] = _shares(generator, dealing, 1)
    ends = np.round(np.cumsum(shares) * free).astype(int)[:-1] + dealing.min_examples * np.arange(1, dealing.devices)
    owners = np.empty(dealing.count, np.int64)
    _runs(order, ends, dealing.devices, owners)
    return DealtParts.of_owners(owners, dealing.devices)


def _natural(dealing: Dealing) -> DealtParts:
    """Make every user a device; with fewer devices than users, each gets as many whole users, drawn by the seed."""
    assert dealing.groups is not None
    users, user_of = np.unique(dealing.groups, return_inverse=True)
    if dealing.devices > len(users):
        raise UserError(
            f"data.devices = {dealing.devices}: the data have {len(users)} users: lower it, or leave it out"
        )
    device_of = np.arange(len(users))
    if dealing.devices < len(users):
        drawn = rng.generator(dealing.seed, "users").permutation(len(users))
        base, more = divmod(len(users), dealing.devices)
        _runs(drawn, np.cumsum(base + (np.arange(dealing.devices) < more))[:-1], dealing.devices, device_of)
    return DealtParts.of_owners(device_of[user_of], dealing.devices)


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
        Partition(
            name="iid",
            deal=_iid,
            draw=_draw_iid,
            summary="equal random shares: sizes differ by one at most",
            built_in=True,
        ),
        Partition(
            name="dirichlet",
            deal=_dirichlet,
            draw=_draw_dirichlet,
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
            draw=_draw_pathological,
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
) -> Parts:
    """Return `partition`, dealt once and then read from the cache; that of user code is dealt anew.

    Args:
        fingerprint: of the data that the labels are of.
        labels: see `partition`, as for the rest.
        groups: see there.
        count: see there.
        arguments: see there.
    """
    scheme = str(arguments["scheme"])
    check_name("data.partition", scheme, PARTITIONS)
    if not PARTITIONS[scheme].built_in or arguments.get("share_examples"):
        return partition(labels, groups=groups, count=count, **arguments)
    name = f"{scheme}-{cache.key(_FORMAT, fingerprint, arguments)}"

    def build(folder: Path) -> None:
        parts = partition(labels, groups=groups, count=count, **arguments)
        assert isinstance(parts, DealtParts)
        np.save(folder / "indices.npy", parts.indices.astype(np.int64))
        np.save(folder / "ends.npy", parts.ends)

    return cache.fetch(cache.cache_root() / "partitions" / name, build, _read)


def _read(folder: Path) -> DealtParts:
    return DealtParts(np.load(folder / "indices.npy"), np.load(folder / "ends.npy"))


def class_counts(labels: Indices, parts: Sequence[Indices], num_classes: int) -> Indices:
    """Return (devices, classes): how many examples of each class each device holds."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
