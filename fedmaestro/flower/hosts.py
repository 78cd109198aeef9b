"""Finding the hosts, and exchanging messages with them in a way that can be interrupted."""

import threading
import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import DESCRIBE, message, read_description
from fedmaestro.rounds.environment import Environment

REGISTRATION_SECONDS = 120.0
"""How long to wait for all hosts to register (Flower starts the ServerApp before they have)."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (Ctrl-C, or the runtime ended)."""


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    stop: threading.Event,
    on_reply: Callable[[], None] | None = None,
    timeout: float | None = None,
) -> list[Message]:
    """Send ``messages`` and return the replies: all, or those that came within ``timeout`` wall seconds.

    Like ``Grid.send_and_receive``, but it polls faster at first (a small round is over within its 0.1 s) and raises
    InterruptedRunError when ``stop`` is set.
    """
    waiting = {message_id for message_id in grid.push_messages(messages) if message_id}
    replies: list[Message] = []
    started = time.monotonic()
    while waiting and (timeout is None or time.monotonic() - started <= timeout):
        arrived = list(grid.pull_messages(waiting))
        replies += arrived
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        for _ in arrived:
            if on_reply is not None:
                on_reply()
        if waiting and stop.wait(min(1.0, 0.01 + 0.02 * (time.monotonic() - started))):
            raise InterruptedRunError("stopped while waiting for hosts")
    return replies


def one_line(reply: Message, limit: int = 300) -> str:
    """Return the reason of an error reply on one line (Ray's span many)."""
    return " ".join(str(reply.error.reason).split())[:limit]


def find_hosts(grid: Grid, env: Environment, stop: threading.Event) -> list[int]:
    """Wait until every host has registered and check that all see the server's data.

    Returns:
        The node ids.

    Raises:
        UserError: too few hosts in time, a host that cannot open the data, or one with other data.
    """
    # All at once, so that every Ray actor imports PyTorch and opens the data at the same time.
    described = _describe(grid, _wait_for_nodes(grid, 1, stop), env, stop)
    nodes = _wait_for_nodes(grid, max(count for count, _ in described.values()), stop)
    described |= _describe(grid, [node for node in nodes if node not in described], env, stop)
    for node, (_, fingerprint) in described.items():
        if fingerprint != env.fingerprint:
            raise UserError(
                f"host {node} sees other data, another partition or another fleet than the server: "
                "give all of them the same files and the same versions of the libraries"
            )
    return nodes


def _wait_for_nodes(grid: Grid, count: int, stop: threading.Event) -> list[int]:
    deadline = time.monotonic() + REGISTRATION_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise UserError(f"only {len(nodes)} of {count} hosts registered within {REGISTRATION_SECONDS:.0f} s")
        if stop.wait(0.02):
            raise InterruptedRunError("stopped while waiting for hosts to register")
    return nodes


def _describe(grid: Grid, nodes: Iterable[int], env: Environment, stop: threading.Event) -> dict[int, tuple[int, str]]:
    """Return (number of hosts, data fingerprint) by node."""
    described: dict[int, tuple[int, str]] = {}
    for reply in exchange(grid, [message(DESCRIBE, node, env) for node in nodes], stop):
        if reply.has_error():
            raise UserError(f"host {reply.metadata.src_node_id} cannot take part: {one_line(reply)}")
        described[reply.metadata.src_node_id] = read_description(reply)
    return described
