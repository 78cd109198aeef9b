"""What a group lasso leaves of the columns that few devices train.

    python experiments/lasso_tail.py [EXPERIMENT.toml] --lasso 0 1e-3 3e-3 1e-2 [--data-dir DIR] [--set KEY=VALUE …]

Runs an experiment (the embedded digits by default) once per weight on the ``skewed`` fleet, where 5, 15 and 40 % of the
devices hold the columns beyond the edge of its second, third and last tier, and prints a Markdown table: accuracy per
tier in %, and the energy share beyond each tier's edge in %, before and after. The energy of a column is
``(‖u_b‖·‖v_b‖)²``; shares are of the layer's energy, averaged over the layers.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import fedmaestro
from fedmaestro.config.base import parse_assignment
from fedmaestro.config.experiment import load_config
from fedmaestro.fleet.plan import Plan
from fedmaestro.lod.suffix import factor_strengths
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.server import start
from fedmaestro.runs.model import read_model
from fedmaestro.submodel import State

DIGITS = {"train.strategy": "nested", "data.devices": 40}
"""The smallest tier of the fleet needs 20 devices; with 40, the largest has two."""


def tail_shares(state: State, plan: Plan) -> list[float]:
    """Return the energy share beyond the edge of every tier but the largest, in %."""
    shares = []
    for tier in plan.tiers[1:]:
        ranks = tier.serves.size.ranks or {}
        energies = {x: factor_strengths(state[f"{x}.u"], state[f"{x}.v"]).double().square() for x in ranks}
        shares.append(100 * mean(float(e[ranks[x] :].sum() / e.sum()) for x, e in energies.items()))
    return shares


def row(name: str, accuracies: list[str], shares: list[float]) -> str:
    """Return one line of the table."""
    return f"| {' | '.join([name, *accuracies, *(f'{share:.3g}' for share in shares)])} |"


def main() -> None:
    """Run the experiment for every weight and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="TOML file; the embedded digits by default")
    parser.add_argument("--lasso", nargs="+", type=float, default=[0.0, 1e-3, 3e-3, 1e-2], help="weights of the lasso")
    parser.add_argument("--data-dir", help="folder of local data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    args = parser.parse_args()
    overrides: dict[str, Any] = {"fleet.preset": "skewed", **({} if args.experiment else DIGITS)}
    overrides |= dict(parse_assignment(text) for text in args.set)
    if args.data_dir:
        overrides["data.dir"] = str(Path(args.data_dir).absolute())
    env = open_environment(load_config(args.experiment, overrides))
    names = [tier.tier.name for tier in env.plan.tiers]
    print(f"| λ | {' | '.join(names)} | {' | '.join(f'beyond {name}' for name in names[1:])} |")
    print("|---" * (2 * len(names)) + "|")
    initial = start(env).models[None]
    print(row("start", ["–"] * len(names), tail_shares(initial, env.plan)), flush=True)
    for weight in args.lasso:
        with tempfile.TemporaryDirectory() as out:
            changes = {**overrides, "train.group-lasso": weight}
            run = fedmaestro.run(args.experiment, overrides=changes, out=Path(out) / "run")
            accuracies = [f"{100 * run.summary['tiers'][name]['final_accuracy']:.2f}" for name in names]
            print(row(f"{weight:g}", accuracies, tail_shares(read_model(run.path)[0], env.plan)), flush=True)


if __name__ == "__main__":
    main()
