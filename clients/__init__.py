"""Local objectives: one file each, and what a host does for a device (``base``).

This folder lies at the top of the repository and is imported as ``fedmaestro.clients``.
"""

if __name__ != "fedmaestro.clients":
    raise ImportError("import fedmaestro.clients, not clients")

from fedmaestro.clients.base import Objective
from fedmaestro.clients.exit_distillation import EXIT_DISTILLATION, EXITS_FROM_LAST
from fedmaestro.clients.masked_cross_entropy import MASKED_CROSS_ENTROPY
from fedmaestro.clients.mutual_distillation import MUTUAL_DISTILLATION, SKEW_DISTILLATION
from fedmaestro.clients.ordered_prefixes import ORDERED_PREFIXES
from fedmaestro.clients.own_prefix import OWN_PREFIX
from fedmaestro.clients.paired_prefixes import PAIRED_PREFIXES
from fedmaestro.clients.self_distillation import SELF_DISTILLATION

_ROWS = (
    OWN_PREFIX,
    ORDERED_PREFIXES,
    PAIRED_PREFIXES,
    SELF_DISTILLATION,
    MUTUAL_DISTILLATION,
    SKEW_DISTILLATION,
    MASKED_CROSS_ENTROPY,
    EXIT_DISTILLATION,
    EXITS_FROM_LAST,
)

OBJECTIVES: dict[str, Objective] = {row.name: row for row in _ROWS}

__all__ = ["OBJECTIVES", "Objective"]
