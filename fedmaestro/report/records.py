"""Read the files of a run folder."""

import contextlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmaestro.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        path: The run folder.
        rounds: The lines of ``rounds.jsonl``; round 0 is the initial model.
        summary: ``summary.json``, or None when the run was killed before it was written.
        config: ``config.toml`` as nested tables; empty when the file is missing.

    """

    path: Path
    rounds: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None
    config: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the last round was reached: a run that Ctrl-C stopped has a summary too."""
        return self.summary is not None and not self.summary.get("interrupted")


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder.

    A last line of ``rounds.jsonl`` that was cut in the middle of writing (no line end) is left out.

    Raises:
        UserError: The folder does not exist, is no run folder, or one of its files is corrupt.

    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"run folder {str(path)!r} does not exist: give a folder that 'fedmaestro run' wrote")
    if not (path / "rounds.jsonl").is_file():
        raise UserError(f"{str(path)!r} is not a run folder: it has no rounds.jsonl")
    return RunRecord(
        path=path,
        rounds=_read_rounds(path / "rounds.jsonl"),
        summary=_read_summary(path / "summary.json"),
        config=_read_config(path / "config.toml"),
    )


def _read_rounds(path: Path) -> tuple[dict[str, Any], ...]:
    *lines, rest = path.read_bytes().split(b"\n")
    rounds = [_parse_round(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if rest.strip():  # no line end: complete, or cut when the run was killed
        with contextlib.suppress(UserError):
            rounds.append(_parse_round(rest, path, len(lines) + 1))
    return tuple(rounds)


def _parse_round(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Parse one line and check the shape that everything downstream relies on."""
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}, line {number}: not valid JSON ({type(error).__name__})") from None
    if not isinstance(row, dict) or not isinstance(row.get("round"), int):
        raise UserError(f"{path}, line {number}: not a round: expected an object with an integer 'round'")
    tiers = row.get("tiers") or {}
    if not isinstance(tiers, dict) or not all(isinstance(scores, dict) for scores in tiers.values()):
        raise UserError(f"{path}, line {number}: 'tiers' must map tier names to their accuracy and loss")
    return row


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it to report the run without it") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
