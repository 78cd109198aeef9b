"""The run folder: who may use it, and writes that a crash cannot tear."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedmaestro.errors import UserError
from fedmaestro.places import own_tag
from fedmaestro.runs.folder import RunFolder, write_atomically
from fedmaestro.runs.records import RoundRecord


def record(number: int) -> RoundRecord:
    return RoundRecord(round=number, tiers={"low": {"accuracy": number / 10, "loss": None}}, devices=number)


@pytest.mark.parametrize("last", [-1, 2, 4])
def test_keep_rounds_drops_later_ones_and_what_a_crash_cut(tmp_path: Path, last: int) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_rounds() == []
    for number in range(5):
        folder.append(record(number))
    with folder.rounds.open("a", encoding="utf-8") as file:
        file.write('{"round": 5, "ti')
    assert folder.keep_rounds(last) == folder.read_rounds() == [record(n) for n in range(5) if n <= last]
    folder.append(record(99))
    assert folder.read_rounds()[-1] == record(99)


# Atomic writes


def test_write_atomically_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new and longer")
    assert path.read_text(encoding="utf-8") == "old"
    write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "x", []
    sync, replace = os.fsync, os.replace

    def tell_sync(descriptor: int) -> None:
        order.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def tell_replace(*arguments: object, **options: object) -> None:
        order.append(("replace", 0))
        replace(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", tell_sync)
    monkeypatch.setattr(os, "replace", tell_replace)
    write_atomically(path, "12345")
    assert order[:2] == [("fsync", 5), ("replace", 0)]


def test_what_a_killed_process_has_left_of_a_file_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    machine = own_tag().partition("-")[0]
    left, elsewhere, alive = (
        tmp_path / f".summary.json.{tag}"
        for tag in (f"{machine}-{dead.pid}", f"00000000-{dead.pid}", f"{machine}-{os.getppid()}")
    )
    old = tmp_path / ".summary.json.00000000-1"
    for path in (left, elsewhere, alive, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    write_atomically(tmp_path / "summary.json", "{}")
    assert {*tmp_path.iterdir()} == {tmp_path / "summary.json", elsewhere, alive}


# The folder


@pytest.fixture
def mode_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere: let `os.access` obey the owner's mode bits for root too."""
    if os.geteuid() != 0:
        return

    def access(path: str | Path, wanted: int) -> bool:
        mode = stat.S_IMODE(Path(path).stat().st_mode) >> 6
        return mode & wanted == wanted

    monkeypatch.setattr(os, "access", access)


def test_a_new_folder_is_usable_and_not_created(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b").check_usable()
    RunFolder(tmp_path).check_usable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "a/b/c"])
@pytest.mark.usefixtures("mode_bits_count")
def test_a_folder_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(UserError, match=rf"{closed / below}: {closed} is not a writable folder"):
        RunFolder(closed / below).check_usable()


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_under_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=rf"cannot write to the run folder .*: {file} is not a writable folder"):
        RunFolder(file / below).check_usable()
    assert file.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["config.toml", "rounds.jsonl", "checkpoint"])
def test_traces_of_a_run(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.holds_run()
    folder.path.mkdir()
    (folder.path / "notes.txt").touch()
    assert not folder.holds_run()
    (folder.path / name).touch()
    assert folder.holds_run()
