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


def main() -> None:
    """Read the summaries and print the table, the highest mean tier accuracy first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for folder in sys.argv[1:]:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        if summary.get("interrupted"):
            sys.exit(f"{folder} was interrupted: finish it with fedmaestro run --resume --out {folder}")
        groups[summary["strategy"], summary["objective"]].append(summary)
    if not groups:
        sys.exit(__doc__)
    tiers = next(iter(groups.values()))[0]["tiers"]
    headings = ["strategy", "objective", *tiers, "mean of tiers", "worst tier", "seeds"]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    order = sorted(groups.items(), key=lambda group: -statistics.mean(run["mean_tier_accuracy"] for run in group[1]))
    for name, runs in order:
        print(row(name, runs))


if __name__ == "__main__":
    main()
