"""Folders and files: which can be written, what they are called, and where caches go when the user has none."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import stat
import tempfile
import time
import zlib
from datetime import datetime
from functools import cache
from pathlib import Path

from fedmaestro.errors import UserError, shown

CACHES = {"FEDMAESTRO_CACHE": "fedmaestro", "HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib"}
"""Variables that say where caches are, and what these are called below the user's cache folder."""


def absolute(path: str | Path, folder: Path | None = None) -> Path:
    """Return a path as it is from anywhere: ``~`` is a home folder, what is relative lies in ``folder`` (None: here).

    Raises:
        UserError: there is no such home, or the name of a file cannot be this.
    """
    try:
        return ((folder or Path.cwd()) / Path(path).expanduser()).absolute()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{shown(str(path))}: no path: {error}") from None


def exists(path: Path) -> bool:
    """Return whether there is something; there is nothing by a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


LARGEST_TEXT = 2**26
"""Bytes of a file that people write, or of a run's history, at most."""

STALE_SECONDS = 24 * 3600
"""After which a temporary file is nobody's."""

LONGEST = 100
"""Characters of a name that becomes that of a file; systems allow 255 bytes, of which some go to what is put around."""


def file_name(name: str) -> str:
    """Return a name as that of one file or folder: itself, unless it could be a path, is long, or has odd characters.

    Different names stay different: what is changed ends with a part of its hash.
    """
    safe = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name)
    if safe == name and len(name) <= LONGEST and not name.startswith((".", "-")) and name:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{safe.lstrip('.-')[:LONGEST]}-{digest}"


def read_file(path: str | Path, limit: int | None = LARGEST_TEXT) -> bytes:
    """Return the content of a file.

    Args:
        path: of the file.
        limit: its largest size in bytes; None: there is none.

    Raises:
        OSError: it cannot be read, is no file (a FIFO or a device would keep the reader waiting), or is too large.
    """
    path = Path(path)
    try:
        about = path.stat()
    except ValueError:  # pathlib's word for a NUL in the name
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if stat.S_ISDIR(about.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "this is no file but a device, a pipe or a socket")
    if limit is not None and about.st_size > limit:
        raise OSError(errno.EFBIG, f"it has {about.st_size / 1e6:.0f} MB, more than {limit / 1e6:.0f}")
    return path.read_bytes()


def own_tag() -> str:
    """Return what tells this process from all others, for the names of its temporary files."""
    return f"{_machine():08x}-{os.getpid()}"


def is_left(tag: str, path: Path) -> bool:
    """Return whether nobody works on a temporary file or folder any more: its process, by its tag, is gone.

    Of processes that were elsewhere, or before the machine was started anew, that is not known for a day.
    """
    with contextlib.suppress(OSError):  # another process may be removing it
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            return True
    machine, _, number = tag.partition("-")
    if machine != f"{_machine():08x}" or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


@cache
def _machine() -> int:
    """Return what tells where a process number means something: the machine since its start, and the namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no Linux
        parts += [str(Path("/proc/self/ns/pid").readlink()), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return zlib.crc32(" ".join(parts).encode())


def new_folder(name: str) -> Path:
    """Return ``runs/NAME-TIME-XXXX`` under the working directory; two that start in one second have two."""
    return Path.cwd() / "runs" / f"{file_name(name)}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError:
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def place_caches() -> None:
    """Name a place for caches where the user has no home folder to write to: an unknown uid in a container, say.

    Variables that are set stay, and so do caches that are there: they can be read at least.
    """
    base = None
    with contextlib.suppress(RuntimeError):  # pathlib's word for "no home folder"
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if writable(base):
            return
    with contextlib.suppress(OSError):  # no temporary folder, or one of somebody else's: whoever needs it says so
        own = Path(tempfile.gettempdir()) / f"fedmaestro-{os.getuid()}"
        if own.exists() and own.stat().st_uid != os.getuid():
            return
        for variable, name in CACHES.items():
            if base is None or not (base / name).exists():
                os.environ.setdefault(variable, str(own / name))
