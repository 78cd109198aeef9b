"""Where encoded examples come from: a table of known datasets, and their splits in batches.

Local parquet files and the hub give the same Arrow columns: from `EncodedBatch` on there is one code path.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedmaestro.data.files import KINDS as FILE_KINDS
from fedmaestro.data.own import OwnRow
from fedmaestro.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

SPLITS = ("train", "test")
_BATCH_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """One known dataset; ``hub`` is empty for a dataset that is embedded in a dependency."""

    summary: str
    hub: str = ""
    folder: str = ""  # below --data-dir
    image_column: str = "image"
    label_column: str = "label"
    num_classes: int = 10
    mode: str = "L"  # PIL's word: "L" is one channel, "RGB" three


TRANSLATION = "multi30k"

DATASETS: dict[str, "DatasetRow | OwnRow"] = {
    "digits": DatasetRow(summary="scikit-learn's embedded 8×8 digits, 1,797 grey images: needs no files"),
    "mnist": DatasetRow(
        summary="MNIST, 70,000 grey 28×28 digits",
        hub="ylecun/mnist",
        folder="mnist",
    ),
    "fashion-mnist": DatasetRow(
        summary="Fashion-MNIST, 70,000 grey 28×28 pieces of clothing",
        hub="zalando-datasets/fashion_mnist",
        folder="fashion-mnist",
    ),
    "cifar10": DatasetRow(
        summary="CIFAR-10, 60,000 colour 32×32 photos of 10 classes",
        hub="uoft-cs/cifar10",
        folder="cifar10",
        image_column="img",
        mode="RGB",
    ),
    "cifar100": DatasetRow(
        summary="CIFAR-100, 60,000 colour 32×32 photos of 100 classes",
        hub="uoft-cs/cifar100",
        folder="cifar100",
        image_column="img",
        label_column="fine_label",
        num_classes=100,
        mode="RGB",
    ),
    TRANSLATION: DatasetRow(
        summary="Multi30k, 29,000 German sentences with their English translations: text files in --data-dir",
        folder=TRANSLATION,
    ),
    **{name: DatasetRow(summary=summary) for name, (_, summary) in FILE_KINDS.items()},
}


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Some consecutive examples: image files as bytes, labels (B,), and where they stand, for messages."""

    origin: str
    first_row: int
    images: list[bytes]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    origin: str
    num_examples: int
    batches: Iterator[EncodedBatch]


_SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-\w+)?\.parquet$")
"""Of a file's name on the hub: which of how many files it is; older ones end with a hash."""


def local_files(row: DatasetRow, data_dir: Path) -> dict[str, list[Path]]:
    """Return the parquet files of each split in ``data_dir``, in order.

    Raises:
        UserError: a split has no file, or a shard of ``…-00000-of-00002.parquet`` is missing, or files of two
            generations lie side by side.

    """
    folder = data_dir / row.folder
    files = {split: _files_of(folder, split) for split in SPLITS}
    for split, paths in files.items():
        if not paths:
            wanted = f"expected {folder}/{split}-*.parquet, {_elsewhere(row, data_dir) or _found(data_dir, folder)}"
            raise UserError(f"no {split} files for {row.folder!r} in --data-dir {data_dir}: {wanted}")
        shards = [tuple(map(int, match.groups())) for path in paths if (match := _SHARD.search(path.name))]
        names = ", ".join(path.name for path in paths)
        if shards and (len(set(shards)) < len(paths) or len({total for _, total in shards}) > 1):
            raise UserError(f"{folder} has {split} files of more than one generation: keep one of {names}")
        if shards and len(shards) != shards[0][1]:
            raise UserError(f"{folder} has {len(shards)} of {shards[0][1]} {split} files: found {names}")
    return files


