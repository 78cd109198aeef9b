"""The folder of a run: its files, who may use it, and writes that a crash cannot tear."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fedmaestro.errors import UserError
from fedmaestro.places import is_left, own_tag, writable
from fedmaestro.runs.reader import read_lines
from fedmaestro.runs.records import DeviceRecord, Record, RoundRecord


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; every write is atomic or an append of one line."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def rounds(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def holds_run(self) -> bool:
        """Return whether a run was started here."""
        return self.config.exists() or self.rounds.exists() or self.checkpoint.exists()

    def check_usable(self) -> None:
        """Raise UserError when the folder cannot be made or is not writable; nothing is created."""
        try:
            existing = next(p for p in (self.path, *self.path.parents) if p.exists())
        except OSError as error:
            raise UserError(
                f"cannot write to the run folder {self.path}: {error.strerror}: choose another out"
            ) from None
        if not writable(existing):
            raise UserError(
                f"cannot write to the run folder {self.path}: {existing} is not a writable folder: choose another out"
            )

    @contextmanager
    def claim(self, resume: bool) -> Iterator[None]:
        """Make the folder and keep every other run out of it; a new run that is refused leaves nothing there.

        Raises:
            UserError: another process runs in it, it already holds a run that is not to be resumed, it cannot be made.
        """
        lock = FileLock(self.path / ".lock")
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            before = set() if made else set(self.path.iterdir())
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.path} is in use by another run: wait for it, or choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.path}: {error}") from error
        try:
            if self.holds_run() and not resume:
                raise UserError(holds_a_run(self.path))
            try:
                yield
            except UserError:
                if not resume and not self._has_trained():
                    self._remove_all_but(before, made)
                raise
        finally:
            lock.release()

    def _has_trained(self) -> bool:
        """Return whether there is anything to go on from: a trained round, or a checkpoint of a training."""
        if self.rounds.exists():
            return any(record.round > 0 for record in self.read_rounds())
        return self.checkpoint.exists()

    def _remove_all_but(self, before: Collection[Path], made: Sequence[Path]) -> None:
        """Remove what was not there before, and those of the folders made for it that are empty then."""
        for path in set(self.path.iterdir()) - set(before):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()

    @property
    def devices(self) -> Path:
        return self.path / "devices.jsonl"

    def append_devices(self, record: DeviceRecord) -> None:
        """Append what single devices reached in a round."""
        append_record(self.devices, record)

    def append(self, record: RoundRecord) -> None:
        """Append one round."""
        append_record(self.rounds, record)

    def keep_rounds(self, last: int) -> list[RoundRecord]:
        """Drop every line after round ``last`` (or cut short by a crash) and return the rest."""
        kept = [record for record in self.read_rounds() if record.round <= last]
        write_records(self.rounds, kept)
        if self.devices.exists():
            write_records(self.devices, [record for record in self.read_devices() if record.round <= last])
        return kept

    def read_devices(self) -> list[DeviceRecord]:
        """Return what single devices reached so far; a last line that a crash cut short is ignored."""
        return read_lines(self.devices, DeviceRecord)

    def read_rounds(self) -> list[RoundRecord]:
        """Return the rounds so far; a last line that a crash cut short is ignored."""
        return read_lines(self.rounds, RoundRecord)


def holds_a_run(path: Path) -> str:
    """Return the message for a folder that is taken."""
    return f"{path} already holds a run: continue it with --resume, or choose another --out"


def append_record(path: Path, record: Record) -> None:
    """Append a line to a file that a crash may cut short, but not lose."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.to_dict()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of one record per line."""
    write_atomically(path, "".join(json.dumps(record.to_dict()) + "\n" for record in records))


def write_record(path: Path, record: Record) -> None:
    """Write a file of one record."""
    write_atomically(path, json.dumps(record.to_dict(), indent=2) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    What an earlier crash has left of the same file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = f".{path.name}."
    for other in path.parent.iterdir():
        if other.name.startswith(hidden) and is_left(other.name.removeprefix(hidden), other):
            other.unlink(missing_ok=True)
    temporary = path.with_name(f"{hidden}{own_tag()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
