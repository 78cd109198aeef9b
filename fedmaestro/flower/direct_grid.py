"""Flower's Grid without a SuperLink: messages go straight to hosts that call the same ClientApp.

``DirectGrid`` is what such grids share, ``LocalGrid`` the one whose only host is this process: a debugger stops in the
user's code, and nothing has to start.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmaestro.errors import UserError
from fedmaestro.flower.identity import SERVER_NODE, identify, take_identity
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.runs.code import objects_welcome

log = logging.getLogger("fedmaestro")

WAKE_SECONDS = 0.2
"""How long a wait goes without a look at whether it should end; replies end it at once."""

GATHERED = 8
"""Replies that are taken together while hosts have enough to do: this process shares its cores with theirs, and its
caches are cold each time it wakes up."""

ATTEMPTS = 3
"""Hosts that may fail at a message before its devices count as failed."""

HOST_ERROR = 1
"""Code of Flower's Error for a host that could not do its work."""


class NoHostsError(UserError):
    """No host is left, and none can be started."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a host is asked before it gets work, and what its answer must say."""

    message: Callable[[int], Message]
    """``host -> message``"""
    check: Callable[[Message], object]
    """Raises UserError for a host that is unfit."""

    def to(self, host: int) -> Message:
        """Return the message to a host, ready to be called with."""
        hello = self.message(host)
        identify(hello)
        return hello


@dataclass
class Job:
    """A message on its way."""

    message: Message
    attempts: int = 0


class DirectGrid(Grid):
    """What grids of our own share: a queue, an inbox, waiting, and other tries of what a host has failed at.

    Args:
        workers: messages that are worked on at once.
        gathered: replies that are taken at once, where more are to come soon.
    """

    def __init__(self, workers: int, gathered: int = GATHERED) -> None:
        self.workers, self.gathered = workers, gathered
        self.greeting: Greeting | None = None
        self._arrived = threading.Condition()
        self._todo: deque[Job] = deque()
        self._abandoned: set[str] = set()
        self._inbox: dict[str, Message] = {}
        self._broken: Exception | None = None
        take_identity(SERVER_NODE)

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """What Flower knows of a run; nothing here reads it."""
        raise NotImplementedError("there is no SuperLink behind this grid")

    def set_run(self, run) -> None:  # type: ignore[no-untyped-def]
        """Do nothing: there is one run."""

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a host."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the hosts: any of them can run any device."""
        return range(SERVER_NODE + 1, SERVER_NODE + 1 + self.workers)

    def greet(self, greeting: Greeting) -> None:
        """Let every host answer ``greeting`` before it works on what is sent from now on."""
        self.greeting = greeting

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; whichever host is free takes the next one. Return their ids."""
        sent = list(messages)
        for message in sent:
            identify(message)
        with self._arrived:
            self._todo += [Job(message) for message in sent]
            self._arrived.notify_all()
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, and forget them."""
        with self._arrived:
            return [self._inbox.pop(i) for i in list(message_ids) if i in self._inbox]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies that came within ``timeout`` seconds."""
        return list(self.stream(list(messages), timeout=timeout))

    def stream(
        self, messages: Sequence[Message], *, stop: threading.Event | None = None, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they come: all, or those that came within ``timeout`` seconds.

        Raises:
            InterruptedRunError: ``stop`` was set.
            UserError: an unfit host; none is left (NoHostsError).
        """
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while waiting:
                for reply in self._wait(waiting, deadline, stop):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    yield reply
                if deadline is not None and time.monotonic() > deadline:
                    return
        finally:
            if waiting:
                self._abandon(waiting)

    def _wait(self, waiting: set[str], deadline: float | None, stop: threading.Event | None) -> Iterable[Message]:
        first: float | None = None
        with self._arrived:
            while True:
                here = waiting & self._inbox.keys()
                if here and (len(here) >= self.gathered or not self._todo):
                    break
                now = time.monotonic()
                first = now if here and first is None else first
                if first is not None and now - first > WAKE_SECONDS:
                    break
                if self._broken is not None:
                    raise self._broken
                self._check_alive()
                if stop is not None and stop.is_set():
                    raise InterruptedRunError("stopped while waiting for hosts")
                if deadline is not None and now > deadline:
                    break
                self._arrived.wait(WAKE_SECONDS)
            return [self._inbox.pop(i) for i in here]

    def answered(self, job: Job, host: int, reply: Message) -> None:
        """Take a host's reply, which may say that it has failed."""
        if reply.has_error():
            self.failed(job, host, reason_of(reply))
        else:
            self._deliver(job, reply)

    def failed(self, job: Job, host: int, reason: str) -> None:
        """Give a message that a host has failed at to the next free one, unless too many have failed at it."""
        job.attempts += 1
        if job.attempts < ATTEMPTS:
            log.warning("host %d failed (%s): its message goes to the next free host", host, reason)
            with self._arrived:
                if job.message.metadata.message_id not in self._abandoned:
                    self._todo.appendleft(job)
                self._arrived.notify_all()
        else:
            log.warning("host %d failed (%s): its message is given up after %d tries", host, reason, ATTEMPTS)
            self._deliver(job, Message(Error(HOST_ERROR, reason), reply_to=job.message))

    def _deliver(self, job: Job, reply: Message) -> None:
        number = job.message.metadata.message_id
        with self._arrived:
            if number in self._abandoned:
                self._abandoned.discard(number)
            else:
                self._inbox[number] = reply
            self._arrived.notify_all()

    def fail(self, error: Exception) -> None:
        """Let whoever waits fail with ``error``."""
        with self._arrived:
            self._broken = self._broken or error
            self._arrived.notify_all()

    def _check_alive(self) -> None:
        """Raise NoHostsError when nobody will answer any more."""

    def _abandon(self, ids: Iterable[str]) -> None:
        """Forget messages whose replies nobody waits for any more; what is worked on is dropped when it comes."""
        gone = set(ids)
        with self._arrived:
            queued = {job.message.metadata.message_id for job in self._todo} & gone
            self._todo = deque(job for job in self._todo if job.message.metadata.message_id not in gone)
            self._abandoned |= gone - queued

    def retire(self) -> None:
        """Begin to end the hosts beside whatever comes next: there will be no more messages."""


