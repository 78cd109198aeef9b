"""Image datasets as memory-mapped arrays, decoded once. Shapes: B, N examples, C channels, H, W pixels."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedmaestro.data import cache
from fedmaestro.data.files import KINDS as FILE_KINDS
from fedmaestro.data.sources import DATASETS, SPLITS, TRANSLATION, DatasetRow, hub_split, local_files, local_split
from fedmaestro.errors import UserError, check_name
from fedmaestro.places import absolute

if TYPE_CHECKING:
    import torch

    from fedmaestro.data.decode import Arrays

__all__ = ["DATASETS", "DatasetRow", "ImageDataset", "data_folder", "load_dataset", "normalize"]

Progress = Callable[[int, int], None]

_FORMAT = 1  # part of the cache key: raise it when what is stored, or a row of DATASETS, changes its meaning
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """A dataset of C×H×W images.

    Images are read-only memory maps of the cache, so that processes share them: let each process call
    `load_dataset` (a pickled ImageDataset carries all the pixels). Indexing with an index array copies.
    """

    name: str
    train_images: npt.NDArray[np.uint8]  # (N, C, H, W)
    train_labels: npt.NDArray[np.int64]  # (N,)
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]
    num_classes: int
    mean: tuple[float, ...]  # per channel of the training images, in units of 255
    std: tuple[float, ...]
    fingerprint: str  # sha256 hex of images and labels: the same content has the same one wherever it came from

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


def data_folder(setting: str | None) -> str:
    """Return the folder of local data: ``data.dir``, else $FEDMAESTRO_DATA_DIR; empty: the hub.

    The variable serves ``flwr run`` (whose run config is either a file or single settings, never both) and
    deployments, where each node has its own path.
    """
    return setting or os.environ.get("FEDMAESTRO_DATA_DIR", "")


def load_dataset(
    name: str,
    data_dir: str | Path = "",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    *,
    fingerprint: str = "",
) -> ImageDataset:
    """Return the dataset ``name``, decoding it on the first call and mapping the cache's copy on later ones.

    Args:
        name: a key of `DATASETS`.
        data_dir: folder that holds ``<row.folder>/{train,test}-*.parquet``; empty means the Hugging Face hub.
            "digits" comes from scikit-learn and ignores it.
        cache_dir: see `fedmaestro.data.cache.cache_root`.
        progress: called with (decoded, total) images while files are decoded; not when the cache has them.
        fingerprint: of the data that another process has; without files here, the cache is searched for them.

    Raises:
        UserError: unknown name, missing or corrupt files, unreachable hub, or a cache that cannot be written.

    """
    check_name("dataset", name, DATASETS)
    row = DATASETS[name]
    if not isinstance(row, DatasetRow) or name in (TRANSLATION, *FILE_KINDS):
        raise UserError(f"dataset {name!r} is no set of images")
    if fingerprint and not has_files(row, data_dir):
        found = cache.find(fingerprint, lambda folder: _read(folder, name, row), cache_dir)
        if found is not None:
            return found
    files = local_files(row, absolute(data_dir)) if row.hub and str(data_dir) else {}
    entry = cache.cache_root(cache_dir) / cache.DATA / f"{name}-{cache.key(_FORMAT, name, row.hub, _stamps(files))}"

    def build(folder: Path) -> None:
        train, test = _decoded(row, files, progress)
        _check(name, train, test)
        _store(folder, train, test)

    return cache.fetch(entry, build, lambda folder: _read(folder, name, row))


def has_files(row: DatasetRow, data_dir: str | Path) -> bool:
    """Return whether the files of a row are in ``data_dir``; an embedded one needs none."""
    with contextlib.suppress(UserError):
        return not row.hub or bool(str(data_dir) and local_files(row, absolute(data_dir)))
    return False


def _stamps(files: dict[str, list[Path]]) -> list[tuple[str, int, int]]:
    """What tells, without reading them, that files changed."""
    paths = [path for split in SPLITS for path in files.get(split, [])]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _decoded(row: DatasetRow, files: dict[str, list[Path]], progress: Progress | None) -> tuple["Arrays", "Arrays"]:
    if not row.hub:
        from fedmaestro.data.digits import digits

        return digits()
    from fedmaestro.data.decode import decode_split  # PIL and pyarrow only when something must be decoded

    train, test = (local_split(row, files[split]) if files else hub_split(row, split) for split in SPLITS)
    done, total = 0, train.num_examples + test.num_examples

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    train_arrays = decode_split(train, row.mode, advance)
    return train_arrays, decode_split(test, row.mode, advance, shape=train_arrays[0].shape[1:])


def _check(name: str, train: "Arrays", test: "Arrays") -> None:
    """Refuse data that nobody can learn from, or be tested on."""
    if train[0].min() == train[0].max():
        raise UserError(f"the {len(train[0])} training images of {name!r} are all of one colour: check the files")
    if unknown := sorted(set(np.unique(test[1]).tolist()) - set(np.unique(train[1]).tolist())):
        raise UserError(
            f"the test set of {name!r} has the classes {', '.join(map(str, unknown))}, of which there is no training "
            "example: check the files"
        )


def _store(folder: Path, train: "Arrays", test: "Arrays") -> None:
    digest = hashlib.sha256()
    for split, arrays in zip(SPLITS, (train, test), strict=True):
        for kind, array in zip(("images", "labels"), arrays, strict=True):
            contiguous = np.ascontiguousarray(array)
            digest.update(f"{contiguous.dtype.str}{contiguous.shape}".encode())
            digest.update(contiguous.data)
            np.save(folder / f"{split}_{kind}.npy", contiguous)
    mean, std = _channel_moments(train[0])
    meta = {"mean": mean, "std": std, "fingerprint": digest.hexdigest()}
    (folder / cache.META).write_text(json.dumps(meta), encoding="utf-8")


def _channel_moments(images: npt.NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of (N, C, H, W), in units of 255.

    From a histogram of the 256 values: exact integer counts, whatever the number of images.
    """
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), _CHUNK):  # bincount widens its input to 8 bytes per pixel
            counts += np.bincount(images[start : start + _CHUNK, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        stds.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())))
    return means, stds


