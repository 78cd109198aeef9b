"""Atomic checkpoints of a run, and the model artefact; safetensors and JSON, no pickle."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmaestro.errors import UserError
from fedmaestro.runs.folder import write_atomically
from fedmaestro.submodel import State

_GLOBAL, _SERVER, _UPDATES = "global/", "server/", "updates/"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that the next round depends on besides the configuration (every random draw derives from the seed)."""

    round: int
    global_state: State
    server_memory: State
    updates: State = field(default_factory=dict)
    """Device updates that have trained each column, by layer (``rederive.Ranked``)."""
    ranks: str = ""
    """Of the whole model and of the tiers (``plan.encode_ranks``); empty: those that the configuration gives."""
    fingerprint: str = ""
    """Of data, partition and fleet (``Environment.fingerprint``): a resumed run must have the same."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``round-N.safetensors``, then point ``progress.json`` at it, then remove older ones.

    A crash between any two steps leaves a checkpoint that loads.
    """
    name = _file_name(checkpoint.round)
    tensors = {_GLOBAL + k: v.contiguous() for k, v in checkpoint.global_state.items()}
    tensors |= {_SERVER + k: v.contiguous().clone() for k, v in checkpoint.server_memory.items()}
    tensors |= {_UPDATES + k: v.contiguous() for k, v in checkpoint.updates.items()}
    content = save(tensors)
    progress = {
        "round": checkpoint.round,
        "file": name,
        "sha256": _digest(content, checkpoint.ranks),
        "ranks": checkpoint.ranks,
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
        UserError: a corrupt checkpoint.
    """
    pointer = folder / "progress.json"
    if not pointer.exists():
        return None
    try:
        progress = json.loads(pointer.read_text(encoding="utf-8"))
        content = (folder / progress["file"]).read_bytes()
        tensors = load(content)
        digest = _digest(content, progress.get("ranks", ""))
        intact = progress["sha256"] == digest and progress["file"] == _file_name(progress["round"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"the checkpoint in {folder} cannot be read ({reason}): start a new run") from None
    if not intact:
        raise UserError(f"the checkpoint {folder / progress['file']} is corrupt: start a new run")
    return Checkpoint(
        round=progress["round"],
        fingerprint=progress.get("fingerprint", ""),
        ranks=progress.get("ranks", ""),
        global_state=_under(_GLOBAL, tensors),
        server_memory=_under(_SERVER, tensors),
        updates=_under(_UPDATES, tensors),
    )


def _under(prefix: str, tensors: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(content: bytes, ranks: str) -> str:
    return hashlib.sha256(content + ranks.encode()).hexdigest()


def _file_name(server_round: int) -> str:
    return f"round-{server_round:06d}.safetensors"


def write_model(folder: Path, state: State, card: dict[str, Any]) -> str:
    """Write ``model.safetensors`` and ``model.json``; return the SHA-256 of the former."""
    content = save({name: tensor.contiguous() for name, tensor in state.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    write_atomically(folder / "model.safetensors", content)
    write_atomically(folder / "model.json", json.dumps({**card, "sha256": sha256}, indent=2) + "\n")
    return sha256


def read_model(folder: Path) -> tuple[State, dict[str, Any]]:
    """Read what ``write_model`` wrote.

    Raises:
        UserError: a missing or corrupt artefact.
    """
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        content = (folder / "model.safetensors").read_bytes()
        state = load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no readable model in {folder}: {error}") from None
    if not isinstance(card, dict):
        raise UserError(f"model.json in {folder} is no model card: it holds {card!r}")
    if card.pop("sha256", digest := hashlib.sha256(content).hexdigest()) != digest:
        raise UserError(f"{folder / 'model.safetensors'} is corrupt: its SHA-256 is not that of model.json")
    return state, card
