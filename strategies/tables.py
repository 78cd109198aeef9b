"""The tables of parts: aggregation rules and server steps. Importing them loads PyTorch, unlike the rows."""

from collections.abc import Callable

from fedmaestro.config.base import Value
from fedmaestro.errors import check_name
from fedmaestro.strategies.base import AnyAggregation
from fedmaestro.strategies.block_product import BLOCK_PRODUCT
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.hetlora import HETLORA
from fedmaestro.strategies.masked_mean import MASKED_MEAN
from fedmaestro.strategies.partitioned_product import PARTITIONED_PRODUCT
from fedmaestro.strategies.product_svd import PRODUCT_SVD
from fedmaestro.strategies.reordered import REORDER, REORDERED
from fedmaestro.strategies.server_optimizers import OPTIMIZER
from fedmaestro.strategies.server_step import ServerStep, StepRow
from fedmaestro.strategies.tail_decay import TAIL_DECAY
from fedmaestro.strategies.tail_start import TAIL_START
from fedmaestro.strategies.zero_pad import ZERO_PAD

AGGREGATIONS: dict[str, AnyAggregation] = {
    rule.name: rule
    for rule in (
        COVERAGE_MEAN,
        MASKED_MEAN,
        ZERO_PAD,
        HETLORA,
        PRODUCT_SVD,
        PARTITIONED_PRODUCT,
        BLOCK_PRODUCT,
        REORDERED,
    )
}
"""How the devices' submodels become the next global state."""

SERVER_STEPS: dict[str, StepRow] = {row.name: row for row in (OPTIMIZER, TAIL_DECAY, REORDER, TAIL_START)}
"""What the server can do with the aggregated model; ``server.steps`` names some of them, in their order."""


def chain_of(value: Callable[[str], Value | None]) -> tuple[ServerStep, ...]:
    """Return the server's chain where settings have the given values.

    Raises:
        UserError: ``server.steps`` or another setting names what there is not.
    """
    names = str(value("server.steps")).split()
    for name in names:
        check_name("server.steps", name, SERVER_STEPS)
    return tuple(SERVER_STEPS[name].of(value) for name in names)