class LocalGrid(DirectGrid):
    """One host: this process. A message is worked on when its reply is waited for, in the thread that waits."""

    def __init__(self, client_app: ClientApp) -> None:
        super().__init__(workers=1, gathered=1)  # while this thread waits, nothing more comes
        self._call = HostCall(client_app, 0, 1)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Work on the next of the messages, if one is left, and return the replies that are there."""
        self._work()
        return super().pull_messages(message_ids)

    def _wait(self, waiting: set[str], deadline: float | None, stop: threading.Event | None) -> Iterable[Message]:
        if stop is not None and stop.is_set():
            raise InterruptedRunError("stopped while waiting for hosts")
        while self._todo and not waiting & self._inbox.keys():
            self._work()
        return super()._wait(waiting, deadline, stop)

    def _work(self) -> None:
        if self._todo:
            self._call.greet(self.greeting)
            job = self._todo.popleft()
            self.answered(job, 0, self._call(job.message))


class HostCall:
    """Calls a ClientApp as Flower does; what it raises becomes an error reply.

    Args:
        client_app: the hosts' app.
        number: which host it is, from 0 on.
        count: how many there are.
    """

    def __init__(self, client_app: ClientApp, number: int, count: int) -> None:
        self._app = client_app
        config: dict[str, bool | float | int | str] = {"partition-id": number, "num-partitions": count}
        self._node = SERVER_NODE + 1 + number
        self._context = Context(run_id=1, node_id=self._node, node_config=config, state=RecordDict(), run_config={})
        self._greeted: Greeting | None = None

    def greet(self, greeting: Greeting | None) -> None:
        """Answer a greeting, once; UserError where this host is unfit."""
        if greeting is not None and self._greeted is not greeting:
            greeting.check(self(greeting.to(self._node)))
            self._greeted = greeting

    def __call__(self, message: Message) -> Message:
        """Return the app's reply."""
        threads = torch.get_num_threads()
        try:
            # A host in this process must leave the user's own random numbers and threads alone.
            with torch.random.fork_rng(devices=[]), objects_welcome():
                return _reply(self._app(message, self._context), message)
        except Exception as error:
            return Message(Error(HOST_ERROR, f"{type(error).__name__}: {error}"), reply_to=message)
        finally:
            torch.set_num_threads(threads)


def _reply(reply: object, message: Message) -> Message:
    """Return what an app returned; TypeError unless it is a reply to the message, for which somebody waits."""
    if not isinstance(reply, Message):
        raise TypeError(f"the app returned {type(reply).__name__}, not a Message")
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        raise TypeError("the app returned a Message that replies to none: make it with reply_to=message")
    return reply


def reason_of(reply: Message, limit: int = 300) -> str:
    """Return the reason of an error reply on one line (Ray's span many)."""
    return " ".join(str(reply.error.reason).split())[:limit]
