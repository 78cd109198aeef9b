"""The one reader of what runs leave behind."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedmaestro.errors import UserError, reason_of
from fedmaestro.places import read_file
from fedmaestro.runs.records import Record, RoundRecord, Summary

R = TypeVar("R", bound=Record)

FORMATS = {1}
"""Numbers of the formats that this version reads."""


@dataclass(frozen=True)
class RunRecord:
    """A run folder.

    Attributes:
        path: the folder.
        rounds: the lines of ``rounds.jsonl``; round 0 is the initial model.
        summary: ``summary.json``, or None when the run was killed before it was written.
        config: ``config.toml`` as nested tables; empty when the file is missing.
    """

    path: Path
    rounds: tuple[RoundRecord, ...]
    summary: Summary | None
    config: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the last round was reached: a run that Ctrl-C stopped has a summary too."""
        return self.summary is not None and not self.summary.interrupted


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: the folder does not exist, is no run folder, or one of its files is corrupt.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"run folder {str(path)!r} does not exist: give a folder that 'fedmaestro run' wrote")
    if not (path / "rounds.jsonl").is_file():
        raise UserError(f"{str(path)!r} is not a run folder: it has no rounds.jsonl")
    summary = path / "summary.json"
    return RunRecord(
        path=path,
        rounds=tuple(read_lines(path / "rounds.jsonl", RoundRecord)),
        summary=read_json(summary, Summary) if summary.is_file() else None,
        config=read_toml(path / "config.toml") if (path / "config.toml").is_file() else {},
    )


def read_lines(path: Path, kind: type[R]) -> list[R]:
    """Read one record per line; a file that does not exist has none.

    Every line that was written completely ends with a line feed. What a crash leaves of one it cut short has none: it
    counts if it is a whole record, and is left out if it is not.

    Raises:
        UserError: another line is no record.
    """
    *lines, rest = read_file(path, None).split(b"\n") if path.exists() else [b""]
    records = [_parsed(line, kind, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*records, _parsed(rest, kind, "")] if rest.strip() else records
    except UserError:
        return records


def read_json(path: Path, kind: type[R]) -> R:
    """Read a file that holds one record.

    Raises:
        UserError: it cannot be read, is none, or has a format of another version.
    """
    try:
        content = read_file(path, None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _parsed(content, kind, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read nested tables.

    Raises:
        UserError: it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(read_file(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None


def parse(content: dict[str, Any], kind: type[R], where: str) -> R:
    """Return the record that a JSON object is; UserError as in ``read_json``."""
    if not isinstance(number := content.get("format", 1), int) or number not in FORMATS:
        raise UserError(f"{where}: format {number!r} is not one that this version reads ({_listed(FORMATS)})")
    try:
        return kind.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key} is wrong: {reason_of(first)}") from None


def _parsed(content: bytes, kind: type[R], where: str) -> R:
    try:
        found = json.loads(content)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{where}: not valid JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return parse(found, kind, where)


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
