"""The table of named methods: which settings make each of them. Importing it loads no tensors.

A method is a choice for each of several independent switches, and each switch is a setting. So a row is the values that
settings take where the experiment leaves them at ``default``; whatever the experiment sets goes before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedmaestro.config.base import Value
from fedmaestro.config.experiment import decided_by_rows
from fedmaestro.errors import check_name
from fedmaestro.fleet.rule import SubmodelRule

if TYPE_CHECKING:
    from fedmaestro.strategies.base import AnyAggregation
    from fedmaestro.strategies.server_step import ServerStep

SUBMODELS: dict[str, SubmodelRule] = {
    "own": SubmodelRule(),
    "smallest": SubmodelRule(trains="smallest"),
    "full": SubmodelRule(trains="full"),
    "capable": SubmodelRule(trains="capable"),
    "separate": SubmodelRule(separate=True),
    "separate-affordable": SubmodelRule(separate=True, trains="affordable"),
    "rank-and-width": SubmodelRule(narrows=True),
    "width": SubmodelRule(form="dense"),
    "width-smallest": SubmodelRule(form="dense", trains="smallest"),
    "width-full": SubmodelRule(form="dense", trains="full"),
    "width-capable": SubmodelRule(form="dense", trains="capable"),
    "width-separate": SubmodelRule(form="dense", separate=True),
    "width-rolling": SubmodelRule(form="dense", rolls=True),
    "depth": SubmodelRule(form="dense", scales="depth", exits="ensemble"),
    "width-depth": SubmodelRule(form="dense", scales="both", exits="last"),
    "width-blocks": SubmodelRule(form="dense", scales="blocks"),
    "entries": SubmodelRule(form="dense", scales="entries"),
}
"""Which part of the network a tier trains and is served (``SubmodelRule``)."""

PLAIN: dict[str, Value] = {
    "train.submodel": "own",
    "train.objective": "own-prefix",
    "train.aggregation": "coverage-mean",
    "train.freeze": "none",
    "train.per-tier": "none",
    "train.logit-adjustment": 0.0,
    "train.proximal": 0.0,
    "train.correction": "none",
    "model.norm": "group",
    "model.scaler": "off",
    "server.steps": "optimizer tail-decay reorder tail-start",
    "server.optimizer": "none",
    "server.momentum": 0.9,
    "server.damping": 0.0,
    "server.tail-decay": 0.0,
    "server.reorder-every": "never",
    "server.tail-start": 0.0,
}
"""What a row does where it says nothing. A setting that is missing here, too, has no value of its own by default, or
follows from the others (``server.space``)."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of ``STRATEGIES``."""

    name: str
    settings: Mapping[str, Value] = field(default_factory=dict)
    """Dotted settings that differ from ``PLAIN``."""
    unless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings of the row that do not hold in an experiment that asks for something in one of others."""
    summary: str
    source: str
    paper: str = ""
    """Whose method it is; empty: of this project, or of user code."""
    code: str = ""
    """The public code that it was checked against, besides the paper; empty: none."""
    departures: tuple[str, ...] = ()
    """Where it differs from both; none: it is faithful. Files of its parts say more."""

    def value(self, key: str) -> Value | None:
        """Return the row's value of a setting; None: it has none."""
        return self.settings.get(key, PLAIN.get(key))

    @property
    def submodel(self) -> SubmodelRule:
        """What devices train."""
        return SUBMODELS[str(self.value("train.submodel"))]

    @property
    def objective(self) -> str:
        """Name of the local objective in ``fedmaestro.clients.OBJECTIVES``."""
        return str(self.value("train.objective"))

    @property
    def aggregation(self) -> "AnyAggregation":
        """How devices' submodels become one model."""
        from fedmaestro.strategies.tables import AGGREGATIONS

        return AGGREGATIONS[str(self.value("train.aggregation"))]

    @property
    def server(self) -> "tuple[ServerStep, ...]":
        """The chain of steps that this model goes through."""
        from fedmaestro.strategies.tables import chain_of

        return chain_of(self.value)

    def describe_server(self) -> str:
        """Return the server's settings that differ from ``PLAIN``: ``reorder-every 1, tail-start 4.0``, or none."""
        own = {key.removeprefix("server."): x for key, x in self.settings.items() if key.startswith("server.")}
        return ", ".join(f"{key} {value}" for key, value in own.items()) or "none"


