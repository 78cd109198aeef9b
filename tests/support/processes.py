"""Processes, found by what is in their environment: children that left their parents have it too."""

import os
import signal
import time
from collections.abc import Iterable
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


def listening(processes: Iterable[int]) -> set[str]:
    """Return the addresses, in hexadecimal as the kernel writes them, at which processes wait for TCP connections."""
    inodes = set()
    for process in processes:
        try:
            for link in Path(f"/proc/{process}/fd").iterdir():
                if (target := str(link.readlink())).startswith("socket:"):
                    inodes.add(target[len("socket:[") : -1])
        except OSError:  # gone
            continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}
