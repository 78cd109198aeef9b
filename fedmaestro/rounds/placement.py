"""Where this process trains: on the CPU, unless it is told otherwise before its first message."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_where = torch.device("cpu")


def place(where: str | torch.device) -> None:
    """Train on ``where`` from now on. Models that are resident already stay where they are."""
    global _where
    _where = torch.device(where)


def placed() -> torch.device:
    """Return where this process trains."""
    return _where


@contextmanager
def placed_on(where: str | torch.device) -> Iterator[None]:
    """Train on ``where`` for a while."""
    before = placed()
    place(where)
    try:
        yield
    finally:
        place(before)
