"""The script: all seeds (slow), and what it writes from made-up results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from linear_maps import Recovery
from pca_recovery import PcaRecovery
from theory_figure import plot_theory

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "theory" / "run.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_all_seeds_reach_their_targets(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "new")
    assert done.returncode == 0, done.stdout + done.stderr
    setups = json.loads((tmp_path / "new" / "theory.json").read_text(encoding="utf-8"))["setups"]
    assert {key: (row["needed"], row["seeds"]) for key, row in setups.items()} == {
        "svd": (20, 20),
        "pca": (18, 20),
        "order": (10, 10),
    }
    for row in setups.values():
        assert row["passed"] == sum(result["passed"] for result in row["results"]) >= row["needed"]
        assert [result["seed"] for result in row["results"]] == list(range(row["seeds"]))
    assert setups["svd"]["worst"]["prefix error"] <= 1e-4
    assert setups["svd"]["worst"]["strength error"] <= 0.1
    for suffix in ("png", "svg"):
        assert (tmp_path / "new" / f"theory.{suffix}").stat().st_size <= 200_000
    assert done.stdout.count("reached") == 3


def test_the_figure_shows_every_seed(tmp_path: Path) -> None:
    recovered = [
        Recovery(seed=i, expected=(3.0, 2.0), strengths=(3.0, 2.1, 0.1 * i), prefix_errors=(1e-5,) * 3)
        for i in range(4)
    ]
    reduced = [
        PcaRecovery(
            seed=i,
            importances=(3.0, 2.0, 1.0, *[1e-5] * 7),
            strengths=(1.0,) * 3 + (0.0,) * 7,
            kept=3,
            data_errors=(0.0,) * 3,
            projection_error=0.0,
        )
        for i in range(3)
    ]
    png, svg = plot_theory(recovered, reduced, recovered[:1], tmp_path / "theory")
    again = plot_theory(recovered, reduced, recovered[:1], tmp_path / "again")
    assert png.read_bytes() == again[0].read_bytes()
    assert svg.read_bytes() == again[1].read_bytes()
    text = svg.read_text(encoding="utf-8")
    assert "learned, 4 seeds" in text
    assert "rank 3 in 3 of 3 seeds" in text


def test_no_seeds_are_refused(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "new", "--seeds", 0)
    assert done.returncode == 2
    assert "error: --seeds must be at least 1" in done.stderr
    assert not (tmp_path / "new").exists()
