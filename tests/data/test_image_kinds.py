"""Image sets as people really have them: the right pixels, or one line that names the file and the row."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedmaestro.data import ImageDataset, load_dataset
from fedmaestro.errors import UserError

VALUES = np.arange(10) * 20
LABELS: list[Any] = list(range(10))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def grey(value: int) -> bytes:
    return encoded(np.full((4, 6), value, np.uint8))


def with_alpha(value: int, alpha: int) -> bytes:
    return encoded(np.full((4, 6, 2), (value, alpha), np.uint8))


def turned(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    return encoded(np.full((6, 4), value, np.uint8), "JPEG", exif=exif)


def write(folder: Path, name: str, images: list[bytes], labels: list[Any] = LABELS) -> None:
    path = folder / "mnist" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path)


def load(folder: Path, train: str = "train-00000-of-00001.parquet", **columns: list[Any]) -> ImageDataset:
    write(folder, train, columns.get("images", [grey(int(v)) for v in VALUES]), columns.get("labels", LABELS))
    write(folder, "test-00000-of-00001.parquet", [grey(int(v)) for v in VALUES])
    return load_dataset("mnist", folder, folder / "cache")


KINDS: dict[str, Callable[[int], bytes]] = {
    "16 bits": lambda value: encoded(np.full((4, 6), 257 * value, np.uint16)),
    "colour": lambda value: encoded(np.full((4, 6, 3), value, np.uint8)),
    "opaque alpha": lambda value: with_alpha(value, 255),
    "turned by EXIF": turned,
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_that_a_viewer_shows(kind: str, tmp_path: Path) -> None:
    images = load(tmp_path, images=[KINDS[kind](int(value)) for value in VALUES]).train_images
    assert images.shape == (10, 1, 4, 6)
    assert images.mean(axis=(1, 2, 3)).round().tolist() == VALUES.tolist()


def test_labels_may_be_numbers_in_words(tmp_path: Path) -> None:
    assert load(tmp_path, labels=[str(label) for label in LABELS]).train_labels.tolist() == LABELS


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"images": [encoded(np.ones((4, 6), np.float32), "TIFF")] * 10}, "row 0: floating-point pixels"),
    "32 bits": ({"images": [encoded(np.ones((4, 6), np.int32), "TIFF")] * 10}, "row 0: 32-bit integer pixels"),
    "transparent": ({"images": [grey(1), *[with_alpha(0, 9)] * 9]}, "row 1: the image has transparent pixels"),
    "no file": ({"images": [b"\0" * 24] * 10}, "row 0: cannot decode the image: it is no image file"),
    "one colour": ({"images": [grey(7)] * 10}, "10 training images of 'mnist' are all of one colour"),
    "labels from 1": ({"labels": list(range(1, 11))}, "labels run from 1 to 10, expected 0 to 9: subtract 1"),
    "a label is missing": ({"labels": [None, *LABELS[1:]]}, "not 1 rows without a label"),
    "names": ({"labels": list("abcdefghij")}, "must hold an integer in every row, not string"),
    "classes of the test set": ({"labels": [0, 1] * 5}, "has the classes 2, 3, .*, of which there is no training"),
    "half": ({"train": "train-00000-of-00002-1f.parquet"}, r"has 1 of 2 train files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_go_wrong_silently_is_refused(case: str, tmp_path: Path) -> None:
    columns, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        load(tmp_path, **columns)


@pytest.mark.parametrize("other", ["train-00000-of-00001-2a3b.parquet", "train-00001-of-00002.parquet"])
def test_two_generations_of_files_are_not_read_together(other: str, tmp_path: Path) -> None:
    write(tmp_path, other, [grey(3)] * 10)
    with pytest.raises(UserError, match="train files of more than one generation: keep one of"):
        load(tmp_path)


def test_a_folder_one_level_off_is_told(tmp_path: Path) -> None:
    load(tmp_path / "data")
    for wrong in (tmp_path, tmp_path / "data/mnist"):
        with pytest.raises(UserError, match=f"which are in {tmp_path}/data/mnist: give --data-dir {tmp_path}/data$"):
            load_dataset("mnist", wrong, tmp_path / "cache")


def test_a_cache_whose_blocks_were_lost_is_decoded_again(tmp_path: Path) -> None:
    before = load(tmp_path).train_images.mean()
    (file,) = (tmp_path / "cache").glob("datasets/*/train_images.npy")
    content = file.read_bytes()
    file.write_bytes(content[:128] + bytes(len(content) - 128))
    assert load_dataset("mnist", tmp_path, tmp_path / "cache").train_images.mean() == before > 0