def _read(folder: Path, name: str, row: DatasetRow) -> ImageDataset:
    meta = json.loads((folder / cache.META).read_bytes())
    return ImageDataset(
        name=name,
        train_images=_mapped(folder / "train_images.npy"),
        train_labels=np.load(folder / "train_labels.npy"),
        test_images=_mapped(folder / "test_images.npy"),
        test_labels=np.load(folder / "test_labels.npy"),
        num_classes=row.num_classes,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=meta["fingerprint"],
    )


def _mapped(file: Path) -> "np.ndarray":
    # As a plain array: np.memmap does some Python for every view.
    return np.asarray(np.load(file, mmap_mode="r"))


def normalize(
    images: npt.NDArray[np.uint8], dataset_mean: tuple[float, ...], dataset_std: tuple[float, ...]
) -> "torch.Tensor":
    """Return ``(images / 255 - mean) / std`` as a float32 tensor of the images' shape (B, C, H, W).

    ``dataset_mean`` and ``dataset_std`` hold one value per channel, as `ImageDataset.mean` and ``.std``. A
    channel that is constant over the dataset (std 0) is only centred.
    """
    import torch

    assert images.ndim == 4
    assert images.shape[1] == len(dataset_mean) == len(dataset_std)
    mean = torch.tensor(dataset_mean).view(1, -1, 1, 1)
    std = torch.tensor([value if value > 0 else 1.0 for value in dataset_std]).view(1, -1, 1, 1)
    # astype copies, which a read-only memory map needs before torch may share its memory
    return torch.from_numpy(images.astype(np.float32)).div_(255).sub_(mean).div_(std)
