"""Where this process trains: on the CPU, unless it is told otherwise before its first message."""

import torch

_where = torch.device("cpu")


def place(where: str | torch.device) -> None:
    """Train on ``where`` from now on. Models that are resident already stay where they are."""
    global _where
    _where = torch.device(where)


def placed() -> torch.device:
    """Return where this process trains."""
    return _where
