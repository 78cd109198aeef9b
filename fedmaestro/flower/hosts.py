"""Finding the hosts, and exchanging messages with them in a way that can be interrupted and forgives lost hosts."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import DESCRIBE, message, read_description
from fedmaestro.flower.direct_grid import ATTEMPTS, DirectGrid, Greeting, reason_of
from fedmaestro.flower.identity import identify
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.rounds.environment import Environment, share

log = logging.getLogger("fedmaestro")

REGISTRATION_SECONDS = 120.0
"""How long to wait for all hosts to register (Flower starts the ServerApp before they have)."""


def exchange(
    grid: Grid, messages: Sequence[Message], stop: threading.Event, timeout: float | None = None
) -> Iterator[tuple[Message, Message]]:
    """Send messages and yield each with its reply as it comes: all, or those that came within ``timeout`` wall seconds.

    What a host fails at is sent to another one, up to a limit; a reply with an error is yielded after that.

    Raises:
        InterruptedRunError: ``stop`` was set.
        UserError: no host is left.
    """
    if isinstance(grid, DirectGrid):
        for message in messages:
            identify(message)
        by_id = {message.metadata.message_id: message for message in messages}
        for reply in grid.stream(messages, stop=stop, timeout=timeout):
            yield by_id[reply.metadata.reply_to_message_id], reply
    else:
        yield from _through_superlink(grid, messages, stop, timeout)


def _through_superlink(
    grid: Grid, messages: Sequence[Message], stop: threading.Event, timeout: float | None
) -> Iterator[tuple[Message, Message]]:
    """Exchange messages through Flower's own grid: it is asked, often at first (a small round is over within 0.1 s)."""
    sent = dict(zip(grid.push_messages(messages), messages, strict=True))
    origin = {id(message): message for message in messages}
    attempts = dict.fromkeys(origin, 1)
    started = time.monotonic()
    while sent and (timeout is None or time.monotonic() - started <= timeout):
        for reply in list(grid.pull_messages(set(sent))):
            message = sent.pop(reply.metadata.reply_to_message_id)
            first = origin[id(message)]
            if reply.has_error() and (again := _elsewhere(grid, message, attempts[id(first)], reply)) is not None:
                attempts[id(first)] += 1
                origin[id(again)] = first
                sent[next(iter(grid.push_messages([again])))] = again
                continue
            yield first, reply
        if sent and stop.wait(min(1.0, 0.01 + 0.02 * (time.monotonic() - started))):
            raise InterruptedRunError("stopped while waiting for hosts")


def _elsewhere(grid: Grid, message: Message, attempts: int, reply: Message) -> Message | None:
    """Return the message anew for another host than the one that failed at it; None once that was tried enough."""
    nodes = sorted(grid.get_node_ids())
    failed = message.metadata.dst_node_id
    others = [node for node in nodes if node > failed] + [node for node in nodes if node < failed]
    if attempts >= ATTEMPTS or not others:
        return None
    log.warning("host %d failed (%s): its message goes to host %d", failed, reason_of(reply), others[0])
    return Message(message.content, dst_node_id=others[0], message_type=message.metadata.message_type)


def find_hosts(grid: Grid, env: Environment, stop: threading.Event) -> None:
    """Make sure that all hosts see the server's data: now, or, where hosts come and go, before they get work.

    Raises:
        UserError: too few hosts in time, a host that cannot open the data, or one with other data.
    """
    if isinstance(grid, DirectGrid):
        share(env)
        grid.greet(Greeting(message=lambda node: message(DESCRIBE, node, env), check=lambda reply: _check(reply, env)))
        return
    # All at once, so that every host imports PyTorch and opens the data at the same time.
    described = _describe(grid, _wait_for_nodes(grid, 1, stop), env, stop)
    nodes = _wait_for_nodes(grid, max(described.values()), stop)
    _describe(grid, [node for node in nodes if node not in described], env, stop)


def _wait_for_nodes(grid: Grid, count: int, stop: threading.Event) -> list[int]:
    deadline = time.monotonic() + REGISTRATION_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise UserError(f"only {len(nodes)} of {count} hosts registered within {REGISTRATION_SECONDS:.0f} s")
        if stop.wait(0.02):
            raise InterruptedRunError("stopped while waiting for hosts to register")
    return nodes


def _describe(grid: Grid, nodes: Iterable[int], env: Environment, stop: threading.Event) -> dict[int, int]:
    """Check hosts; return how many there are, by what each of them says."""
    messages = [message(DESCRIBE, node, env) for node in nodes]
    return {sent.metadata.dst_node_id: _check(reply, env) for sent, reply in exchange(grid, messages, stop)}


def _check(reply: Message, env: Environment) -> int:
    """Return how many hosts there are; UserError for a host that cannot work on this experiment."""
    host = reply.metadata.src_node_id
    if reply.has_error():
        raise UserError(f"host {host} cannot take part: {reason_of(reply)}")
    count, fingerprint, data = read_description(reply)
    if data != env.task.fingerprint:
        raise UserError(
            f"host {host} has other data of {env.task.name!r} than the server: give it the same files "
            "(data.dir, FEDMAESTRO_DATA_DIR)"
        )
    if fingerprint != env.fingerprint:
        raise UserError(
            f"host {host} makes another partition or another fleet of the same data than the server: "
            "give it the same versions of the libraries and the same fleet file"
        )
    return count
