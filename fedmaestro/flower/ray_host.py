"""A host as a Ray actor: what its process does, and how messages get there.

The tensors that messages share (a tier's submodel) are put into Ray's object store once and fetched once per host.
"""

import copy
import os
import platform
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from flwr.app import ArrayRecord, Message, RecordDict

from fedmaestro import __version__

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
    return {"FedMaestro": __version__, "Python": platform.python_version(), "Ray": ray.__version__}


def without(message: Message, names: Sequence[str]) -> Message:
    """Return the message without some of its records; it stays as it is."""
    lighter = copy.copy(message)
    lighter.content = RecordDict({name: record for name, record in message.content.items() if name not in names})
    return lighter
