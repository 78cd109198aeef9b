"""Print a Markdown table of finished runs: accuracy per tier in %, mean ± standard deviation over seeds, final (best).

    python experiments/table.py RUN_DIR…

Runs of one strategy and objective are one row; the standard deviation is that of the sample (n - 1).
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def cell(values: list[float]) -> str:
    """Return ``mean ± std`` in percent, without the latter for a single run."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def row(name: tuple[str, str], runs: list[dict[str, Any]]) -> str:
    """Return one line of the table."""
    cells = []
    for tier in runs[0]["tiers"]:
        final = cell([run["tiers"][tier]["final_accuracy"] for run in runs])
        best = statistics.mean(run["tiers"][tier]["best_accuracy"] for run in runs)
        cells.append(f"{final} ({100 * best:.2f})")
    cells.append(cell([run["mean_tier_accuracy"] for run in runs]))
    cells.append(cell([run["worst_tier_accuracy"] for run in runs]))
    seeds = ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"]))
    return f"| {name[0]} | {name[1]} | {' | '.join(cells)} | {seeds} |"


def read(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run; exit with a message where there is none, or an accuracy is missing."""
    path = folder / "summary.json"
    if not path.is_file():
        sys.exit(f"{folder} has no summary.json: give the folder of a finished run")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("interrupted"):
        sys.exit(f"{folder} was interrupted: finish it with fedmaestro run --resume --out {folder}")
    for name, tier in summary["tiers"].items():
        if tier["final_accuracy"] is None or tier["best_accuracy"] is None:
            sys.exit(f"{folder}: tier {name} has no accuracy: it was never evaluated, or its logits were not finite")
    return summary


def main() -> None:
    """Read the summaries and print the table, the highest mean tier accuracy first."""
    summaries = {folder: read(Path(folder)) for folder in sys.argv[1:]}
    if not summaries:
        sys.exit(__doc__)
    first, tiers = next((folder, list(summary["tiers"])) for folder, summary in summaries.items())
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for folder, summary in summaries.items():
        if list(summary["tiers"]) != tiers:
            others = ", ".join(summary["tiers"])
            sys.exit(f"one table needs runs of the same tiers: {first} has {', '.join(tiers)}; {folder} has {others}")
        groups[summary["strategy"], summary["objective"]].append(summary)
    headings = ["strategy", "objective", *tiers, "mean of tiers", "worst tier", "seeds"]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    order = sorted(groups.items(), key=lambda group: -statistics.mean(run["mean_tier_accuracy"] for run in group[1]))
    for name, runs in order:
        print(row(name, runs))


if __name__ == "__main__":
    main()
