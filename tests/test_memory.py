"""Freed memory stays with a process that trains: the system need not fill pages with zeros at every step."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from fedmaestro.memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def step():
    # As activations are: several blocks that live at the same time.
    return [torch.ones(2**20) for _ in range(4)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
before = faults()
for _ in range(20):
    step()
print(kept, (faults() - before) / 20)
"""


def faults(*arguments: str, **environment: str) -> tuple[bool, float]:
    """Return whether memory is kept, and the page faults of a step."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    kept, count = done.stdout.split()
    return kept == "True", float(count)


def test_steps_take_no_new_pages() -> None:
    kept, count = faults("keep")
    if not kept:
        pytest.skip("this C library is not glibc")
    _, usual = faults("leave")
    assert count < 100 < usual, "16 MiB are 4,096 pages"


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_user_has_set_stays(setting: dict[str, str]) -> None:
    assert not faults("keep", **setting)[0]
