"""Synthetic run folders."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

TIERS = ("flagship", "high", "mid", "low", "minimal")
FINALS = (0.978, 0.976, 0.974, 0.971, 0.944)

Rounds = list[dict[str, Any]]


def make_rounds(
    tiers: Sequence[str] = TIERS,
    finals: Sequence[float] = FINALS,
    last: int = 60,
    every: int = 5,
    virtual_seconds: float = 432.0,
) -> Rounds:
    """Curves that rise from 10 % and settle at ``finals``, evaluated every few rounds."""
    return [
        {
            "round": number,
            "tiers": {
                tier: {"accuracy": 0.1 + (final - 0.1) * (1 - math.exp(-number / 4)), "loss": 0.5}
                for tier, final in zip(tiers, finals, strict=True)
            }
            if number % every == 0
            else {},
            "train_loss": None if number == 0 else 1 / number,
            "devices": 10,
            "failed": int(number == 7),
            "dropped": 0,
            "download_bytes": 1_000_000 if number else 0,
            "upload_bytes": 500_000 if number else 0,
            "virtual_seconds": virtual_seconds if number else 0.0,
            "wall_seconds": 1.2,
        }
        for number in range(last + 1)
    ]


def make_summary(rounds: Rounds, strategy: str, seed: int) -> dict[str, Any]:
    last = next(row for row in reversed(rounds) if row["tiers"])["tiers"]
    finals = [scores["accuracy"] for scores in last.values()]
    tiers = {
        name: {
            "ranks": {"conv1": 6, "conv2": 16} if index == 0 else {"width": 0.5},
            "params": 61706 >> index,
            "macs_per_example": 281640 >> index,
            "train_macs_per_example": 844920 >> index,
            "train_memory_bytes": 1_900_000 >> index,
            "download_bytes": 246824 >> index,
            "final_accuracy": scores["accuracy"],
            "best_accuracy": scores["accuracy"],
            "devices": 20,
        }
        for index, (name, scores) in enumerate(last.items())
    }
    return {
        "strategy": strategy,
        "objective": "own-prefix",
        "seed": seed,
        "dataset": "mnist",
        "model": "lenet",
        "tiers": tiers,
        "mean_tier_accuracy": sum(finals) / len(finals),
        "worst_tier_accuracy": min(finals),
        "rounds": rounds[-1]["round"],
        "wall_seconds": 72.0,
        "virtual_seconds": 25920.0,
        "model_sha256": "ab" * 32,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder below ``tmp_path``."""

    def write(
        name: str = "run",
        rounds: Rounds | None = None,
        *,
        strategy: str = "nested",
        seed: int = 0,
        finished: bool = True,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = make_rounds() if rounds is None else rounds
        (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "seed": seed,
            "train": {"strategy": strategy, "objective": "own-prefix", "lr": 0.05},
            "data": {"name": "mnist", "alpha": 0.3},
            "model": {"name": "lenet"},
        }
        (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        if finished:
            summary = json.dumps(make_summary(rows, strategy, seed))
            (folder / "summary.json").write_text(summary, encoding="utf-8")
        return folder

    return write


@pytest.fixture(name="make_rounds")
def make_rounds_fixture() -> Callable[..., Rounds]:
    return make_rounds
