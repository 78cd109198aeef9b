"""What a run writes down: one record per round, a summary, and the folder that holds them."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedmaestro.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One line of ``rounds.jsonl``; round 0 is the initial model."""

    round: int
    tiers: dict[str, dict[str, float | None]]
    """``{tier: {"accuracy", "loss"}}``, largest tier first; empty in rounds without evaluation.

    A loss that is not finite is None.
    """
    train_loss: float | None = None
    """Mean over the examples of all devices; None when none trained."""
    devices: int = 0
    failed: int = 0
    dropped: int = 0
    download_bytes: int = 0
    upload_bytes: int = 0
    virtual_seconds: float = 0.0
    wall_seconds: float = 0.0
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    """``{tier: {layer: rank}}`` of what serves each tier from this round's evaluation on.

    Filled where shrinking or learned ranks are on: in round 0 and after each time that ranks were derived anew.
    """
    full_ranks: dict[str, int] = field(default_factory=dict)
    """``{layer: rank}`` of the whole model, in the same rounds."""
    tail_energy: float | None = None
    """Share of the global model's energy beyond the smallest tier's ranks (``flower.spectrum.tail_energy``).

    In rounds with evaluation, where tiers are prefixes of one LoD model.
    """
    factor_bias: float | None = None
    """``flower.spectrum.factor_bias``, with ``train.record-bias``, for rules that average factors."""

    def line(self) -> str:
        """Return the JSON line."""
        return json.dumps(asdict(self)) + "\n"


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
            usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        except OSError as error:
            raise UserError(
                f"cannot write to the run folder {self.path}: {error.strerror}: choose another out"
            ) from None
        if not usable:
            raise UserError(f"cannot write to the run folder {self.path}: {existing} is not a writable folder")

    @contextmanager
    def claim(self, resume: bool) -> Iterator[None]:
        """Make the folder and keep every other run out of it.

        Raises:
            UserError: another process runs in it, it already holds a run that is not to be resumed, it cannot be made.
        """
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.path} is in use by another run: wait for it, or choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.path}: {error}") from error
        try:
            if self.holds_run() and not resume:
                raise UserError(holds_a_run(self.path))
            yield
        finally:
            lock.release()

    def append(self, record: RoundRecord) -> None:
        """Append one round."""
        append_line(self.rounds, record.line())

    def keep_rounds(self, last: int) -> list[RoundRecord]:
        """Drop every line after round ``last`` (or cut short by a crash) and return the rest."""
        kept = [record for record in self.read_rounds() if record.round <= last]
        write_atomically(self.rounds, "".join(record.line() for record in kept))
        return kept

    def read_rounds(self) -> list[RoundRecord]:
        """Return the rounds so far; a last line that a crash cut short is ignored."""
        lines = self.rounds.read_text(encoding="utf-8").splitlines() if self.rounds.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(RoundRecord(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                if number < len(lines):
                    raise UserError(f"{self.rounds}, line {number} is not a round record") from None
        return records


def holds_a_run(path: Path) -> str:
    """Return the message for a folder that is taken."""
    return f"{path} already holds a run: continue it with --resume, or choose another --out"


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that a crash may cut short, but not lose."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line.rstrip("\n") + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def tier_accuracies(records: Sequence[RoundRecord], tier: str) -> dict[int, float]:
    """Return a tier's accuracy by round, for the rounds that were evaluated."""
    scores = {record.round: record.tiers[tier]["accuracy"] for record in records if tier in record.tiers}
    return {server_round: score for server_round, score in scores.items() if score is not None}


def summarize(
    records: Sequence[RoundRecord], tiers: dict[str, dict[str, Any]], facts: dict[str, Any], model_sha256: str
) -> dict[str, Any]:
    """Return ``summary.json``.

    Args:
        records: the rounds.
        tiers: static facts per tier (ranks, parameters, MACs, …), largest first.
        facts: strategy, seed and other facts of the run.
        model_sha256: hash of ``model.safetensors``.
    """
    scored: dict[str, dict[str, Any]] = {}
    for name, static in tiers.items():
        accuracies = tier_accuracies(records, name)
        final_round = max(accuracies, default=None)
        scored[name] = {
            **static,
            "final_accuracy": None if final_round is None else accuracies[final_round],
            "final_round": final_round,
            "best_accuracy": max(accuracies.values(), default=None),
        }
    finals = [tier["final_accuracy"] for tier in scored.values() if tier["final_accuracy"] is not None]
    return {
        **facts,
        "tiers": scored,
        "mean_tier_accuracy": sum(finals) / len(finals) if finals else None,
        "worst_tier_accuracy": min(finals, default=None),
        "rounds": records[-1].round if records else 0,
        "download_bytes": sum(record.download_bytes for record in records),
        "upload_bytes": sum(record.upload_bytes for record in records),
        "failed": sum(record.failed for record in records),
        "wall_seconds": round(sum(record.wall_seconds for record in records), 3),
        "virtual_seconds": sum(record.virtual_seconds for record in records),
        "model_sha256": model_sha256,
    }
