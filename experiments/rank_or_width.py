"""Mixtures of width and rank for one network of all devices, at the MACs of the demo's smallest tier.

    python experiments/rank_or_width.py [--macs 4096] [--seeds 10 11]

Embedded digits, `partitioned` (every device trains the same ranks of a network of this width) and, last, the dense
network as wide as the MACs allow (`fedavg-small`). Prints a Markdown table of final test accuracy in %.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import fedmaestro

WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25)


def line(name: str, settings: dict[str, Any], seeds: list[int], folder: Path) -> str:
    """Return the table's line of one network."""
    runs = [
        fedmaestro.run(None, overrides={**settings, "seed": seed}, out=folder / f"{name}-{seed}", actors=0)
        for seed in seeds
    ]
    tiers = [run.summary["tiers"]["device"] for run in runs]
    ranks = " ".join(f"{key} {value}" for key, value in tiers[0]["ranks"].items())
    scores = ", ".join(f"{100 * tier['final_accuracy']:.1f}" for tier in tiers)
    return f"| {name} | {ranks} | {tiers[0]['macs_per_example']:,} | {scores} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "fleet.toml").write_text(f"[tiers.device]\nshare = 1.0\nmacs = {asked.macs}\n", encoding="utf-8")
        shared = {"fleet.file": str(folder / "fleet.toml"), "train.evaluate-every": 60, "model.keep-dense": "head"}
        print("| network | ranks, or its width | MACs | accuracy |\n|---|---|---:|---|")
        for width in WIDTHS:
            settings = {**shared, "train.strategy": "partitioned", "model.width": width}
            print(line(f"width {width:g}", settings, asked.seeds, folder), flush=True)
        print(line("dense", {**shared, "train.strategy": "fedavg-small"}, asked.seeds, folder))


if __name__ == "__main__":
    main()
