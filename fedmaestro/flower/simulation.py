"""Where a simulation runs: in this process, on Ray actors by a Grid of our own, or by Flower's own engine.

The last one is for versions of Flower that lack what ``identity`` needs. Its ``run_simulation`` is deprecated in Flower
1.41 without a successor that runs in this process.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.direct_grid import LocalGrid
from fedmaestro.flower.identity import supported
from fedmaestro.flower.ray_grid import RayGrid
from fedmaestro.flower.ray_runtime import RayRuntime, check_gpus, free_cpus, joined
from fedmaestro.interrupt import interrupt_sets
from fedmaestro.rounds.placement import placed_on
from fedmaestro.runs.code import objects_welcome

log = logging.getLogger("fedmaestro")

NODES_PER_ACTOR = 4
"""For Flower's engine, which polls one message per node every 0.1 s."""

ACTOR_OPTIONS = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1, "max_task_retries": 3}
"""For Flower's engine: a killed actor is restarted and its task retried, which by default would be lost for good."""


def checked_actors(actors: int | None) -> int | None:
    """Return how many actors are to work in parallel (None: one per free CPU; 0: this process); UserError below 0."""
    if actors is not None and actors < 0:
        raise UserError(f"--actors {actors}: 0 works in this process, 1 and more are Ray actors")
    return actors


class _Grid(RayGrid):
    """Hosts in Ray actors; where no Ray of our own can be started, this process goes on with what it has begun."""

    _told = False

    def retire(self) -> None:
        """End actors and Ray in a thread of their own."""
        self._told = True
        self.runtime.give_up()
        super().retire()

    def fail(self, error: Exception) -> None:
        """Let whoever waits fail with ``error``, unless this process can do all the work."""
        if error is not self.runtime.error or not self._helping:
            super().fail(error)
            return
        with self._arrived:
            told, self._told = self._told, True
        if not told:
            log.warning("this process does all the work: %s", error)


@contextmanager
def hosts(
    client_app: ClientApp,
    *,
    actors: int | None = None,
    ray_address: str | None = None,
    gpus_per_actor: float = 0.0,
) -> Iterator[Grid]:
    """Open a grid with its hosts, and close it at the end.

    Args:
        client_app: the hosts' app.
        actors: Ray actors; 0: none, work is done in this process; None: one per free CPU.
        ray_address: a running Ray cluster; None: the Ray that this process is in, ``RAY_ADDRESS``, or one of our own.
        gpus_per_actor: GPUs of each actor, or of this process; 0: the CPU.

    Raises:
        UserError: the Ray cluster cannot be reached or has no place; there are not as many GPUs.
    """
    if ray_address and joined():
        raise UserError(
            f"--ray-address {ray_address}: this process is part of a Ray already, which is used: leave it out, or call "
            "ray.shutdown() before"
        )
    if actors == 0 or (actors is None and joined() and free_cpus() < 1):
        if gpus_per_actor:
            check_gpus(gpus_per_actor, 1)
        with placed_on("cuda" if gpus_per_actor else "cpu"):
            yield LocalGrid(client_app)
        return
    threads = torch.get_num_threads()
    setting = "--ray-address" if ray_address else "RAY_ADDRESS"
    runtime = RayRuntime(actors, ray_address or os.environ.get("RAY_ADDRESS") or None, setting, gpus_per_actor)
    runtime.open()
    # Another app may do to its process what it likes: it must not be this one. Nor may this one work on a CPU what
    # others work on a GPU: that rounds differently.
    help_out = runtime.own and client_app is default_client_app and not gpus_per_actor
    if not help_out:
        try:
            runtime.wait()
        except UserError:
            runtime.close()
            raise
    grid = _Grid(runtime, client_app, help_out=help_out)
    try:
        yield grid
    finally:
        grid.close()
        torch.set_num_threads(threads)


def simulate(
    server: Callable[[Grid], None],
    client_app: ClientApp,
    *,
    actors: int | None,
    gpus_per_actor: float = 0.0,
    stop: threading.Event,
    ray_address: str | None = None,
) -> None:
    """Run ``server`` against simulated hosts, in this process, until it returns.

    The first Ctrl-C (or SIGTERM, SIGHUP) sets ``stop``, which the server obeys; a second one interrupts at once.

    Raises:
        UserError: the Ray cluster at ``ray_address`` cannot be reached.
        Exception: what ``server`` raised.
    """
    if reason := supported():
        log.warning("this version of Flower runs hosts by its own engine, slower and less forgiving (%s)", reason)
        _by_flower(server, client_app, actors=actors or os.cpu_count() or 1, stop=stop)
        return
    # Before Ray starts, which would otherwise leave other handlers behind (``signals_kept``).
    with (
        interrupt_sets(stop),
        hosts(client_app, actors=actors, ray_address=ray_address, gpus_per_actor=gpus_per_actor) as grid,
    ):
        server(grid)


class _OwnHosts(ClientApp):
    """Hosts of this process's Ray, which may be sent objects.

    Args:
        client_app: what they do.
    """

    def __init__(self, client_app: ClientApp) -> None:
        super().__init__()
        self._client_app = client_app

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the app's reply."""
        with objects_welcome():
            return self._client_app(message, context)


def _by_flower(server: Callable[[Grid], None], client_app: ClientApp, *, actors: int, stop: threading.Event) -> None:
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _context: Context) -> None:
        server(grid)

    options: dict[str, Any] = {"client_resources": ACTOR_OPTIONS, "init_args": {"num_cpus": actors}}
    with interrupt_sets(stop):
        try:
            run_simulation(server_app, _OwnHosts(client_app), NODES_PER_ACTOR * actors, backend_config=options)
        finally:
            # The server's thread must not wait for hosts that are gone.
            stop.set()
