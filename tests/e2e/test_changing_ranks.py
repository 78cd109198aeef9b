"""Ranks that change during a run, on Flower and Ray: every actor follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedmaestro

CHANGING = {
    "train.rounds": 4,
    "train.evaluate-every": 2,
    "ranks.shrink-every": 1,
    "ranks.shrink-min-updates": 1,
    "ranks.shrink-threshold": 0.5,
    "train.group-lasso": 0.01,
    "ranks.rule": "learned",
}


def test_actors_follow_the_ranks(federate: Callable[..., Any], tmp_path: Path) -> None:
    run = fedmaestro.run(overrides=CHANGING, out=tmp_path / "run", actors=2)
    summary, folder, _ = federate(CHANGING)
    assert len({str(record.ranks) for record in run.rounds}) > 2
    assert [record.failed for record in run.rounds] == [0] * 5
    assert [record.full_ranks for record in run.rounds] == [record.full_ranks for record in folder.read_rounds()]
    assert run.summary["model_sha256"] == summary["model_sha256"]
    assert run.summary["tiers"] == summary["tiers"]