def _files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: ``train-*.parquet``, or all of ``train/`` (the hub's converted form)."""
    found = [*folder.glob(f"{split}-*.parquet")] or [*(folder / split).glob("*.parquet")]
    return sorted(path for path in found if path.is_file())


def _elsewhere(row: DatasetRow, data_dir: Path) -> str:
    """Return where the files lie, if that is one level away; empty if it is not."""
    near = [data_dir.parent, data_dir / row.folder]
    with contextlib.suppress(OSError):
        near += sorted(path for path in data_dir.iterdir() if path.is_dir() and path not in near)
    for folder in near:
        if all(_files_of(folder / row.folder, split) for split in SPLITS):
            return f"which are in {folder / row.folder}: give --data-dir {folder}"
    if all(_files_of(data_dir, split) for split in SPLITS):
        return f"which lie in {data_dir} itself: move them into a folder {row.folder!r}, and give that folder's parent"
    return ""


def _found(data_dir: Path, folder: Path) -> str:
    if not data_dir.is_dir():
        return f"{data_dir} is not a folder"
    folder = folder if folder.is_dir() else data_dir
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"cannot list {folder}: {error.strerror}"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"found in {folder}: {', '.join(names[:8]) or 'nothing'}{more}"


def local_split(row: DatasetRow, files: list[Path]) -> EncodedSplit:
    """Return the examples of ``files`` as one split.

    Raises:
        UserError: a file is unreadable or lacks a column; while iterating, a value is missing or invalid.

    """
    handles = [(path, _open_parquet(row, path)) for path in files]
    total = sum(handle.metadata.num_rows for _, handle in handles)
    origin = ", ".join(str(path) for path in files)
    return EncodedSplit(origin=origin, num_examples=total, batches=_parquet_batches(row, handles))


def _open_parquet(row: DatasetRow, path: Path) -> Any:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        handle = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as parquet: {one_line(error)}") from error
    _check_columns(row, handle.schema_arrow.names, str(path))
    return handle


def _parquet_batches(row: DatasetRow, handles: list[tuple[Path, Any]]) -> Iterator[EncodedBatch]:
    import pyarrow as pa

    for path, handle in handles:
        first_row = 0
        try:
            for batch in handle.iter_batches(_BATCH_SIZE, columns=[row.image_column, row.label_column]):
                yield _encoded(row, pa.Table.from_batches([batch]), str(path), first_row)
                first_row += batch.num_rows
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} after row {first_row}: {one_line(error)}") from error


def hub_split(row: DatasetRow, split: str) -> EncodedSplit:
    """Return one split of the hub's dataset in its order, through Flower Datasets and the Hugging Face cache.

    Raises:
        UserError: the hub cannot be reached, or what it gives lacks a column.

    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a third party's deprecations are not this user's
            import datasets
            from flwr_datasets import FederatedDataset

            # Not shuffled: examples from the hub and from files have one order, and so one fingerprint.
            data = FederatedDataset(dataset=row.hub, partitioners={}, shuffle=False).load_split(split)
            _check_columns(row, data.column_names, row.hub)
            data = data.cast_column(row.image_column, datasets.Image(decode=False)).with_format("arrow")
    except UserError:
        raise
    except Exception as error:  # the network stack raises what it likes
        expected = " and ".join(f"DATA_DIR/{row.folder}/{name}-*.parquet" for name in SPLITS)
        message = f"cannot load {row.hub!r} from the Hugging Face hub ({one_line(error)})"
        raise UserError(f"{message}: pass --data-dir DATA_DIR with {expected}") from error
    return EncodedSplit(origin=row.hub, num_examples=len(data), batches=_hub_batches(row, data))


def _hub_batches(row: DatasetRow, data: Any) -> Iterator[EncodedBatch]:
    for first_row in range(0, len(data), _BATCH_SIZE):
        yield _encoded(row, data[first_row : first_row + _BATCH_SIZE], row.hub, first_row)


def _check_columns(row: DatasetRow, found: list[str], origin: str) -> None:
    for column in (row.image_column, row.label_column):
        if column not in found:
            raise UserError(f"{origin} has no column {column!r}: found {', '.join(found)}")


def _encoded(row: DatasetRow, table: "pa.Table", origin: str, first_row: int) -> EncodedBatch:
    images = _image_bytes(table.column(row.image_column), row.image_column, origin)
    labels = _labels(table.column(row.label_column), row, origin)
    return EncodedBatch(origin=origin, first_row=first_row, images=images, labels=labels)


def _image_bytes(column: "pa.ChunkedArray", name: str, origin: str) -> list[bytes]:
    import pyarrow as pa

    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        values = [None if item is None else item["bytes"] for item in column.to_pylist()]
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        values = column.to_pylist()
    else:
        raise UserError(f"{origin}: column {name!r} holds {column.type}, expected image files as bytes")
    images = [value for value in values if value is not None]
    if len(images) < len(values):
        raise UserError(f"{origin}: column {name!r} has rows without image bytes")
    return images


def _labels(column: "pa.ChunkedArray", row: DatasetRow, origin: str) -> npt.NDArray[np.int64]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Numbers in another spelling; what is no number stays, and is told below.
        with contextlib.suppress(pa.ArrowInvalid):
            column = column.cast(pa.int64())
    if not pa.types.is_integer(column.type) or column.null_count:
        found = f"{column.null_count} rows without a label" if column.null_count else column.type
        raise UserError(f"{origin}: column {row.label_column!r} must hold an integer in every row, not {found}")
    labels: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < row.num_classes:
        span = f"{labels.min()} to {labels.max()}"
        shift = f": subtract {labels.min()}" if labels.max() - labels.min() < row.num_classes else ""
        raise UserError(f"{origin}: labels run from {span}, expected 0 to {row.num_classes - 1}{shift}")
    return labels
