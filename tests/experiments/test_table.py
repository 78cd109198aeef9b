import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "table.py"


def write(folder: Path, tiers: dict[str, float | None], seed: int = 0, **more: Any) -> Path:
    folder.mkdir()
    scores = {name: {"final_accuracy": value, "best_accuracy": value} for name, value in tiers.items()}
    known = [value for value in tiers.values() if value is not None]
    means = {"mean_tier_accuracy": sum(known) / len(known), "worst_tier_accuracy": min(known)}
    summary = {"strategy": "nested", "objective": "own-prefix", "seed": seed, "tiers": scores, **means, **more}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def table(*folders: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *folders], capture_output=True, text=True, check=False)


def test_runs_of_one_strategy_are_one_row(tmp_path: Path) -> None:
    runs = [write(tmp_path / str(seed), {"high": 0.9 + seed / 50, "low": 0.5}, seed) for seed in range(2)]
    done = table(*runs)
    assert done.returncode == 0
    row = "| nested | own-prefix | 91.00 ± 1.41 (91.00) | 50.00 ± 0.00 (50.00) | 70.50 ± 0.71 | 50.00 ± 0.00 | 0, 1 |"
    assert done.stdout.splitlines()[2:] == [row]


@pytest.mark.parametrize(
    ("tiers", "more", "message"),
    [
        ({"high": 0.9, "low": None}, {}, "second: tier low has no accuracy"),
        ({"high": 0.9, "tiny": 0.2}, {}, "first has high, low; "),
        ({"high": 0.9, "low": 0.5}, {"interrupted": True}, "second was interrupted"),
    ],
)
def test_runs_that_do_not_fit_are_named(
    tiers: dict[str, float | None], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    done = table(write(tmp_path / "first", {"high": 0.9, "low": 0.5}), write(tmp_path / "second", tiers, **more))
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_folder_without_summary_is_named(tmp_path: Path) -> None:
    done = table(tmp_path)
    assert done.stderr.strip() == f"{tmp_path} has no summary.json: give the folder of a finished run"
