"""Atomic checkpoints: tensors under keys of several parts, and a few facts; safetensors and JSON, no pickle."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmaestro.errors import UserError
from fedmaestro.places import read_file
from fedmaestro.runs.folder import write_atomically

Key = tuple[str, ...]
"""Where a tensor belongs, for example ``("memory", "optimizer", "momentum", "fc1.u")``; parts may hold anything."""

FORMAT = 3

POINTER = "progress.json"
"""Says which is the newest checkpoint, and whatever of it is no tensor."""

OLDER = "older.json"
"""The same of the one before."""

log = logging.getLogger("fedmaestro")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that the next round or step depends on besides the configuration (random draws derive from the seed)."""

    number: int
    """Of the last complete round or step."""
    tensors: Mapping[Key, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever is no tensor: values that JSON holds."""
    fingerprint: str = ""
    """Of the data, and of whatever else must not change in a continuation."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``round-N.safetensors``, then point ``progress.json`` at it, then remove all but it and the one before.

    A crash between any two steps leaves a checkpoint that loads, and so does damage to the newest one.
    """
    name = _file_name(checkpoint.number)
    # The file is the one place where a key is a string: its parts are quoted, so that slashes part them.
    content = save({file_key(*key): tensor.contiguous() for key, tensor in checkpoint.tensors.items()})
    facts = dict(checkpoint.facts)
    progress = {
        "format": FORMAT,
        "round": checkpoint.number,
        "file": name,
        "sha256": _digest(content, facts),
        "facts": facts,
        "fingerprint": checkpoint.fingerprint,
    }
    progress["seal"] = _seal(progress)
    write_atomically(folder / name, content)
    if (before := _before(folder, checkpoint.number)) is not None:
        write_atomically(folder / OLDER, before)
    write_atomically(folder / POINTER, json.dumps(progress))
    remove_unused(folder)


def remove_unused(folder: Path) -> None:
    """Remove tensors of no checkpoint: of those before these two, and what a crash has left."""
    if (newest := _target(folder / POINTER)) is not None:
        for file in folder.glob("round-*.safetensors"):
            if file.name not in (newest, _target(folder / OLDER)):
                file.unlink()


def _before(folder: Path, number: int) -> bytes | None:
    """Return the pointer to the checkpoint before that of a number; None: there is none that could be read."""
    target = _target(folder / POINTER)
    if target is None or target >= _file_name(number) or not (folder / target).exists():
        return None  # the newest one was damaged, so that the older one stays what it is
    return read_file(folder / POINTER)


def _target(pointer: Path) -> str | None:
    """Return the name of the file that a pointer is about; None: it does not say."""
    try:
        name = json.loads(read_file(pointer))["file"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the last checkpoint, or None when there is none yet; where it is damaged, the one before, with a warning.

    Raises:
        UserError: corrupt checkpoints, or one of another version.
    """
    newest, older = folder / POINTER, folder / OLDER
    if not newest.exists() and not older.exists():
        return None
    try:
        return _load(newest)
    except UserError as error:
        if isinstance(error, _OtherVersionError) or not older.exists():
            raise
        try:
            found = _load(older)
        except UserError:
            raise error from None
        log.warning("%s; going on from the one before, of number %d", _what(error), found.number)
        return found


class _OtherVersionError(UserError):
    """A checkpoint of another version of this project."""


def _what(error: UserError) -> str:
    """Return what an error says, without its advice."""
    return str(error).rpartition(": ")[0]


def _load(pointer: Path) -> Checkpoint:
    folder = pointer.parent
    try:
        progress = json.loads(read_file(pointer).decode("utf-8"))
        if (number := progress.get("format", 1)) != FORMAT:
            raise _OtherVersionError(
                f"the checkpoint in {folder} has format {number}, this version reads {FORMAT}: start anew"
            )
        if progress.get("seal", sealed := _seal(progress)) != sealed:
            raise ValueError("it is not as it was written")
        if progress["file"] != _file_name(progress["round"]):  # nothing else is read, wherever it lies
            raise ValueError(f"it names {progress['file']!r}")
        content = read_file(folder / progress["file"], None)
        tensors = {tuple(map(unquote, key.split("/"))): tensor for key, tensor in load(content).items()}
        intact = progress["sha256"] == _digest(content, progress["facts"])
        checkpoint = Checkpoint(
            number=progress["round"], tensors=tensors, facts=progress["facts"], fingerprint=progress["fingerprint"]
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"the checkpoint in {folder} cannot be read ({reason}): start a new run") from None
    if not intact:
        raise UserError(f"the checkpoint {folder / progress['file']} is corrupt: start a new run")
    return checkpoint


def below(tensors: Mapping[Key, Tensor], *prefix: str) -> dict[Key, Tensor]:
    """Return the tensors whose keys start with ``prefix``, under what is left of their keys."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key[: len(prefix)] == prefix}


def file_key(*parts: str) -> str:
    """Return the one string that stands for a key in a file."""
    return "/".join(quote(part, safe="") for part in parts)


def _digest(content: bytes, facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(content + json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _seal(progress: Mapping[str, Any]) -> str:
    """Return what says that a pointer is as it was written."""
    content = {key: value for key, value in progress.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_name(number: int) -> str:
    return f"round-{number:06d}.safetensors"
