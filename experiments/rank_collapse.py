"""Draw the rank collapse: tail energy over rounds of a finished comparison, for a few of its strategies.

    python experiments/rank_collapse.py COMPARISON_DIR OUT_WITHOUT_SUFFIX STRATEGY…

The tail is what lies beyond the smallest tier's ranks; 0 means that all tiers are one small model.
"""

import sys
from pathlib import Path

from fedmaestro.report.compare_curves import tail_energy_figure
from fedmaestro.report.figure import save_figure
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import Results


def main(folder: str, out: str, *names: str) -> None:
    """Write ``OUT.png`` and ``OUT.svg``."""
    results = read_json(Path(folder) / "results.json", Results)
    rows = {row.name: row for row in results.strategies}
    if missing := [name for name in names if name not in rows]:
        sys.exit(f"{folder} has no strategy {missing[0]!r}: it has {', '.join(rows)}")
    figure = tail_energy_figure(results.model_copy(update={"strategies": [rows[name] for name in names]}))
    for path in save_figure(figure, out):
        print(path)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
