"""Why large tiers give little on skewed CIFAR-10: who holds them, what capacity is worth, what else they learn from.

    python experiments/large_tiers.py --data-dir DIR --out FOLDER [--rounds 100] [--seed 10]

`compare_cifar10_skewed.toml` with the default row, that row with self-distillation (also damped) and with mutual
distillation, and one small network for everybody; self-distillation where the four tiers have equal shares; and the
whole network on every device, an oracle.
Seed 10 is one that no table uses. Runs lie in FOLDER/NAME/cells; `book.py store` takes them as rows.
"""

import argparse
from pathlib import Path

import fedmaestro
from fedmaestro.fleet.tiers import FLEETS

EXPERIMENT = Path(__file__).with_name("compare_cifar10_skewed.toml")
SMALL = "fedavg-small+train.logit-adjustment=1+server.optimizer=momentum+server.momentum=0.5"
SELF = "fedmaestro+train.objective=self-distillation"
ROWS = [
    "default:fedmaestro",
    f"self:{SELF}",
    f"damped:{SELF}+server.damping=10+server.lr=2",
    "mutual:fedmaestro+train.objective=mutual-distillation",
    f"small:{SMALL}",
]


def main() -> None:
    """Run the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=10)
    asked = parser.parse_args()
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    tiers = FLEETS["skewed"].tiers
    fleets = {"equal": [tier.model_copy(update={"share": 1 / len(tiers)}) for tier in tiers]}
    fleets["whole"] = [tiers[0].model_copy(update={"share": 1.0})]
    for name, chosen in fleets.items():
        tables = (f"[tiers.{x.name}]\nshare = {x.share}\nrank-fraction = {x.rank_fraction}\n" for x in chosen)
        (asked.out / f"{name}.toml").write_text("\n".join(tables), encoding="utf-8")
    matched = {"fleet.match-macs": True, "train.rounds": asked.rounds, "train.evaluate-every": 10}
    for name, rows, settings in (
        ("skewed", ROWS, matched),
        ("equal-shares", [f"self:{SELF}"], {**matched, "fleet.file": str(asked.out / "equal.toml")}),
        ("oracle", [f"full:{SMALL}"], {**matched, "fleet.file": str(asked.out / "whole.toml")}),
    ):
        overrides = {**settings, "seed": asked.seed}
        fedmaestro.compare(EXPERIMENT, rows, 1, overrides=overrides, data_dir=asked.data_dir, out=asked.out / name)


if __name__ == "__main__":
    main()
