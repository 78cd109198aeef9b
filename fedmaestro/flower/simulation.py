"""The one place that touches Flower's simulation runtime and Ray.

``run_simulation`` is deprecated in Flower 1.41 without a successor that runs in this process; whatever replaces it goes
here.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from ray.exceptions import RayError

from fedmaestro.errors import UserError
from fedmaestro.interrupt import interrupt_sets

NODES_PER_ACTOR = 4
"""Flower polls one message per node every 0.1 s: with some nodes more than actors a round's messages leave at once."""

ACTOR_OPTIONS = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1, "max_task_retries": 3}
"""Ray actor options: a killed actor is restarted and its task retried. By default Flower would lose both for good."""


PROBE_SECONDS = 30
"""How long a Ray cluster may take to accept a first connection."""


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_actors(actors: int | None) -> int:
    """Return how many actors work in parallel: as given, or one per CPU; UserError for none."""
    if actors is None:
        return available_cpus()
    if actors < 1:
        raise UserError(f"--actors {actors}: at least one is needed")
    return actors


def simulate(
    server: Callable[[Grid, Context], None],
    client_app: ClientApp,
    *,
    actors: int,
    stop: threading.Event,
    ray_address: str | None = None,
) -> None:
    """Run ``server`` against simulated hosts in Ray actors, in this process, until it returns.

    The first Ctrl-C sets ``stop``, which the server obeys; a second one interrupts at once.

    Raises:
        UserError: the Ray cluster at ``ray_address`` cannot be reached.
        Exception: what ``server`` raised.
    """
    with _quiet_flower(), _start_ray(actors, ray_address), _actors_end_without_retry():
        from flwr.simulation import run_simulation

        server_app = ServerApp()
        server_app.main()(server)
        with interrupt_sets(stop):
            try:
                run_simulation(
                    server_app=server_app,
                    client_app=client_app,
                    num_supernodes=NODES_PER_ACTOR * actors,
                    backend_config={"client_resources": ACTOR_OPTIONS},  # type: ignore[dict-item]
                )
            finally:
                # The server's thread must not wait for hosts that are gone.
                stop.set()


@contextmanager
def _start_ray(actors: int, address: str | None) -> Iterator[None]:
    """Start Ray here (or connect) before Flower does, which would take all CPUs and report failures late."""
    paths = os.pathsep.join(path for path in sys.path if path)
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        _check_reachable(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                address=address or "local",
                num_cpus=None if address else actors,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
            )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot reach the Ray cluster at {address!r} ({reason}): start it with `ray start --head`, or unset "
            "RAY_ADDRESS and --ray-address to simulate on this machine"
            if address
            else f"cannot start Ray on this machine: {reason}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise OSError when no Ray cluster answers; Ray itself would try for minutes and not be interrupted."""
    if address is None:
        return
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()
    probe = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        command = [sys.executable, "-c", probe, address]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {PROBE_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(last) from None


@contextmanager
def _actors_end_without_retry() -> Iterator[None]:
    """End actors by ``ray.kill``: with task retries, Ray would retry and report Flower's ``terminate`` call."""
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool

    original = BasicActorPool.terminate_all_actors

    def kill_all(pool: BasicActorPool) -> None:
        for actor in pool.pool:
            ray.kill(actor)  # type: ignore[arg-type]

    BasicActorPool.terminate_all_actors = kill_all  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        BasicActorPool.terminate_all_actors = original  # type: ignore[method-assign]


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Keep Flower's own log lines (registration, deprecation) out of the progress display."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
