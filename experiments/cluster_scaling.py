"""What a Ray cluster brings: measured on nodes of one CPU each on this machine, simulated beyond from what that costs.

    python experiments/cluster_scaling.py measure --data-dir DIR [--nodes 1 2 3]
    python experiments/cluster_scaling.py simulate --device-ms 48 --worker-ms 8 --driver-ms 5 --round-ms 30

One tier, MNIST, LeNet, 100 devices of 600 examples, all of them in every round. ``measure`` prints devices per second,
and the CPU time that the driver's process, and Ray's own processes, take for a message: from runs whose cohorts are as
large as they come, and runs of a message for each device. ``simulate`` cuts rounds as the framework does, and lets the
workers wait for a driver that handles one message after the other. It knows no network.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import fedmaestro
from fedmaestro.config.experiment import load_config
from fedmaestro.rounds.cohorts import cut
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.rounds.server import schedule, start
from fedmaestro.runs.records import RoundRecord

DEVICES = 100
HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "fleet.preset": "",
    "fleet.file": str(HERE.parent / "benchmarks" / "one_tier.toml"),
    "data.partition": "iid",
    "train.objective": "own-prefix",
    "train.devices-per-round": DEVICES,
}


class Times(Observer):
    """Wall and CPU seconds at the end of every round, and how many messages it had."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, int]] = []
        self._messages = 0

    def on_progress(self, server_round: int, phase: str, done: int, total: int) -> None:  # noqa: ARG002
        self._messages = total

    def on_round(self, record: RoundRecord) -> None:  # noqa: ARG002
        self.rows.append((time.monotonic(), time.process_time(), ray_seconds(), self._messages))

    def per_round(self) -> tuple[float, float, float, float]:
        """Return medians over all rounds but the first three (hosts may still be starting) and the last (evaluated)."""
        rounds = list(zip(self.rows[3:-2], self.rows[4:-1], strict=True))
        wall, driver, ray = (statistics.median(b[i] - a[i] for a, b in rounds) for i in range(3))
        return wall, driver, ray, statistics.median(b[3] for _, b in rounds)


def ray_seconds() -> float:
    """Return the CPU seconds of all raylets and the GCS on this machine."""
    import os

    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        if name.endswith(("(raylet", "(gcs_server")):
            ticks += sum(map(int, rest.split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(data_dir: str, counts: Sequence[int], rounds: int) -> None:
    """Print a line for every number of nodes and cohort size."""
    from ray.cluster_utils import Cluster

    for count in counts:
        cluster = Cluster()
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        for size in ("auto", 1):
            times = Times()
            overrides = {
                **SETTINGS,
                "data.dir": data_dir,
                "train.rounds": rounds,
                "train.evaluate-every": rounds,
                "train.cohort-size": size,
            }
            with tempfile.TemporaryDirectory() as folder:
                fedmaestro.run(
                    HERE / "mnist.toml",
                    overrides=overrides,
                    out=Path(folder) / "run",
                    ray_address=cluster.address,
                    actors=count,
                    observers=[times],
                )
            wall, driver, ray, messages = times.per_round()
            print(
                f"{count} nodes, cohorts {size}: {DEVICES / wall:.1f} devices/s, {messages:.0f} messages a round, "
                f"driver {1e3 * driver:.0f} ms a round, raylets and GCS {1e3 * ray:.0f} ms a round",
                flush=True,
            )
        cluster.shutdown()


def simulate(device: float, worker: float, driver: float, fixed: float) -> None:
    """Print devices per second by number of workers and devices in a round.

    Args:
        device: seconds of a worker for a device.
        worker: seconds of a worker for a message, besides its devices.
        driver: seconds of the driver for a message.
        fixed: seconds of the driver for a round, between the last reply and the first message of the next.
    """
    workers = (1, 4, 16, 32, 64, 128, 256)
    print("devices a round |", " | ".join(f"{count} workers" for count in workers))
    for devices in (100, 1000, 10000):
        config = load_config(
            HERE / "mnist.toml",
            {
                **SETTINGS,
                "data.name": "digits",
                "data.devices": devices,
                "data.share-examples": 100,
                "train.devices-per-round": devices,
                "model.name": "mlp",
            },
        )
        env = open_environment(config)
        groups = schedule(env, start(env), 1).groups
        cells = []
        for count in workers:
            cohorts = cut(groups, lambda cohort: len(cohort.devices) * device, workers=count)
            jobs = [worker + len(x.devices) * device for x in cohorts]
            rate = devices / (fixed + _round(jobs, count, driver))
            cells.append(f"{rate:.0f}/s {100 * rate * device / count:.0f} % ({len(cohorts)})")
        print(f"{devices} |", " | ".join(cells), flush=True)


def _round(jobs: Sequence[float], workers: int, message: float) -> float:
    """Return how long a round takes: each job costs the driver half of a message before, and half of one after it."""
    todo, events = list(jobs)[::-1], [(0.0, 0, 0.0)] * workers
    driver = end = 0.0
    order = 0
    while events:
        ready, _, done = heappop(events)
        driver = max(driver, ready) + (message / 2 if done else 0.0)
        end = max(end, driver)
        if todo:
            job = todo.pop()
            driver += message / 2
            order += 1
            heappush(events, (driver + job, order, job))
    return end


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--data-dir", required=True)
    measuring.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3])
    measuring.add_argument("--rounds", type=int, default=9)
    simulating = commands.add_parser("simulate")
    for name, default in (("device", 48.0), ("worker", 8.0), ("driver", 5.0), ("round", 30.0)):
        simulating.add_argument(f"--{name}-ms", type=float, default=default)
    given = parser.parse_args()
    if given.command == "measure":
        measure(str(Path(given.data_dir).absolute()), given.nodes, given.rounds)
    else:
        simulate(*(x / 1e3 for x in (given.device_ms, given.worker_ms, given.driver_ms, given.round_ms)))


if __name__ == "__main__":
    main()
