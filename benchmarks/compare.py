"""Measure rounds of several contenders in turns, and write medians, spreads and ratios.

    python -m benchmarks.compare --data-dir DIR [--workloads lenet-10,…] [--rounds 15] [--out FILE.json]

Contenders take turns round by round, so that whatever else the machine does hits all of them. Ratios are medians of
the ratios within a turn.
"""

import argparse
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.workloads import WORKLOADS

WARM_UP = 2
LONGEST_SECONDS = 330
BASES = {"pfl": "bare-dense", "bare-dense": "bare-dense"}
"""What a contender is compared with, where that is not the first one: pfl trains the dense network."""
ROOT = Path(__file__).parent.parent


class Contender:
    """A process that runs rounds when it is asked."""

    def __init__(self, name: str, order: dict[str, Any], python: str) -> None:
        self.name = name
        module = "benchmarks.contenders" if name != "pfl" else "benchmarks.pfl_contender"
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps({"contender": name, **order})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCHMARKS_VERBOSE") else None,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self._answer()
        self._pause()

    def round(self) -> float:
        """Run a round; return its seconds."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        seconds = float(self._answer())
        self._pause()
        return seconds

    def close(self) -> None:
        """End it with all of its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        # A line at a time is what comes, so nothing waits in the reader's buffer.
        if not select.select([self._process.stdout], [], [], LONGEST_SECONDS)[0]:
            raise RuntimeError(f"contender {self.name} did not answer for {LONGEST_SECONDS} s")
        if not (line := self._process.stdout.readline().strip()):
            raise RuntimeError(f"contender {self.name} ended (BENCHMARKS_VERBOSE=1 shows why)")
        return line

    def _pause(self) -> None:
        # Flower's engine polls all the time: whoever is not working must not cost the others anything.
        self._process.send_signal(signal.SIGSTOP)


def measure(
    workload: str, names: list[str], rounds: int, data_dir: str, workers: int, pfl: str | None
) -> dict[str, Any]:
    """Return the seconds of every contender's rounds, and what they come to."""
    order = {"settings": WORKLOADS[workload].settings, "data_dir": data_dir, "workers": workers}
    contenders: list[Contender] = []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:
            contenders.append(Contender(name, order, pfl if name == "pfl" and pfl else sys.executable))  # noqa: PERF401
        for number in range(WARM_UP + rounds):
            # Every other turn backwards: nobody always comes after the same one.
            for contender in contenders if number % 2 else reversed(contenders):
                took = contender.round()
                if number >= WARM_UP:
                    seconds[contender.name].append(took)
    finally:
        for contender in contenders:
            contender.close()
    devices = WORKLOADS[workload].settings["train.devices-per-round"]
    return {
        "workload": workload,
        "about": WORKLOADS[workload].about,
        "devices": devices,
        "seconds": seconds,
        **{name: summary(own, seconds[BASES.get(name, names[0])], devices) for name, own in seconds.items()},
    }


def summary(own: list[float], base: list[float], devices: int) -> dict[str, float]:
    """Return the median of a contender's rounds, their middle half, and the ratio to the first contender."""
    quarters = statistics.quantiles(own, n=4)
    ratios = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4)
    return {
        "ms_per_device": 1000 * statistics.median(own) / devices,
        "ms_per_device_q1": 1000 * quarters[0] / devices,
        "ms_per_device_q3": 1000 * quarters[2] / devices,
        "ratio": ratios[1],
        "ratio_q1": ratios[0],
        "ratio_q3": ratios[2],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    names = list(dict.fromkeys(name for result in results for name in result["seconds"]))
    lines = [
        "| workload | " + " | ".join(f"{name}: ms per device, × {BASES.get(name, names[0])}" for name in names) + " |"
    ]
    lines.append("|---|" + "---|" * len(names))
    for result in results:
        cells = []
        for name in names:
            if (own := result.get(name)) is None:
                cells.append("–")
                continue
            spread = f"{own['ratio_q1']:.2f}–{own['ratio_q3']:.2f}"
            cells.append(f"{own['ms_per_device']:.1f}, **{own['ratio']:.2f}** ({spread})")
        lines.append(f"| {result['about']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--contenders", default="bare,fedmaestro,flower")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pfl-python", help="interpreter of an environment that has pfl 0.6.0; adds the contender pfl")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for workload in options.workloads.split(","):
        names = [x for x in options.contenders.split(",") if x != "flower" or WORKLOADS[workload].flower]
        if options.pfl_python and WORKLOADS[workload].flower:
            names += ["bare-dense", "pfl"]
        data_dir = str(Path(options.data_dir).absolute())
        results.append(measure(workload, names, options.rounds, data_dir, options.workers, options.pfl_python))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    if options.out:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        options.out.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "results": results}, indent=1))


if __name__ == "__main__":
    main()
