"""Folders that are built once and then shared by every process: a content cache with atomic publication.

Law: whatever is visible under an entry's own name was written completely. A folder is filled under a
temporary name beside its final place and takes its name in one rename, together with a manifest of its files'
lengths and checksums. A crash leaves only a temporary folder, which a later build removes. Of two processes that
build one entry, one wins and both succeed.

An entry of data says their fingerprint in ``META``: a machine that does not have the files that it was made of finds it
by that (``find``), also where another machine has packed it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedmaestro.errors import UserError
from fedmaestro.places import absolute, is_left, own_tag

T = TypeVar("T")

CACHE_VARIABLE = "FEDMAESTRO_CACHE"
DATA = "datasets"
"""Folder of the entries of data."""
META = "meta.json"
"""Of an entry of data: says its fingerprint, and what else is no array."""
_MANIFEST = "manifest.json"
_STAGING_PREFIX = ".tmp-"
_TRIES = 5


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the absolute cache folder: ``cache_dir``, else $FEDMAESTRO_CACHE, else the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME/fedmaestro``, or ``~/.cache/fedmaestro``. Nothing is created.

    Raises:
        UserError: no folder is given and the user has no home folder.

    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    try:
        if chosen:
            return absolute(chosen)
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache").absolute() / "fedmaestro"
    except RuntimeError as error:  # pathlib's word for "no home folder"
        raise UserError(f"no cache folder: {error}; set {CACHE_VARIABLE} to a folder that can be written") from error


def key(*parts: object) -> str:
    """Return 32 hex digits that stand for JSON-serialisable ``parts``."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def fetch(entry: Path, build: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """Return ``read(entry)``, after building the entry if it is absent, incomplete or unreadable.

    Args:
        entry: the entry's folder, in any folder of the cache; its parents are created.
        build: fills the empty folder that it is given.
        read: reads a complete entry; an OSError, ValueError or KeyError means that the entry is damaged.

    Raises:
        UserError: the cache cannot be written. Errors of ``build`` other than OSError pass through unchanged.

    """
    for _ in range(_TRIES):
        found = _read_complete(entry, read)
        if found is not None:
            return found
        try:
            with _staging(entry.parent) as folder:
                build(folder)
                _write_manifest(folder)
                _publish(folder, entry, lambda: _read_complete(entry, read) is not None)
        except OSError as error:
            reason = error.strerror or error
            advice = f"set {CACHE_VARIABLE} to a folder that can be written"
            raise UserError(f"cannot write the cache folder {entry.parent}: {reason}; {advice}") from error
    raise UserError(f"cannot read back the cache entry {entry}: remove it, or set {CACHE_VARIABLE} to another folder")


def read(entry: Path, read_entry: Callable[[Path], T]) -> T | None:
    """Return ``read_entry(entry)`` if the entry is there, complete and undamaged."""
    return _read_complete(entry, read_entry)


def find(fingerprint: str, read_entry: Callable[[Path], T], cache_dir: str | Path | None = None) -> T | None:
    """Return ``read_entry(entry)`` of a complete entry of data of this fingerprint, whatever it was made of."""
    for meta in sorted((cache_root(cache_dir) / DATA).glob(f"*/{META}")):
        with contextlib.suppress(OSError, ValueError):  # another process may be moving it away
            if meta.parent.name.startswith(_STAGING_PREFIX):
                continue
            if json.loads(meta.read_bytes()).get("fingerprint") != fingerprint:
                continue
            if (found := read(meta.parent, read_entry)) is not None:
                return found
    return None


Packed = Mapping[str, npt.NDArray[np.uint8]]
"""The files of an entry by their names."""


def pack(entry: Path) -> Packed:
    """Return the files of a complete entry, for another machine; they are mapped, not read."""
    return {path.name: np.asarray(np.memmap(path, np.uint8, "r")) for path in sorted(entry.iterdir())}


def unpack(entry: Path, files: Packed) -> None:
    """Make the entry that another machine has packed, unless it is there.

    Raises:
        UserError: the cache cannot be written, or a file is not what the manifest says.
    """
    sent = json.loads(files[_MANIFEST].tobytes())

    def build(folder: Path) -> None:
        for name, known in sent.items():
            (folder / name).write_bytes(files[name])
            if _checksum(folder / name) != known:
                raise UserError(f"{name} of the cache entry {entry.name} was damaged on its way here: start again")

    def is_sent(folder: Path) -> bool:
        if json.loads((folder / _MANIFEST).read_bytes()) != sent:
            raise ValueError("other files than were sent")
        return True

    fetch(entry, build, is_sent)


def _read_complete(entry: Path, read: Callable[[Path], T]) -> T | None:
    try:
        checksums = json.loads((entry / _MANIFEST).read_bytes())
        if all(_checksum(entry / name) == known for name, known in checksums.items()):
            return read(entry)
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # whatever is wrong with an entry, the answer is to build it again
    return None


def _write_manifest(folder: Path) -> None:
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(checksums), encoding="utf-8")


def _checksum(path: Path) -> list[int]:
    """Return length and CRC-32 of a file: a disk that loses blocks keeps the length (1 GB takes about a second)."""
    length, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            length, crc = length + len(block), zlib.crc32(block, crc)
    return [length, crc]


@contextlib.contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """Yield a new empty folder in ``parent`` that is gone afterwards, unless it was renamed."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent)
    folder = parent / _staging_name()  # not mkdtemp: a shared cache follows the umask
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _staging_name() -> str:
    return f"{_STAGING_PREFIX}{own_tag()}-{uuid.uuid4().hex}"


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{_STAGING_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            tag = path.name.removeprefix(_STAGING_PREFIX).rpartition("-")[0]
            if is_left(tag, path):
                shutil.rmtree(path)


def _publish(folder: Path, entry: Path, usable: Callable[[], bool]) -> None:
    """Rename ``folder`` to ``entry``; give way to a usable entry that is already there, replace any other."""
    for attempt in range(_TRIES):
        try:
            folder.rename(entry)
            return
        except OSError:
            if usable():
                return
            if attempt == _TRIES - 1:
                raise
        with contextlib.suppress(FileNotFoundError):
            _move_away(entry)


def _move_away(entry: Path) -> None:
    # A rename first: a reader then never sees an entry that is being deleted file by file.
    trash = entry.with_name(_staging_name())
    entry.rename(trash)
    if trash.is_dir() and not trash.is_symlink():
        shutil.rmtree(trash, ignore_errors=True)
    else:
        trash.unlink()
