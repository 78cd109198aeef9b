"""Does a long run stay as large as it was? Memory, descriptors, threads and shared memory of driver and hosts by round.

    python -m benchmarks.long_run --out FOLDER [--rounds 500] [--after 50] [--limit 1.0] [-- ARGUMENTS]

Starts ``fedmaestro run ARGUMENTS`` with two hosts in a process of its own, looks at it and all of its processes once
per second, and writes ``FOLDER/long_run.json`` and ``long_run.png``. Growth is that of the medians of the last fifth
against the fifth after round ``--after``; the exit code is 1 where anything has grown by more than ``--limit`` percent
(and, for what is counted in small numbers, by more than two).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MB = 2**20

FIGURES = {
    "driver memory (MB)": "private memory of the driver",
    "hosts memory (MB)": "private memory of the two hosts together",
    "other memory (MB)": "private memory of Ray's own processes",
    "driver descriptors": "open files and sockets of the driver",
    "hosts descriptors": "of the hosts",
    "driver threads": "threads of the driver",
    "hosts threads": "of the hosts",
    "shared memory (MB)": "pages in /dev/shm that are in use (Ray's object store)",
}


def below(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except (OSError, IndexError):
            continue
    found, todo = [pid], [pid]
    while todo:
        more = parents.get(todo.pop(), [])
        found += more
        todo += more
    return found


def status(pid: int) -> dict[str, float]:
    """Return private memory in bytes, threads and descriptors of a process; nothing once it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {
            "memory": float(lines["RssAnon"].split()[0]) * 1024,
            "threads": float(lines["Threads"]),
            "descriptors": float(len(list(Path(f"/proc/{pid}/fd").iterdir()))),
        }
    except (OSError, KeyError):
        return {}


def shared() -> float:
    """Return the bytes that are in use in /dev/shm."""
    about = os.statvfs("/dev/shm")
    return float((about.f_blocks - about.f_bfree) * about.f_frsize)


def look(driver: int) -> dict[str, float]:
    """Return every figure at this moment."""
    sums = {kind: {"memory": 0.0, "threads": 0.0, "descriptors": 0.0} for kind in ("driver", "hosts", "other")}
    for pid in below(driver):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        kind = "driver" if pid == driver else "hosts" if title.startswith("ray::RayHost") else "other"
        for name, value in status(pid).items():
            sums[kind][name] += value
    return {
        "driver memory (MB)": sums["driver"]["memory"] / MB,
        "hosts memory (MB)": sums["hosts"]["memory"] / MB,
        "other memory (MB)": sums["other"]["memory"] / MB,
        "driver descriptors": sums["driver"]["descriptors"],
        "hosts descriptors": sums["hosts"]["descriptors"],
        "driver threads": sums["driver"]["threads"],
        "hosts threads": sums["hosts"]["threads"],
        "shared memory (MB)": shared() / MB,
    }


def growth(samples: Sequence[dict[str, float]], name: str, first: int, last: int) -> tuple[float, float, float]:
    """Return the medians after the first rounds and at the end, and the growth in percent."""
    fifth = (last - first) / 5
    before = [s[name] for s in samples if first <= s["round"] <= first + fifth]
    after = [s[name] for s in samples if s["round"] >= last - fifth]
    early, late = statistics.median(before), statistics.median(after)
    return early, late, 100 * (late - early) / early if early else 0.0


def draw(samples: Sequence[dict[str, float]], path: Path, after: int, about: str) -> None:
    """Draw every figure over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 6.4), sharex=True, layout="constrained")
    rounds = [s["round"] for s in samples]
    for axis, name in zip(axes.flat, FIGURES, strict=True):
        values = [s[name] for s in samples]
        axis.plot(rounds, values, color="#0b5fa5", linewidth=1.4)
        axis.axvline(after, color="#555555", linewidth=0.8, linestyle=":")
        axis.set_title(name, fontsize=11)
        axis.set_ylim(0, 1.25 * max(*values, 1))
        axis.grid(visible=True, color="#dddddd", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("Communication round")
    figure.suptitle(about, fontsize=12)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run and report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run and the results")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--after", type=int, default=50, help="round from which on nothing may grow")
    parser.add_argument("--limit", type=float, default=1.0, help="growth in percent that is allowed")
    parser.add_argument("arguments", nargs="*", help="more arguments of fedmaestro run, behind --")
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "fedmaestro.cli", "run", "--actors", "2", "--out", str(out / "run")]
    command += ["--set", f"train.rounds={given.rounds}", *given.arguments]
    with (out / "output.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    samples: list[dict[str, float]] = []
    began = time.monotonic()
    rounds = out / "run" / "rounds.jsonl"
    while process.poll() is None:
        number = len(rounds.read_bytes().splitlines()) - 1 if rounds.exists() else -1
        if number > given.rounds - 2:
            break
        if number >= 1:
            samples.append({"round": float(number), "seconds": time.monotonic() - began, **look(process.pid)})
        time.sleep(1)
    if process.wait() != 0:
        sys.stderr.write(f"the run ended with {process.returncode}: see {out / 'output.txt'}\n")
        return 2
    table: dict[str, Any] = {}
    bad = []
    last = int(samples[-1]["round"])
    for name in FIGURES:
        early, late, percent = growth(samples, name, given.after, last)
        table[name] = {"after": early, "end": late, "growth_percent": percent}
        print(f"{name:22} {early:8.1f} → {late:8.1f}   {percent:+.2f} %")
        if percent > given.limit and late - early > 2:
            bad.append(name)
    record = {"rounds": given.rounds, "after": given.after, "arguments": given.arguments, "figures": table}
    (out / "long_run.json").write_text(json.dumps({**record, "samples": samples}, indent=1), encoding="utf-8")
    draw(samples, out / "long_run.png", given.after, f"{given.rounds} rounds, two hosts: {' '.join(given.arguments)}")
    if bad:
        print(f"grew by more than {given.limit} %: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
