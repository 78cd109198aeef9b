"""A host as a Ray actor: what its process does, and how messages get there.

The tensors that messages share (a tier's submodel) get to a host once: with the first message that needs them.
"""

import os
import pickle
import platform
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import ray
from flwr.app import ArrayRecord, Message

from fedmaestro import __version__
from fedmaestro.flower.letter import Held, Letter, packed

NODE_ID = 8
"""Digits of Ray's id of a node that are shown: nodes of one machine have one name and one address."""


class RayHost:
    """The actor."""

    def __init__(self, client_app: Any, number: int, count: int, paths: Sequence[str], where: str = "cpu") -> None:
        # What the driver can import must be importable here: an app of the user's, too.
        sys.path += [path for path in paths if path not in sys.path]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._app, self._number, self._count, self._where = client_app, number, count, where
        self._held: Held[ArrayRecord] = Held()

    def start(self) -> dict[str, str]:
        """Load what the work needs, and say which versions this is."""
        from fedmaestro.flower.client_app import app
        from fedmaestro.flower.direct_grid import HostCall
        from fedmaestro.flower.identity import SERVER_NODE, take_identity
        from fedmaestro.rounds.placement import place

        place(self._where)
        node = SERVER_NODE + 1 + self._number
        take_identity(node)
        self._call = HostCall(ray.get(self._app[0]) if self._app else app, self._number, self._count)
        return versions()

    def node(self) -> tuple[str, str]:
        """Return Ray's id of the node, and what people call it."""
        node = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return node, f"{socket.gethostname()} ({address}, {node[:NODE_ID]})"

    def lacking(self, message: Message) -> list[str]:
        """Return the fingerprints of what a message names and this node does not have."""
        from fedmaestro.flower.parcel import lacking

        return lacking(message)

    def take(self, parcel: Sequence[Any]) -> None:
        """Put a parcel into this node's cache: a list of one reference to it."""
        from fedmaestro.flower.parcel import unpack

        unpack(ray.get(parcel[0]))

    def work(self, letter: bytes, stored: Sequence[Any] = ()) -> bytes:
        """Return the app's reply, packed.

        Args:
            letter: a packed ``Letter``.
            stored: references to records that it shares and lacks, by their numbers.
        """
        opened: Letter = pickle.loads(letter)
        records = {**opened.records} | {number: ray.get(reference) for number, reference in stored}
        for number, record in records.items():
            self._held.put(number, record)
        for name, number in opened.shared.items():
            opened.message.content[name] = self._held.use(number)
        return packed(self._call(opened.message))


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all machines."""
    # PyTorch without what a build adds to its number (+cpu).
    libraries = {name: version(name).partition("+")[0] for name in ("torch", "numpy", "flwr", "ray")}
    return {"FedMaestro": __version__, "Python": platform.python_version(), **libraries}
