"""A run that is killed at any operation on the disk is, once resumed, the run that nobody has disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from fedmaestro.flower.ray_runtime import OURS, forget_left_sessions

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process that has imported everything")


def crash(folder: Path, every: int, first: int) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.support.crashing", str(folder), str(every), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_run_killed_at_an_operation_on_the_disk_goes_on(tmp_path: Path) -> None:
    found = crash(tmp_path, every=37, first=9)
    assert found["bad"] == []


@pytest.mark.slow
def test_a_run_killed_at_every_operation_on_the_disk_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = crash(tmp_path, every=1, first=1)
    with capsys.disabled():
        print(f"\n{found['tried']} crash points in {found['total']} operations")
    assert found["bad"] == []


def test_sessions_of_killed_runs_are_removed_and_no_others(tmp_path: Path) -> None:
    killed, running, others = (tmp_path / f"session_{name}" for name in ("killed", "running", "others"))
    for session in (killed, running, others):
        (session / "logs").mkdir(parents=True)
    (killed / OURS).touch()
    code = """import sys, filelock
held = filelock.FileLock(sys.argv[1])
held.acquire()
print(1, flush=True)
sys.stdin.read()"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(running / OURS)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    forget_left_sessions(tmp_path)
    assert {*tmp_path.iterdir()} == {running, others}
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    forget_left_sessions(tmp_path)
    assert {*tmp_path.iterdir()} == {others}
    with FileLock(others / OURS):
        forget_left_sessions(tmp_path)
    assert {*tmp_path.iterdir()} == {others}
