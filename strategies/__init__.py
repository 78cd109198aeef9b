"""Strategies: a table of named methods, and one file per aggregation rule.

This folder lies at the top of the repository and is imported as ``fedmaestro.strategies``. To add a method: write its
rule in a new file here, add one row to ``STRATEGIES`` (and one to the test matrix, which lists the laws it keeps).
"""

if __name__ != "fedmaestro.strategies":
    raise ImportError("import fedmaestro.strategies, not strategies")

from fedmaestro.plan import SubmodelRule
from fedmaestro.strategies.base import Aggregation, Partial, ServerOptimizer, Strategy
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.zero_pad import ZERO_PAD

_ROWS = (
    Strategy(
        name="nested",
        submodel=SubmodelRule(),
        objective="self-distillation",
        aggregation=COVERAGE_MEAN,
        summary="each tier trains its rank prefix; every column is averaged over the devices that hold it",
        source="per-column mean of RBLA and PreLort (2606.15963), here for LoD layers trained from scratch",
    ),
    Strategy(
        name="zero-pad",
        submodel=SubmodelRule(),
        objective="own-prefix",
        aggregation=ZERO_PAD,
        summary="each tier trains its rank prefix; prefixes are padded with zeros and averaged over all devices",
        source="baseline of HetLoRA (2401.06432)",
    ),
    Strategy(
        name="fedavg-small",
        submodel=SubmodelRule(trains="smallest"),
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="every device trains the smallest tier's model, which then serves all tiers",
        source="FedAvg (1602.05629)",
    ),
    Strategy(
        name="fedavg-full",
        submodel=SubmodelRule(trains="full"),
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="oracle: every device trains the full model whatever its budget; tiers are served its prefixes",
        source="FedAvg (1602.05629)",
    ),
    Strategy(
        name="capable-only",
        submodel=SubmodelRule(trains="capable"),
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="only devices that afford the full model train; tiers are served its prefixes",
        source="FedAvg (1602.05629) on the capable devices",
    ),
    Strategy(
        name="heterofl",
        submodel=SubmodelRule(form="dense"),
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="leading channels of the dense model, as wide as the MACs of the tier's ranks allow",
        source="HeteroFL (2010.01264), GroupNorm for its static BatchNorm, no scaler, no masked loss",
    ),
)

STRATEGIES: dict[str, Strategy] = {row.name: row for row in _ROWS}

__all__ = ["STRATEGIES", "Aggregation", "Partial", "ServerOptimizer", "Strategy"]
