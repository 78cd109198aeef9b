"""What travels between this process and a host in an actor.

Messages of one tier share their submodel. It goes to a host once, with the first of them, and is named by a number
afterwards. Both ends know what a host holds, for it opens its letters in the order they are sent.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message

T = TypeVar("T")

HELD = 8
"""Records that a host holds: those of a round's tiers."""


@dataclass(frozen=True, kw_only=True)
class Letter:
    """A message, and what it shares with others."""

    message: Message
    """Without the records that it shares."""
    shared: Mapping[str, int] = field(default_factory=dict)
    """Name in the message -> number."""
    records: Mapping[int, ArrayRecord] = field(default_factory=dict)
    """Those that the host does not hold yet, by number."""


def packed(content: Letter | Message) -> bytes:
    """Return what ``pickle.loads`` opens. Ray hands bytes on; other objects it looks at one by one, in Python."""
    return pickle.dumps(content, pickle.HIGHEST_PROTOCOL)


class Held(Generic[T]):
    """The shared records that a host holds, by number."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, T] = OrderedDict()

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def put(self, number: int, record: T) -> None:
        """Hold a record; what was used longest ago goes."""
        self._held[number] = record
        while len(self._held) > HELD:
            self._held.popitem(last=False)

    def use(self, number: int) -> T:
        """Return a record; KeyError for one that is not held."""
        self._held.move_to_end(number)
        return self._held[number]
