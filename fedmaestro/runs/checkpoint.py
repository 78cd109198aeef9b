"""Atomic checkpoints: tensors under keys of several parts, and a few facts; safetensors and JSON, no pickle."""

import hashlib
import json
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
    """Write ``round-N.safetensors``, then point ``progress.json`` at it, then remove older ones.

    A crash between any two steps leaves a checkpoint that loads.
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
    write_atomically(folder / name, content)
    write_atomically(folder / "progress.json", json.dumps(progress))
    for old in folder.glob("round-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the last checkpoint, or None when there is none yet.

    Raises:
        UserError: a corrupt checkpoint, or one of another version.
    """
    pointer = folder / "progress.json"
    if not pointer.exists():
        return None
    try:
        progress = json.loads(read_file(pointer).decode("utf-8"))
        if (number := progress.get("format", 1)) != FORMAT:
            raise UserError(f"the checkpoint in {folder} has format {number}, this version reads {FORMAT}: start anew")
        content = read_file(folder / progress["file"], None)
        tensors = {tuple(map(unquote, key.split("/"))): tensor for key, tensor in load(content).items()}
        intact = progress["sha256"] == _digest(content, progress["facts"])
        intact = intact and progress["file"] == _file_name(progress["round"])
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


def _file_name(number: int) -> str:
    return f"round-{number:06d}.safetensors"
