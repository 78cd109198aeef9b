"""Runs inside a Ray Tune trial: with CPUs of the trial's placement group, and with none to spare."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRIALS = """
import sys
import ray
from ray import tune
import fedmaestro

def trial(config):
    overrides = {"train.rounds": 2, "train.evaluate-every": 5, "seed": config["seed"]}
    out = f"{config['out']}/{config['kind']}-{config['seed']}"
    summary = fedmaestro.run(overrides=overrides, out=out).summary
    tune.report({"accuracy": summary["mean_tier_accuracy"]})
    assert ray.is_initialized()

if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    for kind, bundles in (("alone", [{"CPU": 1}]), ("group", [{"CPU": 1}, {"CPU": 1}])):
        space = {"seed": tune.grid_search([0, 1]), "out": sys.argv[1], "kind": kind}
        placed = tune.with_resources(trial, tune.PlacementGroupFactory(bundles))
        storage = tune.RunConfig(storage_path=sys.argv[1] + "/tune", verbose=0)
        results = tune.Tuner(placed, param_space=space, run_config=storage).fit()
        assert not results.errors, results.errors
        print(kind, sorted(result.metrics["accuracy"] for result in results))
    print("still there", ray.is_initialized())
"""


@pytest.mark.slow
def test_trials_give_what_this_process_gives(federate: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="Ray Tune is no dependency of FedMaestro's")
    (tmp_path / "trials.py").write_text(TRIALS)
    command = [sys.executable, str(tmp_path / "trials.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "still there True" in done.stdout
    import json

    for seed in (0, 1):
        summary, _, _ = federate({"train.rounds": 2, "train.evaluate-every": 5, "seed": seed})
        for kind in ("alone", "group"):
            found = json.loads((tmp_path / f"{kind}-{seed}" / "summary.json").read_text())
            assert found["model_sha256"] == summary["model_sha256"], (kind, seed)
