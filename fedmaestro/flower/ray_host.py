"""A host as a Ray actor: what its process does, and how messages get there.

The tensors that messages share (a tier's submodel) are put into Ray's object store once and fetched once per host.
"""

import copy
import os
import platform
import socket
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import ray
from flwr.app import ArrayRecord, Message, RecordDict

from fedmaestro import __version__

NODE_ID = 8
"""Digits of Ray's id of a node that are shown: nodes of one machine have one name and one address."""

KEPT = 8
"""Records that a host keeps: those of a round's tiers."""


class RayHost:
    """The actor."""

    def __init__(self, client_app: Any, number: int, count: int, paths: Sequence[str], where: str = "cpu") -> None:
        # What the driver can import must be importable here: an app of the user's, too.
        sys.path += [path for path in paths if path not in sys.path]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._app, self._number, self._count, self._where = client_app, number, count, where
        self._records: OrderedDict[str, ArrayRecord] = OrderedDict()

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

    def work(self, message: Message, shared: Mapping[str, Sequence[Any]]) -> Message:
        """Return the app's reply.

        Args:
            message: without the records that messages share.
            shared: those in Ray's object store, each as a list of one reference, by their names.
        """
        content = message.content
        for name, (reference,) in shared.items():
            content[name] = self._record(reference)
        return self._call(message)

    def _record(self, reference: Any) -> ArrayRecord:
        key = reference.hex()
        if key not in self._records:
            self._records[key] = ray.get(reference)
            while len(self._records) > KEPT:
                self._records.popitem(last=False)
        self._records.move_to_end(key)
        return self._records[key]


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all machines."""
    # PyTorch without what a build adds to its number (+cpu).
    libraries = {name: version(name).partition("+")[0] for name in ("torch", "numpy", "flwr", "ray")}
    return {"FedMaestro": __version__, "Python": platform.python_version(), **libraries}


def without(message: Message, names: Sequence[str]) -> Message:
    """Return the message without some of its records; it stays as it is."""
    lighter = copy.copy(message)
    lighter.content = RecordDict({name: record for name, record in message.content.items() if name not in names})
    return lighter