_ROWS = (
    Strategy(
        name="fedmaestro",
        settings={
            "train.submodel": "rank-and-width",
            "train.objective": "skew-distillation",
            "train.logit-adjustment": 1.0,
            "server.optimizer": "momentum",
            "server.momentum": 0.5,
            "server.space": "product",
            "server.tail-start": 10.0,
        },
        unless={
            "server.tail-start": ("ranks.rule",),
            # What needs prefixes of whole layers.
            "train.submodel": ("ranks.rule", "ranks.shrink-threshold", "train.group-lasso", "server.tail-decay"),
        },
        summary="smaller tiers have fewer channels and lower ranks; the own submodel learns from labels (logit-"
        "adjusted), a smaller one from its soft targets, and the other way round as far as labels are skewed; mean "
        "over holders, momentum on products, columns ordered by SVD; what few devices hold starts small",
        source="FedMaestro: the switches that paid in our ablation (experiments/README.md)",
    ),
    Strategy(
        name="nested",
        settings={"train.objective": "self-distillation"},
        summary="each tier trains its rank prefix and smaller ones; every column is averaged over its holders",
        source="per-column mean of RBLA and PreLort (2606.15963), here for LoD layers trained from scratch",
        paper="RBLA (2408.08699), PreLort (2606.15963)",
        departures=(
            "LoD layers trained from scratch in the place of LoRA adapters",
            "smaller prefixes learn by distillation",
        ),
    ),
    Strategy(
        name="partitioned",
        summary="each tier trains its rank prefix; every column is averaged over its holders, in factor space",
        source="RBLA; PreLort (2606.15963) without its nested training",
        paper="RBLA (2408.08699), PreLort (2606.15963)",
        departures=(
            "LoD layers trained from scratch in the place of LoRA adapters",
            "without PreLort's nested training",
        ),
    ),
    Strategy(
        name="partitioned-product",
        settings={"train.aggregation": "partitioned-product"},
        summary="each tier trains its rank prefix; rank segments are averaged over their holders as products, then SVD",
        source="raFLoRA (2602.13486)",
        paper="raFLoRA (2602.13486)",
        departures=("LoD layers trained from scratch",),
    ),
    Strategy(
        name="block-product",
        settings={"train.aggregation": "block-product"},
        summary="as partitioned-product, but each segment is refactored within itself: no tier's columns are re-mixed",
        source="tier-preserving variant of raFLoRA (2602.13486), FedMaestro",
        paper="raFLoRA (2602.13486)",
        departures=("segments are factored within themselves: ours",),
    ),
    Strategy(
        name="reordered",
        settings={"train.aggregation": "reordered"},
        summary="per-column mean, then every layer's columns re-ordered by the SVD of their product",
        source="FedMaestro's pilot; truncation by SVD as in FedHM (2111.14655)",
        paper="FedHM (2111.14655)",
        departures=("the mean over holders is re-ordered, and nothing is truncated: ours",),
    ),
    Strategy(
        name="product-svd",
        settings={"train.aggregation": "product-svd"},
        summary="products of all devices averaged, then SVD (the tail shrinks: rank collapse)",
        source="FlexLoRA, FedHM (2111.14655)",
        paper="FedHM (2111.14655), FlexLoRA",
        departures=("LoD layers trained from scratch",),
    ),
    Strategy(
        name="zero-pad",
        settings={"train.aggregation": "zero-pad"},
        summary="prefixes padded with zeros and averaged over all devices (rank collapse)",
        source="baseline of HetLoRA (2401.06432)",
        paper="HetLoRA (2401.06432), its baseline",
        departures=("LoD layers trained from scratch",),
    ),
    Strategy(
        name="hetlora",
        settings={"train.aggregation": "hetlora"},
        summary="zero-padded, weighted by the norm of each device's products instead of its examples",
        source="HetLoRA (2401.06432) without its rank self-pruning",
        paper="HetLoRA (2401.06432)",
        departures=(
            "no rank self-pruning",
            "LoD layers trained from scratch",
        ),
    ),
    Strategy(
        name="alternating",
        settings={"train.freeze": "alternating"},
        summary="per-column mean; devices train V in one round, U in the next: exact per round, half the upload",
        source="RoLoRA (2502.01755), for LoD layers trained from scratch",
        paper="RoLoRA (2502.01755)",
        departures=(
            "LoD layers trained from scratch",
            "tiers of different rank, which the paper has not",
        ),
    ),
    Strategy(
        name="fedprox",
        settings={"train.proximal": 0.01},
        summary="per-column mean; devices are held near what they were sent by a proximal term",
        source="FedProx (1812.06127), on rank prefixes",
        paper="FedProx (1812.06127)",
        departures=("on rank prefixes",),
    ),
    Strategy(
        name="scaffold",
        settings={"train.correction": "scaffold"},
        summary="per-column mean; devices correct their steps by control variates, which double the traffic",
        source="SCAFFOLD (1910.06378), on rank prefixes",
        paper="SCAFFOLD (1910.06378)",
        departures=(
            "on rank prefixes, counted entry by entry",
            "means weighted by examples",
        ),
    ),
    Strategy(
        name="fedlmt",
        settings={"train.submodel": "smallest"},
        summary="every device trains the smallest tier's low-rank model, which then serves all tiers",
        source="FedLMT (ICML 2024)",
        paper="FedLMT (ICML 2024)",
        departures=("the smallest tier's ranks in every layer, by this project's budgets",),
    ),
    Strategy(
        name="fedavg-small",
        settings={"train.submodel": "width-smallest"},
        summary="every device trains one dense model, as narrow as the smallest tier needs, which serves all tiers",
        source="FedAvg (1602.05629)",
        paper="FedAvg (1602.05629)",
        code="Flower's baselines/niid_bench",
    ),
    Strategy(
        name="fedavg-full",
        settings={"train.submodel": "full"},
        summary="oracle: every device trains the full model whatever its budget; tiers are served its prefixes",
        source="FedAvg (1602.05629)",
        paper="FedAvg (1602.05629)",
        departures=("ignores budgets: an oracle",),
    ),
    Strategy(
        name="capable-only",
        settings={"train.submodel": "capable"},
        summary="only devices that afford the full model train; tiers are served its prefixes",
        source="FedAvg (1602.05629) on the capable devices",
        paper="FedAvg (1602.05629)",
    ),
    Strategy(
        name="exclusive",
        settings={"train.submodel": "separate-affordable"},
        summary="a separate model for each size, trained by all devices that afford it: a device trains its own size "
        "and then every smaller one, and pays for all of them",
        source="exclusive learning, the baseline of DepthFL (ICLR 2023), on ranks; in one federation, so that sizes "
        "share a round's devices",
        paper="DepthFL (ICLR 2023), its baseline",
        departures=(
            "sizes are ranks",
            "sizes share the devices of a round, so each has fewer than in runs of its own",
        ),
    ),
    Strategy(
        name="exclusive-tier",
        settings={"train.submodel": "separate"},
        summary="each tier trains a model of its own, with the ranks it affords, on its own devices only",
        source="FedAvg (1602.05629) per tier",
        paper="FedAvg (1602.05629)",
    ),
    Strategy(
        name="heterofl",
        settings={
            "train.submodel": "width",
            "train.objective": "masked-cross-entropy",
            "train.aggregation": "masked-mean",
            "model.norm": "static",
            "model.scaler": "on",
        },
        summary="leading channels; scaler, static normalisation, and a head that learns a device's own classes only",
        source="HeteroFL (2010.01264); means weighted by examples",
        paper="HeteroFL (2010.01264)",
        code="Flower's baselines/heterofl",
        departures=(
            "means weighted by examples, theirs are plain",
            "statistics of norms from a sample of the training set, theirs from all of it",
            "the scaler divides by the channels kept, theirs by the nominal width",
            "without norm layers (lenet, mlp) neither scaler nor statistics act",
        ),
    ),
    Strategy(
        name="fjord",
        settings={"train.submodel": "width", "train.objective": "ordered-prefixes"},
        summary="leading channels; each step trains one random width that the device affords (ordered dropout)",
        source="FjORD (2102.13451) without distillation",
        paper="FjORD (2102.13451)",
        code="Flower's baselines/fjord",
        departures=(
            "GroupNorm instead of one BatchNorm for each width",
            "widths are those of the fleet's tiers",
        ),
    ),
    Strategy(
        name="fjord-kd",
        settings={"train.submodel": "width", "train.objective": "self-distillation"},
        summary="leading channels; the own width learns from labels, a random smaller one from its soft targets",
        source="FjORD (2102.13451) with self-distillation",
        paper="FjORD (2102.13451)",
        code="Flower's baselines/fjord",
        departures=(
            "GroupNorm instead of one BatchNorm for each width",
            "the teacher is the own width, the student never; Flower's baseline draws the largest width as student too",
            "temperature 1, equal weights of labels and teacher",
        ),
    ),
    Strategy(
        name="fedrolex",
        settings={
            "train.submodel": "width-rolling",
            "train.objective": "masked-cross-entropy",
            "train.aggregation": "masked-mean",
            "model.norm": "static",
            "model.scaler": "on",
        },
        summary="a window of channels as wide as the tier affords, which moves on by one channel a round; scaler, "
        "static normalisation and masked head as in heterofl",
        source="FedRolex (2212.01548) with the parts of HeteroFL that its release keeps; means weighted by examples",
        paper="FedRolex (2212.01548)",
        code="the authors' release",
        departures=(
            "means weighted by examples",
            "tiers are served the window trained last, which the paper leaves open",
            "one channel a round in every layer",
        ),
    ),
    Strategy(
        name="depthfl",
        settings={"train.submodel": "depth", "train.objective": "exit-distillation"},
        summary="the first blocks with a classifier after each, which learn from each other; tiers are served the "
        "ensemble of theirs",
        source="DepthFL (Kim et al., ICLR 2023) with FedAvg; means weighted by examples",
        paper="DepthFL (ICLR 2023)",
        code="Flower's baselines/depthfl",
        departures=(
            "FedAvg instead of FedDyn",
            "distillation has its whole weight from the first round on",
            "classifiers without convolutions of their own",
        ),
    ),
    Strategy(
        name="scalefl",
        settings={
            "train.submodel": "width-depth",
            "train.objective": "exits-from-last",
            "model.norm": "static",
            "model.scaler": "on",
        },
        summary="width and depth scaled together; early exits learn from the last one, which serves the tier",
        source="ScaleFL (Ilhan et al., CVPR 2023); means weighted by examples",
        paper="ScaleFL (CVPR 2023)",
        code="the authors' release",
        departures=(
            "width and depth in one proportion, theirs are options",
            "distillation from the first round on, at temperature 1",
            "means weighted by examples",
        ),
    ),
    Strategy(
        name="nefl",
        settings={"train.submodel": "width-blocks", "train.per-tier": "norm step", "model.norm": "static"},
        summary="leading channels, and in residual networks fewer blocks with learnt step sizes; norms and step sizes "
        "are each tier's own, where the model has them",
        source="NeFL (2308.07761); means weighted by examples, each device trains its tier's size",
        paper="NeFL (2308.07761)",
        code="the authors' release",
        departures=(
            "blocks are left out from the last one on",
            "means weighted by examples",
            "where a network has no residual blocks, width alone",
        ),
    ),
    Strategy(
        name="fiarse",
        settings={"train.submodel": "entries", "train.aggregation": "entry-mean"},
        summary="the weights of the largest magnitude, as many as the tier's ranks have parameters; saves traffic, "
        "and no MACs without sparse kernels",
        source="FIARSE (Wu et al., NeurIPS 2024); means weighted by examples",
        paper="FIARSE (NeurIPS 2024)",
        code="the authors' release",
        departures=(
            "only weights are masked, biases are kept",
            "means weighted by examples",
        ),
    ),
)

STRATEGIES: dict[str, Strategy] = {row.name: row for row in _ROWS}


def own_strategy(name: str, settings: Mapping[str, Value], summary: str) -> Strategy:
    """Return a row of user code; UserError for what is no setting that rows decide."""
    for key in settings:
        check_name(f"setting of strategy {name!r}", key, decided_by_rows())
    return Strategy(name=name, settings=dict(settings), summary=summary, source="user code")
