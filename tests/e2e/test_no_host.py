"""Every host is lost and none can be started: an error in time, with what is complete kept."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedmaestro

SCRIPT = """
import os, signal, subprocess, sys
import ray
import fedmaestro
from fedmaestro.errors import UserError
from fedmaestro.flower import ray_grid
from fedmaestro.rounds.observer import Observer

def no_place(host):
    raise RuntimeError("the cluster has no place")

class Losing(Observer):
    def on_round(self, record):
        if record.round == 2:
            ray_grid._Host._create = no_place
            ray_grid.ALONE_SECONDS, ray_grid.AGAIN_SECONDS = 6.0, 0.5
            names = ["pgrep", "-f", "ray::RayHost"]
            for process in subprocess.run(names, capture_output=True, text=True).stdout.split():
                os.kill(int(process), signal.SIGKILL)

if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        fedmaestro.run(overrides={"train.rounds": 5, "train.evaluate-every": 5}, out=sys.argv[1], observers=[Losing()])
    except UserError as error:
        print(type(error).__name__, error)
        sys.exit(3)
"""


def test_no_host_left_is_an_error_and_resume_goes_on(federate: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "losing.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "losing.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "NoHostsError no host is left, and none could be started for 6 s" in done.stdout
    assert "go on with --resume" in done.stdout
    summary = fedmaestro.run(out=tmp_path / "run", resume=True, actors=0).summary
    whole, _, _ = federate({"train.rounds": 5, "train.evaluate-every": 5})
    assert summary["model_sha256"] == whole["model_sha256"]
    assert summary["failed"] == 0
