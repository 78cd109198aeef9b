"""The parameter sweep of examples/ runs as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_sweep_chooses_and_runs_the_best_settings_once_more(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    command = [sys.executable, str(ROOT / "examples" / "sweep_optuna.py"), "--trials", "2", "--rounds", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    best, final = [line for line in done.stdout.splitlines() if line.startswith(("best on", "on the test set"))]
    assert "train.lr" in best
    assert 0 < float(final.rpartition(" ")[2]) <= 1
    assert sorted(path.name for path in (tmp_path / "runs" / "sweep").iterdir()) == ["best", "trial-0", "trial-1"]
