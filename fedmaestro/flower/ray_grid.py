"""Flower's Grid directly on Ray actors: one thread here for each host, which hands it messages and takes its replies.

Whoever is free takes the next message, so the order in which messages are sent is the order in which work starts. A
host that is lost is replaced, and its message goes to the next free host: seeds belong to (round, device), so the
result stays what it was. Until the first actor is up, this process works too: Ray takes some seconds to start.
"""

import contextlib
import copy
import itertools
import logging
import pickle
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import app as default_client_app
from fedmaestro.flower.direct_grid import (
    WAKE_SECONDS,
    DirectGrid,
    Greeting,
    HostCall,
    Job,
    NoHostsError,
)
from fedmaestro.flower.identity import SERVER_NODE
from fedmaestro.flower.letter import Held, Letter, packed
from fedmaestro.flower.ray_runtime import RayRuntime, in_group

log = logging.getLogger("fedmaestro")

STORED_BYTES = 2**20
"""Tensors of a message go into Ray's object store from this size on; smaller ones go with the message, which is faster
than telling store, raylet and host about them."""

AHEAD = 4
"""Messages that a host is sent before it has replied to the first of them, where there are many."""

SPARE = 2
"""Messages to each host that must be left for one to be sent ahead: the last ones go to whoever is free first."""

START_SECONDS = 60.0
"""How long an actor may take to start before others are expected to do its work."""

AGAIN_SECONDS = 5.0
"""Between two tries to start an actor that has no place."""

END_SECONDS = 60.0
"""How long hosts may take to end; a Ray of our own ends with this process in any case."""

ALONE_SECONDS = 120.0
"""How long a round waits without any host."""


class RayGrid(DirectGrid):
    """Hosts in Ray actors.

    Args:
        runtime: an open one.
        client_app: the hosts' app.
        help_out: whether this process works too until the first actor is up.
    """

    def __init__(self, runtime: RayRuntime, client_app: ClientApp, *, help_out: bool = True) -> None:
        super().__init__(workers=runtime.actors)
        self.runtime, self.client_app = runtime, client_app
        self._shared: dict[int, _Shared] = {}
        self._numbers = itertools.count()
        self._storing = threading.Lock()
        self._parcels: dict[str, tuple[Any, int]] = {}
        self._supplying: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.closed = False
        self._ending: threading.Thread | None = None
        self._live: set[int] = set()
        self._last_live = time.monotonic()
        self._hosts = [_Host(self, number) for number in range(self.workers)]
        self._threads = [threading.Thread(target=host.serve, daemon=True) for host in self._hosts]
        self._helping = help_out and not runtime.ready
        for thread in self._threads:
            thread.start()
        if self._helping:
            threading.Thread(target=self._help_out, daemon=True).start()

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
        deadline = time.monotonic() + END_SECONDS
        while (alive := [x for x in self._threads if x.is_alive()]) and time.monotonic() < deadline:
            for host in self._hosts:
                host.kill()
            alive[0].join(WAKE_SECONDS)
        self._shared = {}
        self._parcels.clear()
        if not alive:
            self.runtime.close()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; whichever host is free takes the next one. Return their ids."""
        sent = list(messages)
        count = Counter(id(record) for message in sent for record in message.content.array_records.values())
        with self._arrived:
            if not self._todo:
                self._shared = {}
            for message in sent:
                for record in message.content.array_records.values():
                    if count[id(record)] > 1 and id(record) not in self._shared:
                        self._shared[id(record)] = _Shared(record, next(self._numbers))
        return super().push_messages(sent)

    def _abandon(self, ids: Iterable[str]) -> None:
        super()._abandon(ids)
        for host in self._hosts:
            host.drop(self._abandoned)

    def _check_alive(self) -> None:
        if self._live or self._helping or time.monotonic() - self._last_live < ALONE_SECONDS:
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

    def spare_job(self) -> Job | None:
        """Return a message for a host that is busy, if there are more than the others will ask for now."""
        with self._arrived:
            return self._todo.popleft() if len(self._todo) > SPARE * self.workers and not self.closed else None

    def give_back(self, jobs: Sequence[Job]) -> None:
        """Let other hosts work on messages that one was lost with before it began with them."""
        with self._arrived:
            self._todo.extendleft(
                job for job in reversed(jobs) if job.message.metadata.message_id not in self._abandoned
            )
            self._arrived.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the grid's end."""
        deadline = time.monotonic() + seconds
        with self._arrived:
            while not self.closed and (left := deadline - time.monotonic()) > 0:
                self._arrived.wait(left)

    def is_live(self, number: int, *, live: bool) -> None:
        """Take note of a host that has come or gone."""
        with self._arrived:
            if live or number in self._live:
                # Not at every try to start one in vain: nobody would ever have waited long enough.
                self._last_live = time.monotonic()
            (self._live.add if live else self._live.discard)(number)
            if not self._live:
                # Perhaps Ray is lost. It would try to recover what it stored, and end this process where it cannot.
                for shared in self._shared.values():
                    shared.stored = None
                self._parcels.clear()
            self._arrived.notify_all()

    def shared(self, record: Any) -> "_Shared | None":
        """Return what is known of a record that several messages carry; None for one that only one carries."""
        return self._shared.get(id(record))

    def stored(self, shared: "_Shared") -> Any:
        """Return the reference to a record in Ray's object store; the same one for all messages that carry it."""
        import ray

        with self._storing:
            starts = self.runtime.starts
            if shared.stored is None or shared.stored[0] != starts:
                shared.stored = starts, ray.put(shared.record)
            return shared.stored[1]

    def parcel(self, fingerprint: str) -> tuple[Any, int] | None:
        """Return the reference to a parcel in Ray's object store, and its size; None: this machine lacks it too."""
        import ray

        from fedmaestro.flower.parcel import pack

        with self._storing:
            known = self._parcels.get(fingerprint)
            if known is None and (parcel := pack(fingerprint)) is not None:
                known = self._parcels[fingerprint] = ray.put(parcel), parcel.size
            return known

    def supplying(self, node: str) -> threading.Lock:
        """Return what lets the hosts of a node look one by one for what it lacks: the first of them is sent it."""
        with self._storing:
            return self._supplying[node]

    def _help_out(self) -> None:
        """Work in this process as long as no actor does."""
        call = HostCall(self.client_app, 0, 1)
        try:
            while (job := self.next_job(while_starting=True)) is not None:
                call.greet(self.greeting)
                self.answered(job, 0, call(job.message))
        except Exception as error:
            self.fail(error)
        finally:
            self._helping = False


