"""Flower's Grid directly on Ray actors: one thread here for each host, which hands it messages and takes its replies.

Whoever is free takes the next message, so the order in which messages are sent is the order in which work starts. A
host that is lost is replaced, and its message goes to the next free host: seeds belong to (round, device), so the
result stays what it was. Until the first actor is up, this process works too: Ray takes some seconds to start.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Error, Message
from flwr.clientapp import ClientApp

from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.direct_grid import HOST_ERROR, WAKE_SECONDS, DirectGrid, Greeting, HostCall, NoHostsError
from fedmaestro.flower.identity import SERVER_NODE, identify
from fedmaestro.flower.ray_runtime import RayRuntime

log = logging.getLogger("fedmaestro")

ATTEMPTS = 3
"""Hosts that may fail at a message before its devices count as failed."""

START_SECONDS = 60.0
"""How long an actor may take to start before others are expected to do its work."""

AGAIN_SECONDS = 5.0
"""Between two tries to start an actor that has no place."""

ALONE_SECONDS = 120.0
"""How long a round waits without any host."""


@dataclass
class Job:
    """A message on its way."""

    message: Message
    attempts: int = 0


class RayGrid(DirectGrid):
    """Hosts in Ray actors.

    Args:
        runtime: an open one.
        client_app: the hosts' app.
        gpus: share of a GPU that each host has.
        help_out: whether this process works too until the first actor is up.
    """

    def __init__(self, runtime: RayRuntime, client_app: ClientApp, *, gpus: float = 0.0, help_out: bool = True) -> None:
        super().__init__(workers=runtime.actors)
        self.runtime, self.client_app, self.gpus = runtime, client_app, gpus
        self._todo: deque[Job] = deque()
        self._abandoned: set[str] = set()
        self._shared: dict[int, tuple[ArrayRecord, int, Any]] = {}
        self._storing = threading.Lock()
        self.closed = False
        self._ending: threading.Thread | None = None
        self._live: set[int] = set()
        self._last_live = time.monotonic()
        self._hosts = [_Host(self, number) for number in range(self.workers)]
        self._threads = [threading.Thread(target=host.serve, daemon=True) for host in self._hosts]
        if help_out and not runtime.ready:
            self._threads.append(threading.Thread(target=self._help_out, daemon=True))
        for thread in self._threads:
            thread.start()

    def retire(self) -> None:
        """End actors and Ray in a thread of their own."""
        if self._ending is None:
            self._ending = threading.Thread(target=self._end, name="end of Ray", daemon=True)
            self._ending.start()

    def close(self) -> None:
        """Take no more work, end the actors, and leave Ray."""
        self.retire()
        assert self._ending is not None
        self._ending.join()

    def _end(self) -> None:
        with self._arrived:
            self.closed = True
            self._arrived.notify_all()
        # A thread that asks a Ray that is gone ends the process: all of them must be out of it before.
        for thread in self._threads:
            while thread.is_alive():
                for host in self._hosts:
                    host.kill()
                thread.join(WAKE_SECONDS)
        self.runtime.close()

    def _submit(self, messages: Sequence[Message]) -> None:
        with self._arrived:
            if not self._todo:
                self._shared.clear()
            self._todo += [Job(message) for message in messages]
            self._arrived.notify_all()

    def _abandon(self, ids: Iterable[str]) -> None:
        with self._arrived:
            self._abandoned |= set(ids)
            self._todo = deque(job for job in self._todo if job.message.metadata.message_id not in self._abandoned)
        for host in self._hosts:
            host.drop(self._abandoned)

    def _check_alive(self) -> None:
        if self._live or time.monotonic() - self._last_live < ALONE_SECONDS:
            return
        raise NoHostsError(
            f"no host is left, and none could be started for {ALONE_SECONDS:.0f} s: what is complete is in the run "
            "folder: look after the Ray cluster and go on with --resume, or work in this process with --actors 0"
        )

    def greet(self, greeting: Greeting) -> None:
        """Let every host answer before it works; on a cluster, whose nodes may differ, at least one has done so now."""
        super().greet(greeting)
        deadline = time.monotonic() + ALONE_SECONDS
        with self._arrived:
            while not self.runtime.own and not self._live:
                if self._broken is not None:
                    raise self._broken
                if time.monotonic() > deadline:
                    raise NoHostsError(f"no actor could be started on the Ray cluster within {ALONE_SECONDS:.0f} s")
                self._arrived.wait(WAKE_SECONDS)

    # Called by the hosts' threads.

    def next_job(self, *, while_starting: bool = False) -> Job | None:
        """Wait for a message to work on; None: there will be none."""
        with self._arrived:
            while not self.closed and not (while_starting and self._live):
                if self._todo:
                    return self._todo.popleft()
                self._arrived.wait()
            return None

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the grid's end."""
        deadline = time.monotonic() + seconds
        with self._arrived:
            while not self.closed and (left := deadline - time.monotonic()) > 0:
                self._arrived.wait(left)

    def is_live(self, number: int, *, live: bool) -> None:
        """Take note of a host that has come or gone."""
        with self._arrived:
            (self._live.add if live else self._live.discard)(number)
            self._last_live = time.monotonic()
            self._arrived.notify_all()

    def settle(self, job: Job, reply: Message) -> None:
        """Take a reply."""
        with self._arrived:
            if job.message.metadata.message_id in self._abandoned:
                self._abandoned.discard(job.message.metadata.message_id)
                return
        self._deliver(reply)

    def failed(self, job: Job, number: int, reason: str, *, lost: bool) -> None:
        """Send a message that a host has failed at to another one, unless too many have failed at it."""
        job.attempts += 1
        what = "was lost" if lost else "failed"
        if job.attempts < ATTEMPTS:
            log.warning("host %d %s (%s): its message goes to another host", number, what, reason)
            with self._arrived:
                if job.message.metadata.message_id not in self._abandoned:
                    self._todo.appendleft(job)
                self._arrived.notify_all()
        else:
            log.warning("host %d %s (%s): its message is given up after %d hosts", number, what, reason, ATTEMPTS)
            self.settle(job, Message(Error(HOST_ERROR, reason), reply_to=job.message))

    def stored(self, record: ArrayRecord) -> Any:
        """Return the reference to a record in Ray's object store; the same one for all messages that carry it."""
        import ray

        with self._storing:
            starts, known = self.runtime.starts, self._shared.get(id(record))
            if known is None or known[1] != starts:
                # The record is kept with it: an id is somebody else's once its object is gone.
                known = self._shared[id(record)] = record, starts, ray.put(record)
            return known[2]

    def fail(self, error: Exception) -> None:
        """Let whoever waits fail."""
        self._break(error)

    def _help_out(self) -> None:
        """Work in this process as long as no actor does."""
        call = HostCall(self.client_app, 0, 1)
        greeted: Greeting | None = None
        while (job := self.next_job(while_starting=True)) is not None:
            try:
                if self.greeting is not None and greeted is not self.greeting:
                    greeted = self.greeting
                    greeted.check(call(_identified(greeted.message(SERVER_NODE + 1))))
                self.settle(job, call(job.message))
            except UserError as error:
                self.fail(error)


