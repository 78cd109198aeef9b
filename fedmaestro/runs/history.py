"""The history of a run as it was written: a checkpoint holds its hash, so a resume finds out what was changed since."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from fedmaestro.errors import UserError
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import DeviceRecord, Record, RoundRecord, Summary


class HistoryHash:
    """Hashes the lines of ``rounds.jsonl`` and ``devices.jsonl`` as they are written.

    Args:
        rounds: that are there already.
        devices: likewise.
    """

    def __init__(self, rounds: Iterable[RoundRecord] = (), devices: Iterable[DeviceRecord] = ()) -> None:
        self._hash = hashlib.sha256()
        by_round = {record.round: record for record in devices}
        for record in rounds:
            if (of_devices := by_round.pop(record.round, None)) is not None:
                self.add(of_devices)
            self.add(record)
        for left in by_round.values():
            self.add(left)

    def add(self, record: RoundRecord | DeviceRecord) -> None:
        """Take note of a line; that of the devices comes before that of their round."""
        self._hash.update(json.dumps([type(record).__name__, _content(record)], sort_keys=True).encode())

    @property
    def digest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def kept_rounds(folder: RunFolder, last: int, digest: str | None) -> tuple[list[RoundRecord], HistoryHash]:
    """Return the rounds of a folder up to the last one of its checkpoint, and drop what is beyond.

    Args:
        folder: of the run.
        last: round of the checkpoint; -1: there is none.
        digest: of the history when the checkpoint was made; None: it does not say.

    Raises:
        UserError: rounds are missing, come twice, or are not what the run has written; nothing is changed then.
    """
    rounds = [record for record in folder.read_rounds() if record.round <= last]
    numbers = [record.round for record in rounds]
    _check(folder, numbers, last)
    devices = [record for record in folder.read_devices() if record.round <= last] if folder.devices.exists() else []
    history = HistoryHash(rounds, devices)
    if digest is not None and history.digest != digest:
        raise UserError(
            f"{folder.rounds} or {folder.devices.name} is not what this run has written up to round {last}: "
            "restore it, or start a new run"
        )
    folder.keep_rounds(last)
    return rounds, history


def _content(record: Record) -> dict[str, Any]:
    """Return what a record says that goes without saying otherwise: a later version's further fields change nothing."""
    return record.model_dump(mode="json", exclude_defaults=True)


def seal_of(summary: Summary, history: HistoryHash) -> str:
    """Return what a summary and the history that it is about are recognised by."""
    content = _content(summary.model_copy(update={"seal": ""}))
    return hashlib.sha256(json.dumps([content, history.digest], sort_keys=True).encode()).hexdigest()


def check_seal(folder: RunFolder) -> None:
    """Raise UserError unless the results of a run are as they were written (those of old versions do not say)."""
    summary = read_json(folder.summary, Summary)
    devices = folder.read_devices() if folder.devices.exists() else []
    if summary.seal and summary.seal != seal_of(summary, HistoryHash(folder.read_rounds(), devices)):
        raise UserError(
            f"{folder.summary} or {folder.rounds.name} is not what the run has written: restore it, or remove "
            f"{folder.path} to run it again"
        )


def _check(folder: RunFolder, numbers: Sequence[int], last: int) -> None:
    if numbers == list(range(last + 1)):
        return
    wrong = next((i for i, number in enumerate(numbers) if number != i), len(numbers))
    raise UserError(
        f"{folder.rounds} has {len(numbers)} rounds up to {last}, and round {wrong} is not where it should be: restore "
        "it, or start a new run"
    )
