"""Folders: which can be written, and where caches go when the user has none."""

import contextlib
import os
import tempfile
from pathlib import Path

CACHES = {"FEDMAESTRO_CACHE": "fedmaestro", "HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib"}
"""Variables that say where caches are, and what these are called below the user's cache folder."""


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