class _Host:
    """A host, seen from here: its actor, and the thread that serves it."""

    def __init__(self, grid: RayGrid, number: int) -> None:
        self.grid, self.number = grid, number
        self._actor: Any = None
        self._ready = False
        self._starts = 0
        self._greeted: Greeting | None = None
        self._job: Job | None = None
        self._said = False

    def serve(self) -> None:
        """Work until the grid is closed."""
        try:
            self.grid.runtime.wait()
            while not self.grid.closed:
                if not self._start():
                    continue
                if (job := self.grid.next_job()) is None:
                    return
                self._work(job)
        except UserError as error:
            self.grid.fail(error)
        except Exception as error:
            if not self.grid.closed:
                self.grid.fail(RuntimeError(f"host {self.number}: {type(error).__name__}: {error}"))

    def kill(self) -> None:
        """End the actor."""
        import ray

        actor, self._actor, self._ready = self._actor, None, False
        if actor is not None and ray.is_initialized():
            with contextlib.suppress(Exception):  # it may be gone already
                ray.kill(actor)

    def drop(self, abandoned: set[str]) -> None:
        """End the actor if it works on what nobody waits for any more."""
        job = self._job
        if job is not None and job.message.metadata.message_id in abandoned:
            self.kill()

    def _start(self) -> bool:
        """Start an actor unless there is one; return whether there is."""
        import ray

        runtime = self.grid.runtime
        if self._ready and self._starts == runtime.starts:
            return True
        starts = self._starts = runtime.starts
        try:
            self._actor, self._greeted = self._create(), None
            _check_versions(ray.get(self._actor.start.remote(), timeout=START_SECONDS), self.number)
            self._greet()
        except UserError:
            raise
        except Exception as error:
            if not self.grid.closed:
                self._lost()
                self._cannot_start(error, starts)
            return False
        self._ready, self._said = True, False
        self.grid.is_live(self.number, live=True)
        return True

    def _create(self) -> Any:
        import sys

        import ray

        from fedmaestro.flower.ray_host import RayHost

        grid = self.grid
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        if grid.gpus:
            options["num_gpus"] = grid.gpus
        if not grid.runtime.own:
            options["scheduling_strategy"] = "SPREAD" if free_of_groups() else "DEFAULT"
        own_app = [] if grid.client_app is default_client_app else [ray.put(grid.client_app)]
        return ray.remote(RayHost).options(**options).remote(own_app, self.number, grid.workers, sys.path)

    def _cannot_start(self, error: Exception, starts: int) -> None:
        import ray

        reason = one_line(error)
        if isinstance(error, ray.exceptions.RuntimeEnvSetupError | ModuleNotFoundError) or "ModuleNotFound" in reason:
            raise UserError(f"host {self.number} cannot take part: {reason}: install the same version on every node")
        if not self._said:
            log.warning("host %d cannot be started (%s)", self.number, reason)
            self._said = True
        if not self.grid._live and self.grid.runtime.restart(starts):
            log.warning("Ray was lost and has been started anew")
            return
        self.grid.pause(AGAIN_SECONDS)

    def _work(self, job: Job) -> None:
        import ray

        from fedmaestro.flower.ray_host import without

        self._job = job
        try:
            self._greet()
            shared = {name: [self.grid.stored(x)] for name, x in job.message.content.array_records.items()}
            reply: Message = ray.get(self._actor.work.remote(without(job.message, list(shared)), shared))
        except UserError:
            raise
        except Exception as error:
            if self.grid.closed:
                return
            self._lost()
            self.grid.failed(job, self.number, one_line(error), lost=True)
            return
        finally:
            self._job = None
        if reply.has_error():
            self.grid.failed(job, self.number, " ".join(str(reply.error.reason).split())[:300], lost=False)
        else:
            self.grid.settle(job, reply)

    def _greet(self) -> None:
        """Let the host answer the grid's greeting, if it has not."""
        import ray

        greeting = self.grid.greeting
        if greeting is not None and self._greeted is not greeting:
            hello = _identified(greeting.message(SERVER_NODE + 1 + self.number))
            greeting.check(ray.get(self._actor.work.remote(hello, {})))
            self._greeted = greeting

    def _lost(self) -> None:
        self.kill()
        self.grid.is_live(self.number, live=False)


def _identified(message: Message) -> Message:
    identify(message)
    return message


def free_of_groups() -> bool:
    """Return whether this process is in no placement group, whose bundles say where actors go."""
    from ray.util import get_current_placement_group

    return get_current_placement_group() is None


def _check_versions(theirs: dict[str, str], number: int) -> None:
    from fedmaestro.flower.ray_host import versions

    for name, ours in versions().items():
        if theirs[name] != ours:
            raise UserError(
                f"host {number} runs {name} {theirs[name]}, this process {ours}: install the same version on every node"
            )


def one_line(error: Exception, limit: int = 300) -> str:
    """Return what an error says on one line (Ray's span many)."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]
