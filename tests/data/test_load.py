import io
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedmaestro.data import ImageDataset, load_dataset
from fedmaestro.errors import UserError


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def table(images: list[Any], labels: list[Any], image: str = "image", label: str = "label") -> pa.Table:
    structs = [None if data is None else {"bytes": data, "path": None} for data in images]
    return pa.table({image: structs, label: labels})


@pytest.fixture
def pixels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {split: rng.integers(0, 256, (n, 5, 4), np.uint8) for split, n in (("train", 12), ("test", 6))}


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write one split of a made-up ``mnist`` folder and return the file."""

    def write(split: str, data: pa.Table, shard: str = "00000-of-00001") -> Path:
        folder = tmp_path / "data" / "mnist"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{split}-{shard}.parquet"
        pq.write_table(data, path)
        return path

    return write


@pytest.fixture
def fake_mnist(pixels: dict[str, np.ndarray], write_parquet: Callable[..., Path]) -> Path:
    """Return a data folder whose ``mnist`` holds 12 + 6 grey images of 5×4 pixels."""
    for split, images in pixels.items():
        path = write_parquet(split, table([png(image) for image in images], [i % 3 for i in range(len(images))]))
    return path.parents[1]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("datasets/*"))


def test_digits_end_to_end(digits: ImageDataset, session_cache: Path) -> None:
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.image_shape == (1, 8, 8)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int64
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert digits.num_classes == 10
    shares = np.bincount(digits.test_labels) / (np.bincount(digits.test_labels) + np.bincount(digits.train_labels))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)  # stratified
    again = load_dataset("digits", data_dir="/nowhere", cache_dir=session_cache)
    assert again.fingerprint == digits.fingerprint
    assert len(digits.fingerprint) == 64


def test_images_are_read_only_maps(digits: ImageDataset) -> None:
    assert isinstance(digits.train_images.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        digits.train_images[0] = 0


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'cifar': did you mean 'cifar10'\?"):
        load_dataset("cifar")


def test_local_parquet_is_decoded_exactly(fake_mnist: Path, pixels: dict[str, np.ndarray], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    data = load_dataset("mnist", fake_mnist, tmp_path / "cache", progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(data.train_images[:, 0], pixels["train"])
    np.testing.assert_array_equal(data.test_images[:, 0], pixels["test"])
    np.testing.assert_array_equal(data.train_labels, np.arange(12) % 3)
    assert data.image_shape == (1, 5, 4)
    assert calls == [(12, 18), (18, 18)]
    load_dataset("mnist", fake_mnist, tmp_path / "cache", progress=lambda *call: pytest.fail("decoded again"))


def test_shards_are_read_in_order(
    pixels: dict[str, np.ndarray], fake_mnist: Path, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    whole = load_dataset("mnist", fake_mnist, tmp_path / "cache")
    (fake_mnist / "mnist" / "train-00000-of-00001.parquet").unlink()
    for shard, rows in enumerate((slice(0, 0), slice(0, 7), slice(7, 12))):
        data = table([png(image) for image in pixels["train"][rows]], (np.arange(12) % 3).tolist()[rows])
        if shard == 0:
            data = table([png(pixels["train"][0])], [0]).slice(0, 0)  # a shard may be empty
        write_parquet("train", data, f"0000{shard}-of-00003")
    assert load_dataset("mnist", fake_mnist, tmp_path / "cache").fingerprint == whole.fingerprint
    (fake_mnist / "mnist" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"mnist has 2 of 3 train files: found train-00000.*, train-00002"):
        load_dataset("mnist", fake_mnist, tmp_path / "cache")


def test_changed_files_are_decoded_again(fake_mnist: Path, write_parquet: Callable[..., Path], tmp_path: Path) -> None:
    before = load_dataset("mnist", fake_mnist, tmp_path / "cache")
    write_parquet("test", table([png(np.ones((5, 4), np.uint8))] * 3, [0, 1, 2]))
    after = load_dataset("mnist", fake_mnist, tmp_path / "cache")
    assert len(after.test_labels) == 3
    assert after.fingerprint != before.fingerprint


def test_the_data_folder_may_be_in_the_home_folder(
    fake_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(fake_mnist.parent))
    assert len(load_dataset("mnist", f"~/{fake_mnist.name}", tmp_path / "cache").train_labels) == 12


def test_missing_folder_names_what_was_expected_and_found(fake_mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar10/train-\*\.parquet, found in .*/data: mnist$"):
        load_dataset("cifar10", fake_mnist, tmp_path / "cache")
    (fake_mnist / "mnist" / "test-00000-of-00001.parquet").unlink()
    pattern = r"mnist/test-\*\.parquet, found in .*/mnist: train-00000-of-00001\.parquet$"
    with pytest.raises(UserError, match=pattern):
        load_dataset("mnist", fake_mnist, tmp_path / "cache")
    with pytest.raises(UserError, match="/nowhere/at/all is not a folder"):
        load_dataset("mnist", "/nowhere/at/all", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


GOOD = png(np.zeros((5, 4), np.uint8))
BAD_TABLES = {
    "no image column": (table([GOOD], [0], image="picture"), r"no column 'image': found picture, label"),
    "no label column": (table([GOOD], [0], label="target"), r"no column 'label': found image, target"),
    "label out of range": (table([GOOD, GOOD], [0, 10]), r"labels run from 0 to 10, expected 0 to 9"),
    "negative label": (table([GOOD], [-1]), r"labels run from -1 to -1"),
    "label missing": (table([GOOD, GOOD], [0, None]), r"'label' must hold an integer in every row"),
    "label of text": (table([GOOD], ["zero"]), r"'label' must hold an integer in every row, not string"),
    "image missing": (table([GOOD, None], [0, 1]), r"'image' has rows without image bytes"),
    "not an image": (table([GOOD, b"hello"], [0, 1]), r"row 1: cannot decode the image"),
    "truncated image": (table([GOOD, GOOD[:-20]], [0, 1]), r"row 1: cannot decode the image"),
    "other size": (
        table([png(np.zeros((5, 5), np.uint8))], [0]),
        r"row 0: image of shape \(1, 5, 5\), others",
    ),
    "no rows": (table([GOOD], [0]).slice(0, 0), r"holds no examples"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_content_names_the_file_and_publishes_nothing(
    case: str, fake_mnist: Path, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    data, message = BAD_TABLES[case]
    path = write_parquet("test", data)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("mnist", fake_mnist, tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("keep", [0, 30, -300])
def test_corrupt_parquet_names_the_file(keep: int, fake_mnist: Path, tmp_path: Path) -> None:
    path = fake_mnist / "mnist" / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(UserError, match=f"cannot read {path}"):
        load_dataset("mnist", fake_mnist, tmp_path / "cache")
    damaged = content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :]
    path.write_bytes(damaged)  # the footer is whole, the pages are not
    with pytest.raises(UserError, match=str(path)):
        load_dataset("mnist", fake_mnist, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_two_processes_at_once_both_succeed(fake_mnist: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        loads = [pool.submit(load_dataset, "mnist", fake_mnist, tmp_path / "cache") for _ in range(2)]
        fingerprints = {load.result(timeout=60).fingerprint for load in loads}
    assert len(fingerprints) == 1
    assert len(entries(tmp_path / "cache")) == 1


def test_the_hub_goes_through_the_same_code(fake_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    original = datasets.load_dataset

    def hub(path: str, name: str | None) -> datasets.DatasetDict:  # as flwr_datasets calls it
        assert (path, name) == ("ylecun/mnist", None)
        files = {split: str(fake_mnist / f"mnist/{split}-00000-of-00001.parquet") for split in ("train", "test")}
        splits = original("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))
        return splits.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", hub)
    from_hub = load_dataset("mnist", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub again"))
    assert load_dataset("mnist", cache_dir=tmp_path / "cache").fingerprint == from_hub.fingerprint
    assert load_dataset("mnist", fake_mnist, tmp_path / "cache").fingerprint == from_hub.fingerprint


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"pass --data-dir DATA_DIR with DATA_DIR/cifar10/train-\*\.parquet") as caught:
        load_dataset("cifar10", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert entries(tmp_path / "cache") == []


def test_real_mnist(shared_data: Path, session_cache: Path) -> None:
    data = load_dataset("mnist", shared_data, session_cache)
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert data.mean == pytest.approx((0.1307,), abs=1e-4)  # the well-known values
    assert data.std == pytest.approx((0.3081,), abs=1e-4)
    assert np.bincount(data.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    start = time.perf_counter()
    load_dataset("mnist", shared_data, session_cache)
    assert time.perf_counter() - start < 1  # decoding takes several seconds


def test_usage_reports_of_flwr_datasets_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import fedmaestro.data, flwr_datasets.common.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    for chosen, expected in ((None, "0"), ("1", "1")):
        if chosen:
            monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", chosen)
        else:
            monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
