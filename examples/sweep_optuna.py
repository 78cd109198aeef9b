"""A parameter sweep with Optuna: the learning rate and the server's optimiser of one strategy.

    pip install "fedmaestro[sweep]"
    python examples/sweep_optuna.py            # 8 trials of 10 rounds on the embedded digits

What is chosen is chosen on training examples that are held out for that (``data.validation``), never on the test set:
the test set is looked at once, for the settings that won. ``fedmaestro tune`` does this for all rows of a comparison.
"""

import argparse
from pathlib import Path

import optuna

import fedmaestro


def settings_of(trial: optuna.Trial) -> dict[str, object]:
    """Return what a trial tries."""
    optimizer = trial.suggest_categorical("server.optimizer", ["none", "momentum"])
    chosen = {"train.lr": trial.suggest_float("train.lr", 0.02, 0.5, log=True), "server.optimizer": optimizer}
    if optimizer == "momentum":
        chosen["server.lr"] = trial.suggest_float("server.lr", 0.1, 1.0)
    return chosen


def main() -> None:
    """Search, then run the best settings once more on the test set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    arguments = parser.parse_args()
    fixed = {"train.strategy": "nested", "train.rounds": arguments.rounds}

    def objective(trial: optuna.Trial) -> float:
        overrides = {**fixed, "data.validation": 0.1, **settings_of(trial)}
        run = fedmaestro.run(overrides=overrides, out=arguments.out / f"trial-{trial.number}")
        return float(run.summary["mean_tier_accuracy"])

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=arguments.trials)
    print(f"best on the validation split: {study.best_value:.4f} with {study.best_params}")
    final = fedmaestro.run(overrides={**fixed, "seed": 1, **study.best_params}, out=arguments.out / "best")
    print(f"on the test set, with a seed of its own: {final.summary['mean_tier_accuracy']:.4f}")


if __name__ == "__main__":
    main()