@dataclass
class _Shared:
    """A record that several messages carry."""

    record: ArrayRecord
    number: int
    """Of the record. Its id would be somebody else's once it is gone."""
    stored: tuple[int, Any] | None = None
    """The start of Ray in whose object store it is, and the reference."""


class _Host:
    """A host, seen from here: its actor, and the thread that serves it."""

    def __init__(self, grid: RayGrid, number: int) -> None:
        self.grid, self.number = grid, number
        self._actor: Any = None
        self._ready = False
        self._starts = 0
        self._greeted: Greeting | None = None
        self._node = self._place = ""
        """Ray's id of the actor's node, and what people call it."""
        self._flying: deque[tuple[Job, Any]] = deque()
        self._said = False
        self._held: Held[None] = Held()
        """Numbers of the records that the actor holds."""

    def serve(self) -> None:
        """Work until the grid is closed."""
        try:
            self.grid.runtime.wait()
            while not self.grid.closed:
                if not self._start():
                    continue
                if (job := self.grid.next_job()) is None:
                    return
                # An actor may be lost while it has nothing to do. One message finds that out; others that share its
                # fate, as those of a lost node do, must not fail at the same message.
                if not self._is_up() or (job.attempts and not self._answers()):
                    self.grid.give_back([job])
                    continue
                self._work(job)
                while self._flying:
                    self._work(None)
        except UserError as error:
            self.grid.fail(error)
        except Exception as error:
            if not self.grid.closed:
                self.grid.fail(RuntimeError(f"host {self.number}: {type(error).__name__}: {error}"))

    def kill(self) -> None:
        """End the actor."""
        import ray

        actor, self._actor, self._ready = self._actor, None, False
        if actor is not None:
            with self.grid.runtime.used(), contextlib.suppress(Exception):  # it may be gone already
                ray.kill(actor)

    def drop(self, abandoned: set[str]) -> None:
        """End the actor if it works on what nobody waits for any more."""
        if any(job.message.metadata.message_id in abandoned for job, _ in list(self._flying)):
            self.kill()

    def _is_up(self) -> bool:
        """Return whether there is an actor in the Ray of now that has answered the greeting of now."""
        same = self._starts == self.grid.runtime.starts and self._greeted is self.grid.greeting
        return self._ready and same

    def _answers(self) -> bool:
        """Return whether the actor does."""
        import ray

        try:
            with self.grid.runtime.used():
                ray.get(self._actor.node.remote(), timeout=START_SECONDS)
        except Exception:
            if not self.grid.closed:
                self._lost()
            return False
        return True

    def _start(self) -> bool:
        """Start an actor unless there is one, and let it answer the greeting; return whether it is up."""
        import ray

        runtime = self.grid.runtime
        try:
            with runtime.used():
                if not self._ready or self._starts != runtime.starts:
                    self._ready, self._starts = False, runtime.starts
                    self._actor, self._greeted, self._held = self._create(), None, Held()
                    _check_versions(ray.get(self._actor.start.remote(), timeout=START_SECONDS), self.number)
                    self._node, self._place = ray.get(self._actor.node.remote())
                self._greet()
        except UserError:
            raise
        except Exception as error:
            if not self.grid.closed:
                self._lost()
                self._cannot_start(error)
            return False
        if not self._ready:
            self._ready, self._said = True, False
            self.grid.is_live(self.number, live=True)
        return True

    def _create(self) -> Any:
        import sys

        import ray

        from fedmaestro.flower.ray_host import RayHost

        grid = self.grid
        gpus = grid.runtime.gpus
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        if not grid.runtime.own:
            # In a thread of ours, Ray does not know of the group of the task that has started it.
            options["scheduling_strategy"] = "SPREAD" if grid.runtime.group is None else in_group(grid.runtime.group)
        own_app = [] if grid.client_app is default_client_app else [ray.put(grid.client_app)]
        return (
            ray.remote(RayHost)
            .options(**options)
            .remote(own_app, self.number, grid.workers, sys.path, "cuda" if gpus else "cpu")
        )

    def _cannot_start(self, error: Exception) -> None:
        import ray

        reason = one_line(error)
        if isinstance(error, ray.exceptions.RuntimeEnvSetupError | ModuleNotFoundError) or "ModuleNotFound" in reason:
            raise UserError(f"host {self.number} cannot take part: {reason}: install the same version on every node")
        died = isinstance(error, ray.exceptions.ActorDiedError)
        if not self._said:
            log.warning("host %d cannot be started (%s)", self.number, reason)
            self._said = True
            if died:
                return
        # A process that died says nothing of Ray itself.
        if not died and not self.grid._live and self.grid.runtime.restart(self._starts):
            return
        self.grid.pause(AGAIN_SECONDS)

    def _work(self, job: Job | None) -> None:
        """Send ``job``, and some more if there are many; take the replies to the first half of what was sent."""
        import ray

        taken: list[tuple[Job, Message]] = []
        try:
            with self.grid.runtime.used():
                if job is not None:
                    self._send(job)
                # The actor need not wait for this process between two messages, nor this one wake up for each.
                while len(self._flying) < AHEAD and (more := self.grid.spare_job()) is not None:
                    self._send(more)
                if half := len(self._flying) // 2:
                    ray.wait([self._flying[half - 1][1]])
                for _ in range(half or 1):
                    reply: Message = pickle.loads(ray.get(self._flying[0][1]))
                    done, _ = self._flying.popleft()
                    taken.append((done, reply))
        except UserError:
            raise
        except Exception as error:
            flying = [job for job, _ in self._flying]
            self._flying.clear()
            if not self.grid.closed:
                self._lost()
                # An actor begins with what was sent first; one of a Ray that is gone has not begun with anything.
                begun = 1 if self._starts == self.grid.runtime.starts else 0
                self.grid.give_back(flying[begun:])
                for failed in flying[:begun]:
                    self.grid.failed(failed, self.number, one_line(error))
        for done, reply in taken:
            self.grid.answered(done, self.number, reply)

    def _send(self, job: Job) -> None:
        # In the list before it is sent: whatever goes wrong, it is not forgotten.
        self._flying.append((job, None))
        own: dict[str, Any] = {}
        names: dict[str, int] = {}
        lacking: dict[int, ArrayRecord] = {}
        stored: list[tuple[int, Any]] = []
        for name, record in job.message.content.items():
            if (shared := self.grid.shared(record)) is None:
                own[name] = record
                continue
            names[name] = number = shared.number
            if number not in self._held:
                if sum(len(array.data) for array in shared.record.values()) > STORED_BYTES:
                    stored.append((number, self.grid.stored(shared)))
                else:
                    lacking[number] = shared.record
                self._held.put(number, None)
            self._held.use(number)
        message = copy.copy(job.message)
        message.content = RecordDict(own)
        letter = Letter(message=message, shared=names, records=lacking)
        self._flying[-1] = job, self._actor.work.remote(packed(letter), stored)

    def _greet(self) -> None:
        """Let the host answer the grid's greeting, if it has not."""
        greeting = self.grid.greeting
        if greeting is None or self._greeted is greeting:
            return
        hello = greeting.to(SERVER_NODE + 1 + self.number)
        try:
            # The nodes of a Ray of our own are this machine.
            if not self.grid.runtime.own:
                self._supply(hello)
            greeting.check(pickle.loads(_answer(self._actor.work.remote(packed(Letter(message=hello))))))
        except UserError as error:
            raise error if self.grid.runtime.own else UserError(f"node {self._place}: {error}") from None
        self._greeted = greeting

    def _supply(self, message: Message) -> None:
        """Send the host's node what the message names and the node lacks; its other hosts find it there then."""
        with self.grid.supplying(self._node):
            for fingerprint in _answer(self._actor.lacking.remote(message)):
                # What this process lacks too, the host will say.
                if (parcel := self.grid.parcel(fingerprint)) is not None:
                    reference, size = parcel
                    log.info("node %s is sent %.1f MB of data", self._place, size / 1e6)
                    _answer(self._actor.take.remote([reference]))

    def _lost(self) -> None:
        self.kill()
        self.grid.is_live(self.number, live=False)


def _answer(reference: Any) -> Any:
    """Return what an actor's method returned; where that raised a UserError, raise it without Ray's traceback."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


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
