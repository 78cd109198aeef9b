"""Strategies: tables of named methods and of their parts, and one file per aggregation rule.

This folder lies at the top of the repository and is imported as ``fedmaestro.strategies``. To add an aggregation rule:
write it in a new file here, add one line to ``AGGREGATIONS`` and one row to the test matrix, which lists the laws it
keeps. To add a method: one row in ``STRATEGIES``.
"""

if __name__ != "fedmaestro.strategies":
    raise ImportError("import fedmaestro.strategies, not strategies")

from fedmaestro.fleet.plan import SubmodelRule
from fedmaestro.strategies.base import Aggregation, Partial, Strategy
from fedmaestro.strategies.block_product import BLOCK_PRODUCT
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.hetlora import HETLORA
from fedmaestro.strategies.masked_mean import MASKED_MEAN
from fedmaestro.strategies.partitioned_product import PARTITIONED_PRODUCT
from fedmaestro.strategies.product_svd import PRODUCT_SVD
from fedmaestro.strategies.reordered import REORDERED
from fedmaestro.strategies.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from fedmaestro.strategies.zero_pad import ZERO_PAD

SUBMODELS: dict[str, SubmodelRule] = {
    "own": SubmodelRule(),
    "smallest": SubmodelRule(trains="smallest"),
    "full": SubmodelRule(trains="full"),
    "capable": SubmodelRule(trains="capable"),
    "separate": SubmodelRule(separate=True),
    "width": SubmodelRule(form="dense"),
    "width-smallest": SubmodelRule(form="dense", trains="smallest"),
    "width-separate": SubmodelRule(form="dense", separate=True),
    "width-rolling": SubmodelRule(form="dense", rolls=True),
}
"""Which part of the network a tier trains and is served (``SubmodelRule``)."""

AGGREGATIONS: dict[str, Aggregation] = {
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

_ROWS = (
    Strategy(
        name="fedmaestro",
        submodel=SUBMODELS["own"],
        objective="self-distillation",
        aggregation=COVERAGE_MEAN,
        reorder_every=1,
        tail_start=4.0,
        logit_adjustment=1.0,
        summary="own prefix learns from labels (logit-adjusted), a smaller one from its soft targets; per-column mean "
        "over holders, then columns re-ordered by SVD; columns of few holders start small",
        source="FedMaestro: the switches that paid in our ablation (experiments/README.md)",
    ),
    Strategy(
        name="nested",
        submodel=SUBMODELS["own"],
        objective="self-distillation",
        aggregation=COVERAGE_MEAN,
        summary="each tier trains its rank prefix and smaller ones; every column is averaged over its holders",
        source="per-column mean of RBLA and PreLort (2606.15963), here for LoD layers trained from scratch",
    ),
    Strategy(
        name="partitioned",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="each tier trains its rank prefix; every column is averaged over its holders, in factor space",
        source="RBLA; PreLort (2606.15963) without its nested training",
    ),
    Strategy(
        name="partitioned-product",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=PARTITIONED_PRODUCT,
        summary="each tier trains its rank prefix; rank segments are averaged over their holders as products, then SVD",
        source="raFLoRA (2602.13486)",
    ),
    Strategy(
        name="block-product",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=BLOCK_PRODUCT,
        summary="as partitioned-product, but each segment is refactored within itself: no tier's columns are re-mixed",
        source="tier-preserving variant of raFLoRA (2602.13486), FedMaestro",
    ),
    Strategy(
        name="reordered",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=REORDERED,
        summary="per-column mean, then every layer's columns re-ordered by the SVD of their product",
        source="FedMaestro's pilot; truncation by SVD as in FedHM (2111.14655)",
    ),
    Strategy(
        name="product-svd",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=PRODUCT_SVD,
        summary="products of all devices averaged, then SVD (the tail shrinks: rank collapse)",
        source="FlexLoRA, FedHM (2111.14655)",
    ),
    Strategy(
        name="zero-pad",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=ZERO_PAD,
        summary="prefixes padded with zeros and averaged over all devices (rank collapse)",
        source="baseline of HetLoRA (2401.06432)",
    ),
    Strategy(
        name="hetlora",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=HETLORA,
        summary="zero-padded, weighted by the norm of each device's products instead of its examples",
        source="HetLoRA (2401.06432) without its rank self-pruning",
    ),
    Strategy(
        name="alternating",
        submodel=SUBMODELS["own"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        freezes="alternating",
        summary="per-column mean; devices train V in one round, U in the next: exact per round, half the upload",
        source="RoLoRA (2502.01755), for LoD layers trained from scratch",
    ),
    Strategy(
        name="fedlmt",
        submodel=SUBMODELS["smallest"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="every device trains the smallest tier's low-rank model, which then serves all tiers",
        source="FedLMT (ICML 2024)",
    ),
    Strategy(
        name="fedavg-small",
        submodel=SUBMODELS["width-smallest"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="every device trains one dense model, as narrow as the smallest tier needs, which serves all tiers",
        source="FedAvg (1602.05629)",
    ),
    Strategy(
        name="fedavg-full",
        submodel=SUBMODELS["full"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="oracle: every device trains the full model whatever its budget; tiers are served its prefixes",
        source="FedAvg (1602.05629)",
    ),
    Strategy(
        name="capable-only",
        submodel=SUBMODELS["capable"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="only devices that afford the full model train; tiers are served its prefixes",
        source="FedAvg (1602.05629) on the capable devices",
    ),
    Strategy(
        name="exclusive",
        submodel=SUBMODELS["separate"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="each tier trains a model of its own, with the ranks it affords, on its own devices only",
        source="FedAvg (1602.05629) per tier; the baseline of DepthFL (ICLR 2023)",
    ),
    Strategy(
        name="heterofl",
        submodel=SUBMODELS["width"],
        objective="masked-cross-entropy",
        aggregation=MASKED_MEAN,
        defaults={"model.norm": "static", "model.scaler": "on"},
        summary="leading channels; scaler, static normalisation, and a head that learns a device's own classes only",
        source="HeteroFL (2010.01264); means weighted by examples",
    ),
    Strategy(
        name="fjord",
        submodel=SUBMODELS["width"],
        objective="ordered-prefixes",
        aggregation=COVERAGE_MEAN,
        summary="leading channels; each step trains one random width that the device affords (ordered dropout)",
        source="FjORD (2102.13451) without distillation",
    ),
    Strategy(
        name="fjord-kd",
        submodel=SUBMODELS["width"],
        objective="self-distillation",
        aggregation=COVERAGE_MEAN,
        summary="leading channels; the own width learns from labels, a random smaller one from its soft targets",
        source="FjORD (2102.13451) with self-distillation",
    ),
    Strategy(
        name="fedrolex",
        submodel=SUBMODELS["width-rolling"],
        objective="own-prefix",
        aggregation=COVERAGE_MEAN,
        summary="a window of channels as wide as the tier affords, which moves on by one channel in every round",
        source="FedRolex (2212.01548); means weighted by examples",
    ),
)

STRATEGIES: dict[str, Strategy] = {row.name: row for row in _ROWS}

__all__ = [
    "AGGREGATIONS",
    "SERVER_OPTIMIZERS",
    "STRATEGIES",
    "SUBMODELS",
    "Aggregation",
    "Partial",
    "ServerOptimizer",
    "Strategy",
]
