"""Strategies: tables of named methods and of their parts, and one file per aggregation rule and per server step.

This folder lies at the top of the repository and is imported as ``fedmaestro.strategies``. To add an aggregation rule
or a server step: write it in a new file here and add one line to ``tables``; a rule also gets one row in the test
matrix, which lists the laws it keeps. To add a method: one row in ``rows``.
"""

from typing import TYPE_CHECKING, Any

if __name__ != "fedmaestro.strategies":
    raise ImportError("import fedmaestro.strategies, not strategies")

from fedmaestro.strategies.rows import STRATEGIES, SUBMODELS, Strategy

if TYPE_CHECKING:
    from fedmaestro.strategies.base import Aggregation, Partial
    from fedmaestro.strategies.server_optimizers import SERVER_OPTIMIZERS
    from fedmaestro.strategies.server_step import ServerStep
    from fedmaestro.strategies.tables import AGGREGATIONS, SERVER_STEPS

_WITH_TENSORS = {
    "AGGREGATIONS": "tables",
    "SERVER_STEPS": "tables",
    "SERVER_OPTIMIZERS": "server_optimizers",
    "ServerStep": "server_step",
    "Aggregation": "base",
    "Partial": "base",
}


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch when it is asked for: listing the rows takes a tenth of the time so."""
    if name not in _WITH_TENSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WITH_TENSORS[name]}"), name)


__all__ = [
    "AGGREGATIONS",
    "SERVER_OPTIMIZERS",
    "SERVER_STEPS",
    "STRATEGIES",
    "SUBMODELS",
    "Aggregation",
    "Partial",
    "ServerStep",
    "Strategy",
]
