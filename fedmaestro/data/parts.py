"""Which device holds which training examples: what a partition comes to, for one device or for a million.

``DealtParts`` gives every example to one device: two arrays, whatever the number of devices. ``DrawnParts`` lets
devices share examples: each draws its own when it is asked for, and nothing is kept.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedmaestro import rng

Indices = npt.NDArray[np.int64]


class Parts(Sequence[Indices]):
    """The examples of every device: ``parts[device]`` is a sorted array ``(n,)`` of indices.

    Attributes:
        sizes: ``(devices,)``, how many each device has.
    """

    sizes: Indices

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, device):  # type: ignore[no-untyped-def]
        if isinstance(device, slice):
            return [self.of(i) for i in range(*device.indices(len(self)))]
        number = int(device)
        if not -len(self) <= number < len(self):
            raise IndexError(f"device {number} of {len(self)}")
        return self.of(number % len(self))

    @abstractmethod
    def of(self, device: int) -> Indices:
        """Return the examples of a device."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Sha256 hex: equal for equal parts in the same order, on every platform."""


class DealtParts(Parts):
    """Parts that are kept: one device's examples after the other's.

    Args:
        indices: ``(N,)``, sorted within each device.
        ends: ``(devices,)``, where each device's end.
    """

    def __init__(self, indices: npt.NDArray[np.integer], ends: Indices) -> None:
        self.indices, self.ends = indices, ends
        self.sizes = np.diff(ends, prepend=0)

    @staticmethod
    def of_lists(parts: Iterable[npt.ArrayLike]) -> "DealtParts":
        """Return the parts of a list of arrays, in any order within a device."""
        arrays = [np.sort(np.asarray(part, np.int64)) for part in parts]
        ends = np.cumsum([len(part) for part in arrays], dtype=np.int64)
        return DealtParts(np.concatenate(arrays) if arrays else np.empty(0, np.int64), ends)

    @staticmethod
    def of_owners(owners: npt.NDArray[np.integer], devices: int) -> "DealtParts":
        """Return the parts of ``owners (N,)``: the device of each example; below 0 for nobody's."""
        order = np.argsort(owners, kind="stable")
        nobody = int((owners < 0).sum())
        counts = np.bincount(owners[owners >= 0], minlength=devices)
        return DealtParts(order[nobody:], np.cumsum(counts, dtype=np.int64))

    def of(self, device: int) -> Indices:
        """Return the examples of a device."""
        last = int(self.ends[device])
        return np.asarray(self.indices[last - int(self.sizes[device]) : last], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 hex of sizes and indices."""
        digest = hashlib.sha256(self.sizes.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(self.indices).astype("<i8").tobytes())
        return digest.hexdigest()


class DrawnParts(Parts):
    """Parts that are drawn when they are asked for, by each device from all examples: devices share examples.

    Args:
        devices: how many there are.
        size: examples of each device.
        draw: ``generator -> indices (size,)``, the device's own generator.
        seed: the experiment's.
        about: what the draws depend on besides, for the fingerprint.
    """

    def __init__(
        self, devices: int, size: int, draw: Callable[[np.random.Generator], Indices], seed: int, about: str
    ) -> None:
        self.sizes = np.broadcast_to(np.int64(size), devices)
        self._draw, self._seed, self._about = draw, seed, about

    def of(self, device: int) -> Indices:
        """Return the examples of a device."""
        return np.sort(self._draw(rng.generator(self._seed, "share", device)))

    @property
    def fingerprint(self) -> str:
        """Sha256 hex of what the draws depend on."""
        about = f"{self._about} {len(self)} {self.sizes[:1]} {self._seed}"
        return hashlib.sha256(about.encode()).hexdigest()


class SplitParts(Parts):
    """What devices train on, or are tested on, when each holds a share of its examples out.

    Args:
        whole: all examples of every device.
        share: of them that is held out; a device keeps one at least.
        seed: the experiment's.
        held: whether these are the examples that are held out.
    """

    def __init__(self, whole: Parts, share: float, seed: int, *, held: bool) -> None:
        self._whole, self._seed, self._held = whole, seed, held
        self._share = share
        self._out = np.minimum(np.round(share * whole.sizes), np.maximum(whole.sizes - 1, 0)).astype(np.int64)
        self.sizes = self._out if held else whole.sizes - self._out

    def of(self, device: int) -> Indices:
        """Return the examples of a device."""
        order = rng.generator(self._seed, "device-test", device).permutation(self._whole[device])
        count = int(self._out[device])
        return np.sort(order[:count] if self._held else order[count:])

    @property
    def fingerprint(self) -> str:
        """Sha256 hex of what they depend on."""
        about = f"{self._whole.fingerprint} {self._share} {self._seed} {self._held}"
        return hashlib.sha256(about.encode()).hexdigest()


NO_PARTS = DealtParts(np.empty(0, np.int64), np.empty(0, np.int64))
"""Of no device."""
