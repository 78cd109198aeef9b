"""The same job, of own code, through Flower's own command: `flwr run` gives the model that `fedmaestro run` gives."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmaestro.config.experiment import load_config
from fedmaestro.runs.starter import write_starter

ROOT = Path(__file__).parents[2]

EXPERIMENT = """
seed = 3
out = "{out}"
use = "{code}"

[data]
name = "waves"
partition = "natural"
metrics = "worst-class accuracy"

[model]
name = "gru"

[fleet]
preset = "phones"

[train]
strategy = "mine"
rounds = 2
devices-per-round = 6
cohort-size = 2
evaluate-every = 1
"""


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[Path]:
    """A Flower home of its own; the SuperLink that `flwr run` starts there and leaves running is stopped."""
    home = tmp_path / "flwr"
    yield home
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if str(home) in command:
            os.kill(int(entry.name), signal.SIGTERM)


def test_flwr_run_gives_the_same_model(tmp_path: Path, flower_home: Path, federate: Callable[..., Any]) -> None:
    out = tmp_path / "through-flower"
    experiment = tmp_path / "experiment.toml"
    write_starter(tmp_path / "my_paper.py")  # with a dataset, a model, an objective, an aggregation and a metric
    experiment.write_text(EXPERIMENT.format(out=out, code=tmp_path / "my_paper.py"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    federation = "num-supernodes=2 client-resources-num-cpus=1"
    command = ["flwr", "run", str(ROOT), "--run-config", str(experiment), "--federation-config", federation, "--stream"]
    log = tmp_path / "flwr.log"
    # Flower gives its SuperLink 15 seconds to start, which a busy machine can exceed; it is there the next time.
    for _ in range(3):
        # A file, not a pipe: the SuperLink that stays behind inherits it and would keep a pipe open.
        with log.open("w") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=300, check=False)
        if "Failed to start local SuperLink" not in log.read_text():
            break
    assert done.returncode == 0, log.read_text()
    assert (out / "summary.json").exists(), log.read_text()
    through_flower = json.loads((out / "summary.json").read_text())
    assert through_flower["failed"] == 0
    here, _, _ = federate({key: x for key, x in load_config(experiment).flat().items() if key != "out"})
    assert through_flower["model_sha256"] == here["model_sha256"]
    assert {n: t["final_worst-class"] for n, t in through_flower["tiers"].items()} == {
        n: t["final_worst-class"] for n, t in here["tiers"].items()
    }
    assert re.search(r"round 2: flagship \d", log.read_text())
