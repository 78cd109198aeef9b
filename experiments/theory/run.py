"""Check what theory promises of LoD layers on linear maps: A, SVD recovery; B, PCA recovery; C, the data's order.

    python experiments/theory/run.py --out DIR [--seeds N]

Writes ``theory.json``, ``theory.png`` and ``theory.svg`` to DIR and prints a table; exits with 1 if a target is missed.
One core is enough for all seeds, in a few minutes.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_order import recover_data_order
from linear_maps import MAX_PREFIX_ERROR, MAX_STRENGTH_ERROR, Recovery
from pca_recovery import MAX_DATA_ERROR, POINTS, PcaRecovery, recover_pca
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from svd_recovery import recover_svd
from theory_figure import plot_theory

from fedmaestro.runs.folder import write_atomically
from fedmaestro.threads import one_thread

Result = Recovery | PcaRecovery


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One setup and its target: so many of so many seeds pass."""

    name: str
    target: str
    recover: Callable[[int], Any]
    needed: int
    seeds: int

    def limited(self, most: int | None) -> "Setup":
        """Return the same with at most ``most`` seeds and the same share of them needed."""
        seeds = self.seeds if most is None else min(self.seeds, most)
        needed = math.ceil(self.needed * seeds / self.seeds)
        return Setup(name=self.name, target=self.target, recover=self.recover, needed=needed, seeds=seeds)


_RECOVERED = f"prefix error ≤ {MAX_PREFIX_ERROR:.0e}\nstrength error ≤ {MAX_STRENGTH_ERROR}"
SETUPS = {
    "svd": Setup(name="A  SVD recovery", target=_RECOVERED, recover=recover_svd, needed=20, seeds=20),
    "pca": Setup(
        name="B  PCA recovery",
        target=f"{POINTS} columns left\ndata error ≤ {MAX_DATA_ERROR}",
        recover=recover_pca,
        needed=18,
        seeds=20,
    ),
    "order": Setup(
        name="C  order of the data",
        target=f"{_RECOVERED}\nin the order of energy",
        recover=recover_data_order,
        needed=10,
        seeds=10,
    ),
}


def run_setups(setups: dict[str, Setup], console: Console) -> dict[str, list[Any]]:
    """Run all seeds, one after the other."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, list[Any]] = {}
    with one_thread(), Progress(*columns, console=console) as progress:
        bars = {key: progress.add_task(setup.name, total=setup.seeds, start=False) for key, setup in setups.items()}
        for key, setup in setups.items():
            progress.start_task(bars[key])
            results[key] = []
            for seed in range(setup.seeds):
                results[key].append(setup.recover(seed))
                progress.advance(bars[key])
    return results


def worst(results: Sequence[Result]) -> dict[str, float]:
    """Return the largest errors over the seeds, by name."""
    spectra = [r for r in results if isinstance(r, Recovery)]
    if spectra:
        return {
            "prefix error": max(r.worst_prefix_error for r in spectra),
            "strength error": max(r.worst_strength_error for r in spectra),
            "strength of the tail": max(r.tail for r in spectra),
        }
    reduced = [r for r in results if isinstance(r, PcaRecovery)]
    return {
        "data error": max(r.data_errors[-1] for r in reduced),
        "projection error": max(r.projection_error for r in reduced),
        "importance of the tail": max(r.importances[POINTS] for r in reduced),
    }


def report(setups: dict[str, Setup], results: dict[str, list[Any]], cpu_seconds: float) -> dict[str, Any]:
    """Return what ``theory.json`` holds."""
    rows = {}
    for key, setup in setups.items():
        passed = sum(result.passed for result in results[key])
        rows[key] = {
            "target": setup.target.splitlines(),
            "seeds": setup.seeds,
            "needed": setup.needed,
            "passed": passed,
            "reached": passed >= setup.needed,
            "worst": worst(results[key]),
            "results": [asdict(result) | {"passed": result.passed} for result in results[key]],
        }
    return {"cpu_seconds": round(cpu_seconds, 1), "setups": rows}


def table(setups: dict[str, Setup], rows: dict[str, Any]) -> Table:
    """Return one row per setup."""
    shown = Table("setup", "target, per seed", "worst of all seeds", "passed", "verdict")
    for key, setup in setups.items():
        row = rows[key]
        measured = "\n".join(f"{name} {value:.1e}" for name, value in row["worst"].items())
        verdict = "[green]reached[/]" if row["reached"] else "[red]missed[/]"
        passed = f"{row['passed']} of {row['seeds']}\n(needed: {row['needed']})"
        shown.add_row(setup.name, setup.target, measured, passed, verdict)
    return shown


def main() -> None:
    """Run, write and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seeds", type=int, help="at most this many seeds per setup (default: 20, 20 and 10)")
    arguments = parser.parse_args()
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    console = Console()
    setups = {key: setup.limited(arguments.seeds) for key, setup in SETUPS.items()}
    started = time.process_time()
    results = run_setups(setups, console)
    written = report(setups, results, time.process_time() - started)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "theory.json", json.dumps(written, indent=1) + "\n")
    png, svg = plot_theory(results["svd"], results["pca"], results["order"], arguments.out / "theory")
    console.print(table(setups, written["setups"]))
    console.print(f"{png}, {svg}, {arguments.out / 'theory.json'}", soft_wrap=True)
    if not all(row["reached"] for row in written["setups"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
