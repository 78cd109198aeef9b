"""The processes of a run: where they listen, how they end when they are told to, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.support.processes import listening, processes_with, wait_for_end

MARK = "FEDMAESTRO_TEST_MARK"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same as IPv6 writes it, and ::1."""

MANY = ("--set", "train.rounds=5000", "--set", "train.evaluate-every=1000", "--set", "data.devices=20")


def start(mark: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fedmaestro.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark},
    )


def wait_for_lines(file: Path, count: int, process: "subprocess.Popen[str]", seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{file} has not {count} lines after {seconds} s"
        time.sleep(0.1)


def names(processes: list[int]) -> list[str]:
    return [Path(f"/proc/{x}/cmdline").read_text().replace("\0", " ") for x in processes if Path(f"/proc/{x}").exists()]


def test_sigterm_ends_a_run_in_order_and_nobody_else_can_reach_it(tmp_path: Path) -> None:
    """What schedulers send: as the first Ctrl-C. Ray's own handler would print its stack and abort."""
    mark, out = uuid.uuid4().hex, tmp_path / "run"
    process = start(mark, "run", "--actors", "2", "--out", str(out), *MANY)
    deadline = time.monotonic() + 90
    while sum(name.startswith("ray::RayHost") for name in names(processes_with(MARK, mark))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the actors have not started"
        time.sleep(0.2)
    wait_for_lines(out / "rounds.jsonl", 3, process)
    ours = processes_with(MARK, mark)
    hosts = [x for x in ours if Path(f"/proc/{x}/cmdline").read_text().startswith("ray::RayHost")]
    assert len(hosts) == 2
    assert {os.getpriority(os.PRIO_PROCESS, host) for host in hosts} == {os.getpriority(os.PRIO_PROCESS, process.pid)}
    addresses = listening(ours)
    assert addresses, "Ray listens somewhere"
    assert addresses <= LOOPBACK
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stdout + stderr
    assert "interrupted after round" in stdout
    assert not stderr, stderr
    assert json.loads((out / "summary.json").read_text())["interrupted"]
    assert not wait_for_end(MARK, mark, 10)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", ["run", "compare", "train"])
def test_every_command_ends_in_order(tmp_path: Path, command: str, number: signal.Signals) -> None:
    out = tmp_path / "out"
    options = {
        "run": ("--actors", "0", *MANY),
        "compare": ("--actors", "0", "--strategies", "nested", "--seeds", "1", *MANY),
        "train": ("--set", "train.epochs=2000"),
    }[command]
    files = {
        "run": out / "rounds.jsonl",
        "compare": out / "cells" / "nested-seed0" / "rounds.jsonl",
        "train": out / "epochs.jsonl",
    }
    process = start(uuid.uuid4().hex, command, "--out", str(out), *options)
    wait_for_lines(files[command], 3, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stdout + stderr
    assert "interrupted" in stdout + stderr
    assert "Traceback" not in stdout + stderr
    if command != "compare":
        assert json.loads((out / "summary.json").read_text())["interrupted"]


TWICE = {
    "run": ("run", "--actors", "2", *MANY),
    "run-here": ("run", "--actors", "0", *MANY),
    "compare": ("compare", "--actors", "2", "--strategies", "nested", "--seeds", "1", *MANY),
    "train": ("train", "--set", "train.epochs=2000"),
}


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.02, 0.5])
@pytest.mark.parametrize("when", ["at once", "while it works"])
@pytest.mark.parametrize("command", TWICE)
def test_ctrl_c_twice_ends_every_command_at_once(tmp_path: Path, command: str, when: str, pause: float) -> None:
    """Without a traceback, and nothing of it is left; what is complete can be resumed."""
    mark, out = uuid.uuid4().hex, tmp_path / "out"
    process = start(mark, *TWICE[command], "--out", str(out))
    if when == "at once":
        time.sleep(1.5)
    else:
        below = {"train": "epochs.jsonl", "compare": "cells/nested-seed0/rounds.jsonl"}.get(command, "rounds.jsonl")
        wait_for_lines(out / below, 3, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    stdout, stderr = process.communicate(timeout=30)
    # A shell says 130 of a process that the second one has ended, too.
    assert process.returncode in (130, -signal.SIGINT), (process.returncode, stdout, stderr)
    assert "Traceback" not in stdout + stderr, stdout + stderr
    # Ray's agents find out within a minute that their raylet was not ended in order.
    assert not wait_for_end(MARK, mark, 90)
