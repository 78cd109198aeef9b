"""Processes, found by what is in their environment: children that left their parents have it too."""

import os
import signal
import time
from pathlib import Path


def processes_with(variable: str, value: str) -> list[int]:
    """Return the processes that have a variable of their environment set to ``value``."""
    mark, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # gone, or of another user
            continue
    return found


def wait_for_end(variable: str, value: str, seconds: float) -> list[int]:
    """Return the processes that are still there after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_with(variable, value)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def end(variable: str, value: str) -> None:
    """End them, at first in their own way."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        for process in processes_with(variable, value):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        wait_for_end(variable, value, 10)
    assert not processes_with(variable, value)
