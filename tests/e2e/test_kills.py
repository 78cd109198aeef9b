"""Hosts and the driver are killed at random moments; every run ends with the model of the one that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fedmaestro

KILLS = int(os.environ.get("FEDMAESTRO_KILLS", "12"))
"""How many there are; 100 take about ten minutes on two cores."""

SECONDS = 20
"""What each may take, on a machine that does other things too."""

SETTINGS = {"train.rounds": 150, "train.evaluate-every": 30, "train.cohort-size": 2}
"""Some 15 seconds of work: a run sees several kills, and kills see several runs."""


class Driver:
    """``fedmaestro run`` in a process of its own; begun anew, it goes on with what its folder holds."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.resumed = (out / "config.toml").exists()
        settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
        given = ["--resume"] if self.resumed else settings
        command = [sys.executable, "-m", "fedmaestro.cli", "run", "--actors", "2", "--out", str(out), *given]
        self._log = out.with_suffix(".txt").open("a")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def ray(self) -> dict[int, str]:
        """Return the processes of its Ray with their titles."""
        titles = {pid: _title(pid) for pid in _below(self.process.pid)}
        return {pid: title for pid, title in titles.items() if "ray" in title}

    def works(self) -> bool:
        """Return whether it is between the first round and the last."""
        return 0 < self.rounds() <= int(SETTINGS["train.rounds"])

    def rounds(self) -> int:
        """Return how many rounds are complete."""
        path = self.out / "rounds.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def end(self) -> None:
        """Kill it, if it is still there, and with it the Ray that it has started."""
        self.process.kill()
        self.process.wait()
        self._log.close()


def _below(pid: int) -> set[int]:
    """Return all processes that descend from one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, todo = set(), [pid]
    while todo:
        more = children.get(todo.pop(), [])
        found |= {*more}
        todo += more
    return found


def _title(pid: int) -> str:
    """Return the name of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_kills_at_random_moments_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    undisturbed = fedmaestro.run(overrides=SETTINGS, out=tmp_path / "undisturbed", actors=0).summary["model_sha256"]
    rng, kills, models, at, seen = random.Random(0), Counter[str](), list[str](), list[int](), dict[int, str]()
    deadline = time.monotonic() + 120 + SECONDS * KILLS
    driver, victim = Driver(tmp_path / "run0"), _victim(rng)
    try:
        while kills.total() < KILLS or driver.process.poll() is None:
            assert time.monotonic() < deadline, f"after {dict(kills)} kills, run {len(models)} does not end"
            if driver.process.poll() is not None:
                models.append(_model(driver))
                driver.end()
                driver = Driver(tmp_path / f"run{len(models)}")
            time.sleep(rng.uniform(0.05, 3))
            if kills.total() == KILLS or not driver.works():
                continue
            processes = driver.ray()
            seen |= processes
            hosts = [pid for pid, title in processes.items() if title.startswith("ray::RayHost")]
            if victim == "driver":
                driver.end()
            elif hosts:
                os.kill(rng.choice(hosts), signal.SIGKILL)
            else:
                continue
            at.append(driver.rounds())
            kills[victim] += 1
            driver = Driver(driver.out) if victim == "driver" else driver
            victim = _victim(rng)
        models.append(_model(driver))
    finally:
        driver.end()
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{dict(kills)} killed in {len(models)} runs, {seconds:.0f} s; after rounds {at}")
    assert set(models) == {undisturbed}
    while left := [title for pid, title in seen.items() if _title(pid) == title]:
        assert time.monotonic() < deadline, f"a Ray outlives its driver: {left}"
        time.sleep(0.1)


def _victim(rng: random.Random) -> str:
    return "driver" if rng.random() < 0.25 else "host"


def _model(driver: Driver) -> str:
    assert driver.process.returncode == 0, driver.out.with_suffix(".txt").read_text()[-3000:]
    summary: dict[str, Any] = json.loads((driver.out / "summary.json").read_text())
    assert summary["failed"] == 0
    assert summary["rounds"] == SETTINGS["train.rounds"]
    return str(summary["model_sha256"])
