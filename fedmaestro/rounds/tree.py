"""The order in which a round's results are added up: one tree per tier, whoever computes which part of it.

The devices of a tier that finish a round, in ascending order, are the leaves; the node of the leaves ``first … last-1``
has the two halves of that range below it. A cohort is a node: its host adds up what is below, the server goes on from
there. So every sum has the same operands in the same order, and the same bits, however devices are grouped, on however
many hosts, in whatever order replies come in and however often one is asked for again. A device that failed is an
empty leaf: what it leaves is its sibling.

Why a tree and not integer sums: it serves every aggregation. Fixed point needs a scale that all devices know before
they train, an overflow that nobody can exclude, and says nothing about rules that do not only add: stacked factors are
compressed by matrix products, norms weigh devices. The tree fixes the operands of any ``merge``, an own one included,
in float64, and costs ``log₂ n`` partial sums of memory on a host instead of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

Join = Callable[[T, T], T]
"""``(left, right) -> sum``"""


@dataclass(frozen=True, order=True)
class Span:
    """A node: leaves ``first … last - 1`` of a tier's devices."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def halves(self) -> "tuple[Span, Span]":
        """The nodes below; the first is the larger one where they differ. ValueError for a leaf."""
        if len(self) < 2:
            raise ValueError(f"{self} is a leaf")
        middle = self.last - len(self) // 2
        return Span(self.first, middle), Span(middle, self.last)


def joined(left: T | None, right: T | None, join: Join[T]) -> T | None:
    """Return the sum of two nodes, either of which may be empty."""
    if left is None or right is None:
        return right if left is None else left
    return join(left, right)


def reduced(span: Span, leaf: Callable[[int], T | None], join: Join[T]) -> T | None:
    """Return the value of a node; ``leaf`` is asked for its leaves in ascending order, one by one.

    Args:
        span: the node.
        leaf: ``position -> value``; None: the device failed.
        join: adds two values.
    """
    if len(span) == 1:
        return leaf(span.first)
    left, right = span.halves
    return joined(reduced(left, leaf, join), reduced(right, leaf, join), join)


class Tree(Generic[T]):
    """Adds up nodes as they come, in any order: two are joined as soon as both are there.

    Args:
        count: leaves.
        join: adds two values.
    """

    def __init__(self, count: int, join: Join[T]) -> None:
        self._root, self._join = Span(0, count), join
        self._waiting: dict[Span, T | None] = {}

    def put(self, span: Span, value: T | None) -> None:
        """Take the value of a node (None: nothing came of it); every leaf belongs to one such node."""
        path = self._path(span)
        while path and (sibling := _sibling(path[-1], span)) in self._waiting:
            other = self._waiting.pop(sibling)
            left, right = (value, other) if span < sibling else (other, value)
            value, span = joined(left, right, self._join), path.pop()
        self._waiting[span] = value

    @property
    def root(self) -> T | None:
        """The sum of all leaves; ValueError before all are there."""
        if list(self._waiting) != [self._root]:
            raise ValueError(f"only {sorted(self._waiting)} of {self._root} are there")
        return self._waiting[self._root]

    def _path(self, span: Span) -> list[Span]:
        """Return the nodes above ``span``, the root first."""
        path, node = [], self._root
        while node != span:
            inside = [x for x in node.halves if x.first <= span.first and span.last <= x.last] if len(node) > 1 else []
            if not inside:
                raise ValueError(f"{span} is no node of {self._root}")
            path.append(node)
            node = inside[0]
        return path


def _sibling(parent: Span, span: Span) -> Span:
    left, right = parent.halves
    return right if span == left else left
