"""Checkpoints and the model artefact: bit-exact, safe against a crash at any step, corruption is told."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.errors import UserError
from fedmaestro.runs.checkpoint import Checkpoint, load_checkpoint, read_model, save_checkpoint, write_model
from fedmaestro.submodel import State

STEPS = ("fsync", "replace", "unlink")
"""What a save does to the disk; a crash may come before or after each of them."""


def make_checkpoint(number: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    return Checkpoint(
        round=number,
        global_state={"fc.u": torch.randn(4, 3, generator=generator), "steps": torch.tensor(number)},
        server_memory={"fc.u": torch.randn(4, 3, generator=generator).double(), "t": torch.tensor([number])},
    )


def assert_states_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].contiguous().numpy().tobytes() == b[name].contiguous().numpy().tobytes()


def assert_equal(a: Checkpoint | None, b: Checkpoint) -> None:
    assert a is not None
    assert a.round == b.round
    assert_states_equal(a.global_state, b.global_state)
    assert_states_equal(a.server_memory, b.server_memory)


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoint") is None


def test_round_trip_with_server_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", make_checkpoint(7))
    assert_equal(load_checkpoint(tmp_path / "checkpoint"), make_checkpoint(7))


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.float16]),
    names=st.lists(st.sampled_from(["a", "a.b", "global/a", "server/a", "é"]), unique=True, max_size=4),
    special=st.booleans(),
)
def test_round_trip_of_any_state(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, names: list[str], special: bool
) -> None:
    def state(start: int) -> State:
        made = {name: torch.full(shape, start + i).to(dtype) for i, name in enumerate(names)}
        if special and dtype.is_floating_point:
            made["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=dtype)
        return made

    folder = tmp_path_factory.mktemp("checkpoint")
    saved = Checkpoint(round=1, global_state=state(0), server_memory=state(9))
    save_checkpoint(folder, saved)
    assert_equal(load_checkpoint(folder), saved)


def test_views_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    saved = Checkpoint(round=1, global_state={"column": base[:, :2], "turned": base.T}, server_memory={})
    save_checkpoint(tmp_path, saved)
    assert_equal(load_checkpoint(tmp_path), saved)


def test_server_memory_may_hold_the_global_state_itself(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    save_checkpoint(tmp_path, Checkpoint(round=1, global_state=state, server_memory=dict(state)))
    assert_equal(load_checkpoint(tmp_path), Checkpoint(round=1, global_state=state, server_memory=state))


def test_older_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for number in (1, 2, 10):
        save_checkpoint(tmp_path, make_checkpoint(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "progress.json",
        "round-000010.safetensors",
    ]


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


# Two files, each synced and renamed, and two older ones removed.
OPERATIONS = 6


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
    assert_equal(found, make_checkpoint(found.round))
    renamed = (call, after) >= (4, True)
    assert found.round == (2 if renamed else 1)
    # The next save cleans up.
    save_checkpoint(tmp_path, make_checkpoint(3))
    assert_equal(load_checkpoint(tmp_path), make_checkpoint(3))
    assert [path.name for path in tmp_path.glob("round-*")] == ["round-000003.safetensors"]


def test_crashes_are_tried_at_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make_checkpoint(1))
    (tmp_path / "round-000000.safetensors").touch()
    count = crash_at(monkeypatch, 0, after=False)
    save_checkpoint(tmp_path, make_checkpoint(2))
    assert count() == OPERATIONS


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


@pytest.mark.parametrize("name", ["round-000003.safetensors", "progress.json"])
def test_truncation_is_told(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    for length in range(len(whole)):
        (saved / name).write_bytes(whole[:length])
        expect_error(saved)


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


def test_a_changed_round_is_told(saved: Path) -> None:
    pointer = saved / "progress.json"
    pointer.write_text(pointer.read_text(encoding="utf-8").replace('"round": 3', '"round": 2'), encoding="utf-8")
    expect_error(saved)


# The model artefact

STATE = {"fc.u": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2)}
CARD = {"model": "lenet", "ranks": {"fc": 3}, "é": 1}


def test_model_round_trip_and_hash(tmp_path: Path) -> None:
    digest = write_model(tmp_path, STATE, CARD)
    assert digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    state, card = read_model(tmp_path)
    assert_states_equal(state, STATE)
    assert card == CARD


def test_equal_models_have_equal_hashes(tmp_path: Path) -> None:
    digest = write_model(tmp_path / "a", STATE, CARD)
    assert write_model(tmp_path / "b", {k: v.clone() for k, v in reversed(STATE.items())}, {}) == digest
    assert write_model(tmp_path / "c", {**STATE, "fc.bias": torch.ones(2)}, CARD) != digest


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_model_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, STATE, CARD)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="no readable model"):
        read_model(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="no readable model"):
        read_model(tmp_path)
