"""Checkpoints: bit-exact, safe against a crash at any step, corruption is told."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.errors import UserError
from fedmaestro.runs.checkpoint import Checkpoint, Key, below, load_checkpoint, save_checkpoint

STEPS = ("fsync", "replace", "unlink")
"""What a save does to the disk; a crash may come before or after each of them."""


def make_checkpoint(number: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    return Checkpoint(
        number=number,
        tensors={
            ("global", "fc.u"): torch.randn(4, 3, generator=generator),
            ("memory", "adam", "fc.u"): torch.randn(4, 3, generator=generator).double(),
        },
        facts={"ranks": [[4, 3]], "é": None},
        fingerprint="data",
    )


def assert_equal(a: Checkpoint | None, b: Checkpoint) -> None:
    assert a is not None
    assert (a.number, a.facts, a.fingerprint, a.tensors.keys()) == (b.number, b.facts, b.fingerprint, b.tensors.keys())
    for key, tensor in a.tensors.items():
        other = b.tensors[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert tensor.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoint") is None


PARTS = st.sampled_from(["", "a", "a.b", "a/b", "b", "%2F", "é", "a b"])


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.float16]),
    keys=st.lists(st.lists(PARTS, min_size=1, max_size=3).map(tuple), unique=True, max_size=5),
)
def test_round_trip_of_any_tensors_under_any_keys(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, keys: list[Key]
) -> None:
    tensors = {key: torch.full(shape, i).to(dtype) for i, key in enumerate(keys)}
    if dtype.is_floating_point:
        tensors["special",] = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=dtype)
    folder = tmp_path_factory.mktemp("checkpoint")
    saved = Checkpoint(number=1, tensors=tensors)
    save_checkpoint(folder, saved)
    assert_equal(load_checkpoint(folder), saved)


def test_keys_below_another_one() -> None:
    tensors = {("a", "b"): torch.ones(1), ("a/b", "c"): torch.ones(2), ("a", "b", "c"): torch.ones(3)}
    assert list(below(tensors, "a")) == [("b",), ("b", "c")]
    assert list(below(tensors, "a", "b")) == [(), ("c",)]


def test_views_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    saved = Checkpoint(number=1, tensors={("column",): base[:, :2], ("turned",): base.T})
    save_checkpoint(tmp_path, saved)
    assert_equal(load_checkpoint(tmp_path), saved)


# Crashes


class Crash(BaseException):
    """Ends a save as a lost process does: nothing catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int, after: bool) -> Callable[[], int]:
    """Let the process die at the given disk operation; return a counter of the operations so far."""
    done = 0
    originals = {step: getattr(os, step) for step in STEPS}

    def wrap(step: str) -> Callable[..., object]:
        def operation(*arguments: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done == call and not after:
                raise Crash
            result = originals[step](*arguments, **options)
            if done == call:
                raise Crash
            return result

        return operation

    for step in STEPS:
        monkeypatch.setattr(os, step, wrap(step))
    return lambda: done


# Three files, each synced and renamed, and an older one removed.
OPERATIONS = 7


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", range(1, OPERATIONS + 1))
def test_a_crash_at_any_step_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    save_checkpoint(tmp_path, make_checkpoint(1))
    (tmp_path / "round-000000.safetensors").write_bytes(b"of an earlier crash")
    with monkeypatch.context() as patch:
        crash_at(patch, call, after)
        with pytest.raises(Crash):
            save_checkpoint(tmp_path, make_checkpoint(2))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert_equal(found, make_checkpoint(found.number))
    renamed = (call, after) >= (6, True)
    assert found.number == (2 if renamed else 1)
    # The next save cleans up: what it has written, and the one before.
    save_checkpoint(tmp_path, make_checkpoint(3))
    assert_equal(load_checkpoint(tmp_path), make_checkpoint(3))
    expected = [f"round-{found.number:06d}.safetensors", "round-000003.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("round-*")) == expected


@pytest.mark.parametrize("damaged", ["progress.json", "round-000002.safetensors"])
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "changed"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_loaded(
    tmp_path: Path, damaged: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        save_checkpoint(tmp_path, make_checkpoint(number))
    file = tmp_path / damaged
    whole = file.read_bytes()
    damages = {"empty": b"", "cut": whole[: len(whole) // 2], "changed": whole.replace(b"2", b"3")}
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(damages[how])
    assert_equal(load_checkpoint(tmp_path), make_checkpoint(1))
    assert "going on from the one before, of number 1" in caplog.text
    # What is written next does not take the damaged one for the one before.
    save_checkpoint(tmp_path, make_checkpoint(2))
    assert_equal(load_checkpoint(tmp_path), make_checkpoint(2))
    (tmp_path / "progress.json").unlink()
    assert_equal(load_checkpoint(tmp_path), make_checkpoint(1))


def test_a_crash_during_the_first_save_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 3, after=False)
        with pytest.raises(Crash):
            save_checkpoint(tmp_path, make_checkpoint(1))
    assert load_checkpoint(tmp_path) is None


# Corruption


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, make_checkpoint(3))
    return tmp_path


def expect_error(folder: Path) -> None:
    with pytest.raises(UserError, match="start a new run") as error:
        load_checkpoint(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_changed_byte_of_the_tensors_is_told(saved: Path) -> None:
    file = saved / "round-000003.safetensors"
    whole = file.read_bytes()
    for position in range(len(whole)):
        for mask in (0x01, 0x80):
            changed = bytearray(whole)
            changed[position] ^= mask
            file.write_bytes(changed)
            expect_error(saved)


def test_a_missing_file_is_told(saved: Path) -> None:
    (saved / "round-000003.safetensors").unlink()
    expect_error(saved)


@pytest.mark.parametrize("change", [{"rouod": 3}, [], None, 5], ids=str)
def test_a_pointer_of_another_form_is_told(saved: Path, change: object) -> None:
    pointer = saved / "progress.json"
    if isinstance(change, dict):
        kept = json.loads(pointer.read_text(encoding="utf-8"))
        del kept["round"]
        change = kept | change
    pointer.write_text(json.dumps(change), encoding="utf-8")
    expect_error(saved)


def test_a_checkpoint_of_another_version_is_told(saved: Path) -> None:
    pointer = saved / "progress.json"
    pointer.write_text(pointer.read_text(encoding="utf-8").replace('"format": 3', '"format": 1'), encoding="utf-8")
    with pytest.raises(UserError, match="has format 1, this version reads 3"):
        load_checkpoint(saved)
