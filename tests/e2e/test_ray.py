"""The real runtime: Flower and Ray, small runs on the embedded digits (about 15 s each, most of it start-up)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import fedmaestro
from fedmaestro.errors import UserError
from fedmaestro.flower import ray_runtime

# Imported by Ray actors, which find it through sys.path: kills its process the first time that it sees round 2.
KILLER = """
import os
from fedmaestro.flower.client_app import app

class Killer:
    def __init__(self, marker):
        self.marker = marker

    def __call__(self, message, context):
        if message.metadata.message_type == "train" and message.content.config_records["job"]["round"] == 2:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return app(message, context)
"""


CHANGING = {
    "train.rounds": 4,
    "train.evaluate-every": 2,
    "ranks.shrink-every": 1,
    "ranks.shrink-min-updates": 1,
    "ranks.shrink-threshold": 0.5,
    "train.group-lasso": 0.01,
    "ranks.rule": "learned",
}
"""Ranks change after every round, and every actor must follow."""


class Own(nn.Module):
    """A model that only this module has: it is shipped to the actors."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body, self.more = nn.Linear(64, 128), nn.Linear(128, 128)
        self.norm, self.head = nn.BatchNorm1d(128), nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.more(self.body(x.flatten(1)).relu())).relu())
        return out


def test_two_actors_one_of_which_is_killed_give_the_model_of_this_process(
    federate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import killer  # type: ignore[import-not-found]

    marker = tmp_path / "killed"
    killing = killer.Killer(str(marker))
    run = fedmaestro.run(model=Own, overrides=CHANGING, out=tmp_path / "run", actors=2, client_app=killing)
    assert marker.exists(), "no actor was killed: the test shows nothing"
    summary, folder, _ = federate({**CHANGING, "model.name": "Own"})
    assert run.summary["model_sha256"] == summary["model_sha256"]
    assert run.summary["tiers"] == summary["tiers"]
    assert [record.failed for record in run.rounds] == [0] * 5
    assert len({str(record.ranks) for record in run.rounds}) > 2
    assert [record.full_ranks for record in run.rounds] == [record.full_ranks for record in folder.read_rounds()]


ATTACHED = """
import sys
import ray
import fedmaestro
from fedmaestro.errors import UserError

def hash_of(out, **options):
    return fedmaestro.run(overrides={"train.rounds": 2}, out=out, **options).summary["model_sha256"]

if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    hashes = {hash_of(sys.argv[1] + "/here")}
    task = ray.remote(num_cpus=1)(hash_of)
    hashes.add(ray.get(task.remote(sys.argv[1] + "/task"), timeout=120))
    taken = ray.remote(num_cpus=2)(hash_of)
    hashes.add(ray.get(taken.remote(sys.argv[1] + "/taken"), timeout=120))
    try:
        hash_of(sys.argv[1] + "/other", ray_address="127.0.0.1:1")
    except UserError as error:
        print(error)
    print("hashes", *hashes)
    print("still there", ray.is_initialized())
"""


def test_a_ray_that_runs_already_is_used_and_left_running(federate: Callable[..., Any], tmp_path: Path) -> None:
    """In the process that has initialised it, in a task, and in a task that has taken every CPU."""
    (tmp_path / "attached.py").write_text(ATTACHED)
    command = [sys.executable, str(tmp_path / "attached.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    summary, _, _ = federate({"train.rounds": 2, "train.evaluate-every": 5})
    assert f"hashes {summary['model_sha256']}\n" in done.stdout
    assert "part of a Ray already" in done.stdout
    assert "still there True" in done.stdout


LOSING = """
import os, signal, subprocess, sys
import fedmaestro
from fedmaestro.rounds.observer import Observer

class Killing(Observer):
    killed = False

    def on_round(self, record):
        if record.round >= 40 and not self.killed:
            command = ["pgrep", "-P", str(os.getpid()), "-x", sys.argv[2]]
            mine = subprocess.run(command, capture_output=True, text=True).stdout.split()
            self.killed = bool(mine)
            for process in mine:
                os.kill(int(process), signal.SIGKILL)

if __name__ == "__main__":
    overrides = {"train.rounds": 60, "train.evaluate-every": 20, "train.strategy": "nested"}
    killing = Killing()
    run = fedmaestro.run(overrides=overrides, out=sys.argv[1] + "/run", actors=2, observers=[killing])
    here = fedmaestro.run(overrides=overrides, out=sys.argv[1] + "/here", actors=0)
    same = run.summary["model_sha256"] == here.summary["model_sha256"]
    print("killed", killing.killed, "failed", sum(record.failed for record in run.rounds), "same", same)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_losing_ray_itself_changes_nothing(tmp_path: Path, name: str) -> None:
    """Each in a process of its own, which is what Ray takes along when something goes wrong."""
    (tmp_path / "losing.py").write_text(LOSING)
    command = [sys.executable, str(tmp_path / "losing.py"), str(tmp_path), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "killed True failed 0 same True" in done.stdout


ASLEEP = """
import sys, time
from flwr.clientapp import ClientApp
from fedmaestro.flower.client_app import app
import fedmaestro

class Asleep(ClientApp):
    def __call__(self, message, context):
        job = message.content.config_records["job"]
        if message.metadata.message_type == "train" and job["round"] >= 2:
            time.sleep(10**6)
        return app(message, context)

if __name__ == "__main__":
    overrides = {
        "train.rounds": 3,
        "train.evaluate-every": 3,
        "train.reply-timeout-seconds": 4,
        "train.devices-per-round": 4,
        "data.devices": 8,
        "model.name": "mlp",
    }
    run = fedmaestro.run(overrides=overrides, out=sys.argv[1] + "/run", actors=2, client_app=Asleep())
    print([record.failed_by for record in run.rounds])
"""


@pytest.mark.slow
def test_hosts_that_sleep_for_ever_cost_their_devices_and_the_process_ends(tmp_path: Path) -> None:
    (tmp_path / "asleep.py").write_text(ASLEEP)
    command = [sys.executable, str(tmp_path / "asleep.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[{}, {}, {'late': 4}, {'late': 4}]" in done.stdout


def test_ctrl_c_keeps_complete_rounds_and_resume_gives_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = [sys.executable, "-m", "fedmaestro.cli", "run", "--set", "train.rounds=200", "--out", str(out)]
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rounds = out / "rounds.jsonl"
    deadline = time.monotonic() + 120
    while not (rounds.exists() and len(rounds.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"]
    assert 3 <= summary["rounds"] < 200
    assert "fedmaestro run --resume --out" in output
    assert "Traceback" not in output
    # A shorter run of the same experiment is not the same (the learning rate depends on train.rounds).
    with pytest.raises(UserError, match=r"train\.rounds=200, not 100"):
        fedmaestro.run(overrides={"train.rounds": 100}, out=out, resume=True)


def test_a_server_that_is_not_ray_is_found_out_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "PROBE_SECONDS", 6)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match="no answer within 6 s"):
        ray_runtime.check_reachable(f"127.0.0.1:{server.getsockname()[1]}")


def test_unreachable_ray_cluster_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "-m", "fedmaestro.cli", "run", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("fedmaestro:")]
    assert len(lines) == 1
    assert "127.0.0.1:1" in lines[0]
    assert "ray start --head" in lines[0]
    assert not out.exists()
