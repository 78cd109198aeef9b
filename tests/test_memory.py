"""Freed memory stays with a process that trains: the system need not fill pages with zeros at every step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = """
import sys
import torch
from fedmaestro.memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def step():
    # As activations are: several blocks that live at the same time.
    return [torch.ones(2**21) for _ in range(8)]
for _ in range(3):
    blocks = step()
    before = resident()
    del blocks
    freed = before - resident()
print(kept, freed)
"""


def freed(*arguments: str, **environment: str) -> tuple[bool, float]:
    """Return whether memory is kept, and how much of 64 MiB a step gives back at its end."""
    done = subprocess.run(
        [sys.executable, "-c", KEPT, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    kept, count = done.stdout.split()
    return kept == "True", float(count)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_steps_give_nothing_back() -> None:
    kept, bytes_ = freed("keep")
    if not kept:
        pytest.skip("this C library is not glibc")
    # Without it, they do or do not: that depends on what lies behind the blocks.
    assert bytes_ < 2**20


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_user_has_set_stays(setting: dict[str, str]) -> None:
    assert not freed("keep", **setting)[0]
