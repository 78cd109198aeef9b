"""The tables of parts: aggregation rules and server steps. Importing them loads PyTorch, unlike the rows."""

from collections.abc import Callable

from fedmaestro.config.base import Value
from fedmaestro.errors import UserError, check_name
from fedmaestro.strategies.base import AnyAggregation
from fedmaestro.strategies.block_product import BLOCK_PRODUCT
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.entry_mean import ENTRY_MEAN
from fedmaestro.strategies.hetlora import HETLORA
from fedmaestro.strategies.masked_mean import MASKED_MEAN
from fedmaestro.strategies.multi_krum import MULTI_KRUM
from fedmaestro.strategies.norm_clipping import NORM_CLIPPING
from fedmaestro.strategies.order_statistics import COORDINATE_MEDIAN, TRIMMED_MEAN
from fedmaestro.strategies.partitioned_product import PARTITIONED_PRODUCT
from fedmaestro.strategies.product_svd import PRODUCT_SVD
from fedmaestro.strategies.reordered import REORDER, REORDERED
from fedmaestro.strategies.rows import PLAIN
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
        ENTRY_MEAN,
        ZERO_PAD,
        HETLORA,
        PRODUCT_SVD,
        PARTITIONED_PRODUCT,
        BLOCK_PRODUCT,
        REORDERED,
        NORM_CLIPPING,
        COORDINATE_MEDIAN,
        TRIMMED_MEAN,
        MULTI_KRUM,
    )
}
"""How the devices' submodels become the next global state."""

SERVER_STEPS: dict[str, StepRow] = {row.name: row for row in (OPTIMIZER, TAIL_DECAY, REORDER, TAIL_START)}
"""What the server can do with the aggregated model; ``server.steps`` names some of them, in their order."""


def chain_of(
    value: Callable[[str], Value | None], own: Callable[[str], Value | None] = lambda _key: None
) -> tuple[ServerStep, ...]:
    """Return the server's chain where settings have the given values.

    Args:
        value: of each setting.
        own: what the experiment itself says of a setting; None: nothing.

    Raises:
        UserError: ``server.steps`` or another setting names what there is not, a step comes twice, or the experiment
            sets a setting of a step that the chain lacks.
    """
    steps = str(value("server.steps"))
    names = steps.split()
    for name in names:
        check_name("server.steps", name, SERVER_STEPS)
        if names.count(name) > 1:
            raise UserError(f"server.steps={steps!r} names {name} twice: each step has one memory, name it once")
    for row in SERVER_STEPS.values():
        for key in row.settings.values():
            if own(key) in (None, PLAIN.get(key)):
                continue
            if row.name not in names:
                raise UserError(
                    f"{key}={own(key)} has no effect: server.steps={steps!r} lacks {row.name}: add it, or leave "
                    f"{key} out"
                )
            other, there = row.idle.get(key, ("", None))
            if other and value(other) == there:
                raise UserError(f"{key}={own(key)} has no effect: {other} is {there}: change that, or leave {key} out")
    return tuple(SERVER_STEPS[name].of(value) for name in names)
