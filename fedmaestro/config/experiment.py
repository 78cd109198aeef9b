"""The experiment: one schema for the command line, the Python function and Flower's run config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedmaestro.config.base import (
    FilesSetting,
    HeldOut,
    NumbersSetting,
    PathSetting,
    Positive,
    Settings,
    Table,
    Unset,
    UseSetting,
    describe,
    read,
)
from fedmaestro.errors import UserError

BY_STRATEGY = Unset("default")
"""Unset: what the strategy's row says (``strategies.rows``)."""

BY_DATA = Unset("default")
"""Unset: what follows from the data."""

DEVICES = 20
"""Of a federation that says nothing of their number."""

BY_ATTACK = Unset("default")
"""Unset: what the attack's row says (``fleet.attacks``)."""

AUTO = Unset("auto")
"""Unset: decided while it runs."""

NONE = Unset("none")
"""Unset: there is no such limit."""

NESTED = "nested"
"""Needs tiers that are parts of one model all of whose tensors their devices train."""

PREFIXES = "prefixes"
"""Needs tiers that are rank prefixes of one model whose factors all devices train."""


class DataConfig(Table):
    """Which examples, and how they are spread over the devices."""

    name: str = Field("digits", description="dataset (`fedmaestro list datasets`)")
    dir: PathSetting = Field(None, description="folder of local parquet files; empty: $FEDMAESTRO_DATA_DIR, or the hub")
    file: FilesSetting = Field(
        "",
        description="for name = csv, parquet, image-folder or hub: what to read (relative to the experiment's file); "
        "two words are training and test examples",
    )
    columns: str = Field(
        "", description="for these: what is what, for example target=label inputs=a,b groups=user standardize=true"
    )
    task: Annotated[str | None, BY_DATA] = Field(
        None, description="what is learnt (`fedmaestro list tasks`); default: what the dataset is for"
    )
    metrics: Annotated[str | None, BY_DATA] = Field(
        None,
        description="what is measured (`fedmaestro list metrics`), separated by spaces, the main one first; default: "
        "the task's own",
    )
    devices: Annotated[Annotated[int, Field(ge=1, le=10**7)] | None, BY_DATA] = Field(
        None, description="number of simulated devices; default: 20, for partition = natural all users of the data"
    )
    partition: str = Field("dirichlet", description="how examples are spread (`fedmaestro list partitions`)")
    alpha: float = Field(1.0, gt=0, description="Dirichlet concentration: smaller is more skewed")
    self_balancing: bool = Field(
        False,
        description="for partition = dirichlet: a device with more than N / devices examples gets none of the classes "
        "that follow (flwr-datasets' self_balancing)",
    )
    classes_per_device: Positive = Field(2, description="for partition = pathological")
    min_examples: int = Field(1, ge=0, description="fewest examples of a device, for partition = dirichlet or quantity")
    share_examples: int = Field(
        0,
        ge=0,
        description="examples that each device draws of its own from all training examples, for fleets larger than the "
        "data; 0: an example belongs to one device",
    )
    device_test: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="part of its examples that every device keeps to test the models on; 0: the test examples of its "
        "users, where the data name users",
    )
    validation: HeldOut = Field(
        0,
        description="training examples held out before they are spread, on which the tiers are evaluated instead of "
        "the test set: so many, or below 1 this part of all; 0: the test set is",
    )
    augment: str = Field("none", description="random changes of training examples (`fedmaestro list augmentations`)")
    normalize: Literal["dataset", "unit"] = Field(
        "dataset",
        description="pixels of images: dataset: minus the training images' mean, over their standard deviation; unit: "
        "over 255 only",
    )

    @model_validator(mode="before")
    @classmethod
    def _twenty(cls, tables: Any) -> Any:
        """Give the number of devices a value wherever the data do not say it."""
        if not isinstance(tables, Mapping) or tables.get("partition") == "natural":
            return tables
        return {**tables, "devices": DEVICES} if tables.get("devices") in (None, BY_DATA.word) else tables


class ModelConfig(Table):
    """The shared network."""

    name: str = Field("mlp", description="model (`fedmaestro list models`)")
    keep_dense: str = Field(
        "first-conv head",
        description="layers that are not factorised: first-conv, head, none or names, separated by spaces",
    )
    norm: Annotated[Literal["group", "static"] | None, BY_STRATEGY] = Field(
        None,
        description="group: GroupNorm; static: HeteroFL's BatchNorm without running averages; default: the strategy's",
    )
    scaler: Annotated[Literal["on", "off"] | None, BY_STRATEGY] = Field(
        None,
        description="HeteroFL's scaler: narrow models divide activations by their width; default: the strategy's",
    )
    width: float = Field(
        1.0, gt=0, le=1, description="part of the model's channels that the whole network of the experiment has"
    )


class FleetConfig(Table):
    """The devices' tiers and the simulated time."""

    preset: str = Field("five-tiers", description="fleet (`fedmaestro list fleets`)")
    file: PathSetting = Field(
        None,
        description="TOML file with tiers of your own (relative to the experiment's file, or to where you are); it "
        "overrides the preset",
    )
    assignment: Literal["fixed", "dynamic"] = Field(
        "fixed",
        description="fixed: a device's tier is its own; dynamic: every device draws one in each round, by the tiers' "
        "shares (HeteroFL)",
    )
    over_commit: float = Field(
        1.0, ge=1.0, le=10.0, description="sample this many times more devices and take the first to finish"
    )
    deadline_seconds: Annotated[Annotated[float, Field(gt=0)] | None, NONE] = Field(
        None, description="virtual seconds of a round at most; none: no limit"
    )
    attack: str = Field("none", description="what attackers do (`fedmaestro list attacks`), or none")
    attackers: float = Field(
        0.3, gt=0, le=1, description="part of the devices of each tier that attack, for attack other than none"
    )
    attack_tiers: str = Field("all", description="names of the tiers that have attackers, separated by commas, or all")
    attack_strength: Annotated[Annotated[float, Field(ge=0)] | None, BY_ATTACK] = Field(
        None, description="how strong the attack is; default: the attack's own"
    )
    match_macs: bool = Field(
        False, description="give rank and width submodels of a tier the same MACs (within 3 %), to compare them"
    )
    match_by: Literal["macs", "train-macs", "bytes", "time"] = Field(
        "macs",
        description="what match-macs makes equal: macs; train-macs: those of training, all passes of the objective; "
        "bytes: of a round; time: virtual seconds of a round. But for macs, each tier gets the largest size that "
        "spends no more than its ranks would with one pass",
    )


class TrainConfig(Table):
    """Rounds, strategy and local training."""

    rounds: Positive = Field(60, description="communication rounds")
    strategy: str = Field("fedmaestro", description="strategy (`fedmaestro list strategies`)")
    objective: Annotated[str | None, BY_STRATEGY] = Field(
        None, description="local objective (`fedmaestro list objectives`); default: the strategy's own"
    )
    submodel: Annotated[str | None, BY_STRATEGY] = Field(
        None, description="submodel rule (`fedmaestro list submodels`); default: the strategy's own"
    )
    rank_power: float = Field(
        1.0,
        ge=0,
        le=4,
        description="for submodel = rank-and-width: at width w, a layer has the part w to this power of its ranks; 0: "
        "channels alone are cut",
    )
    aggregation: Annotated[str | None, BY_STRATEGY] = Field(
        None, description="aggregation rule (`fedmaestro list aggregations`); default: the strategy's own"
    )
    freeze: Annotated[Literal["none", "v", "alternating"] | None, BY_STRATEGY] = Field(
        None,
        description="factor that devices do not train: v always; alternating: V in odd rounds, U in even ones; "
        "default: the strategy's",
    )
    per_tier: Annotated[str | None, BY_STRATEGY] = Field(
        None,
        description="tensors of which each tier has its own: none, or bias, head, norm and step, separated by "
        "spaces; "
        "default: the strategy's",
    )
    logit_adjustment: Annotated[Annotated[float, Field(ge=0)] | None, BY_STRATEGY] = Field(
        None,
        description="devices add this times the log frequency of their classes to the logits in training; 0: plain "
        "cross-entropy; default: the strategy's",
    )
    devices_per_round: Positive = Field(10, description="devices whose work a round waits for")
    selection: str = Field("uniform", description="which devices are asked (`fedmaestro list selections`)")
    cohort_size: Annotated[Positive | None, AUTO] = Field(
        None,
        description="devices of one tier per message at most; 1 is classic Flower; auto: as the hosts are busy; the "
        "result is the same",
    )
    stack: Annotated[Positive | None, AUTO] = Field(
        1,
        description="devices of one tier that train as one stacked model, for accelerators and small models; 1: one "
        "after the other; auto: measured once at the start of the run",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="what local passes compute in; bfloat16: PyTorch's autocast, for accelerators"
    )
    local_epochs: int = Field(2, ge=1, le=10**6, description="passes of a device over its examples in a round")
    batch_size: Positive = Field(16, description="examples per local SGD step")
    optimizer: str = Field("sgd", description="local optimiser (`fedmaestro list optimizers`), fresh in every round")
    lr: float = Field(0.2, gt=0, description="learning rate of the first round")
    schedule: str = Field("cosine", description="learning rate over the rounds (`fedmaestro list schedules`)")
    lr_final_factor: float = Field(
        0.05, gt=0, le=1, description="part of lr that the cosine or exponential schedule ends with; 1: constant"
    )
    lr_milestones: NumbersSetting = Field(
        "",
        description="for schedule = steps: rounds after which lr is multiplied by lr-gamma, separated by spaces; "
        "empty: half and three quarters of the rounds",
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="for schedule = steps: factor of lr at each milestone")
    warmup_rounds: int = Field(0, ge=0, description="rounds in which the learning rate grows linearly at first")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the local optimiser sgd")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the local optimiser")
    clip_norm: float = Field(5.0, ge=0, description="largest norm of a local step's gradient; 0: no clipping")
    max_update_norm: float = Field(
        100.0,
        ge=0,
        description="largest norm of a device's update, in medians of the norms of updates so far (`rounds/norms.py`): "
        "a longer one is rejected as broken; 0: no bound",
    )
    proximal: Annotated[Annotated[float, Field(ge=0)] | None, BY_STRATEGY] = Field(
        None,
        description="FedProx's μ: devices add μ/2 times the squared distance from what they were sent to the loss; 0: "
        "nothing; default: the strategy's",
    )
    correction: Annotated[Literal["none", "scaffold"] | None, BY_STRATEGY] = Field(
        None,
        description="scaffold: devices correct their steps by control variates (plain sgd only); default: the "
        "strategy's",
    )
    group_lasso: float = Field(
        0.0,
        ge=0,
        description="weight of the hierarchical group lasso in the local loss; 0: none (not for dense models)",
        json_schema_extra={"needs": PREFIXES},
    )
    record_bias: bool = Field(
        False, description="estimate in every round what averaging factors instead of products does (`factor_bias`)"
    )
    reply_timeout_seconds: Annotated[Annotated[float, Field(gt=0)] | None, NONE] = Field(
        None, description="wall seconds to wait for hosts; devices of late replies count as failed; none: no limit"
    )
    assumed_attackers: float = Field(
        0.3,
        ge=0,
        lt=0.5,
        description="part of the devices that robust aggregations (trimmed-mean, multi-krum) take for attackers",
    )
    max_idle_rounds: int = Field(
        10, ge=0, description="the run stops after so many rounds in a row without an update that counts; 0: never"
    )
    evaluate_every: Positive = Field(5, description="rounds between evaluations of every tier (the last one is)")


class ServerConfig(Table):
    """What the server does with the aggregated model: the steps of the strategy's chain."""

    steps: Annotated[str | None, BY_STRATEGY] = Field(
        None,
        description="names of the steps (`fedmaestro list server-steps`), in order, separated by spaces; default: the "
        "strategy's",
    )
    optimizer: Annotated[str | None, BY_STRATEGY] = Field(
        None, description="server optimiser (`fedmaestro list server-optimizers`); default: the strategy's own"
    )
    lr: Annotated[Annotated[float, Field(gt=0)] | None, BY_STRATEGY] = Field(
        None, description="learning rate of the server optimiser; default: the strategy's, or the optimiser's own"
    )
    momentum: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, BY_STRATEGY] = Field(
        None, description="β₁ of the server optimiser; default: the strategy's, or 0.9"
    )
    damping: Annotated[Annotated[float, Field(ge=0)] | None, BY_STRATEGY] = Field(
        None, description="devices at which a block takes half a server step; 0: whole steps; default: the strategy's"
    )
    space: Annotated[Literal["factors", "product"] | None, BY_STRATEGY] = Field(
        None,
        description="what the server optimiser steps in: factors, each by itself; product: products of factor pairs, "
        "which keep their meaning where columns are re-ordered; default: the strategy's",
    )
    tail_decay: Annotated[Annotated[float, Field(ge=0, le=1)] | None, BY_STRATEGY] = Field(
        None,
        description="share of a factor column that fades in a round in which no device holds it, less where some do; "
        "0: none; default: the strategy's",
        json_schema_extra={"needs": PREFIXES},
    )
    reorder_every: Annotated[Positive | Literal["never"] | None, BY_STRATEGY] = Field(
        None,
        description="rounds between re-orderings of all factor columns by SVD, after the server optimiser, or never; "
        "default: the strategy's",
    )
    tail_start: Annotated[Annotated[float, Field(ge=0)] | None, BY_STRATEGY] = Field(
        None,
        description="factor columns and input channels that fewer than this many devices of a round hold, in "
        "expectation, start smaller; 0: none; default: the strategy's",
        json_schema_extra={"needs": NESTED},
    )


class RanksConfig(Table):
    """How ranks change during a run."""

    rule: Literal["uniform", "learned"] = Field(
        "uniform",
        description="uniform: one rank fraction per tier; learned: re-derived from the model under the same budgets",
        json_schema_extra={"needs": PREFIXES},
    )
    shrink_threshold: float = Field(
        0.0,
        ge=0,
        description="cut columns of the global model whose importance is below this; 0: never",
        json_schema_extra={"needs": PREFIXES},
    )
    shrink_every: Positive = Field(
        10, description="rounds between cuts, and between re-derivations of learned ranks (none after the last round)"
    )
    shrink_min_updates: int = Field(
        20, ge=0, description="device updates that must have trained a column before it may be cut"
    )


class PrivacyConfig(Table):
    """Differential privacy of devices (`rounds/privacy.py`)."""

    noise_multiplier: float = Field(
        0.0, ge=0, description="Gaussian noise on the sum of a round's updates, in clip norms; 0: no privacy"
    )
    clip_norm: float = Field(1.0, gt=0, description="length that a device's whole update is clipped to")
    delta: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, BY_DATA] = Field(
        None, description="δ of the (ε, δ) that is reported; default: 0.1 / devices"
    )


class ExperimentConfig(Settings):
    """One whole run. Frozen; its resolved form is written to ``config.toml`` in the run folder."""

    renamed: ClassVar[Mapping[str, str]] = {
        **{f"train.server-{name}": f"server.{name}" for name in ("optimizer", "lr", "momentum", "damping")},
        **{f"train.{name}": f"server.{name}" for name in ("tail-decay", "tail-start", "reorder-every")},
        **{f"train.shrink-{name}": f"ranks.shrink-{name}" for name in ("threshold", "every", "min-updates")},
        "fleet.ranks": "ranks.rule",
    }

    seed: int = Field(0, ge=0, lt=2**32, description="the one seed: same seed, same result")
    out: PathSetting = Field(None, description="run folder; empty: a new one under runs/")
    use: UseSetting = Field(
        "",
        description="files (relative to the experiment's) or modules of your own code, separated by spaces; they add "
        "rows to the tables (`fedmaestro.extend`)",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    fleet: FleetConfig = FleetConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    ranks: RanksConfig = RanksConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse changes of ranks that come too late, and cohorts that are smaller than a stack."""
        ranks, train = self.ranks, self.train
        if train.cohort_size is not None and train.stack != 1 and train.cohort_size < (train.stack or 0):
            raise UserError(
                f"train.cohort-size={train.cohort_size} is below train.stack={train.stack}: devices of a stack are in "
                "one message: raise train.cohort-size, leave it out, or lower train.stack"
            )
        learned = {"ranks.rule": ranks.rule} if ranks.rule == "learned" else {}
        for key, value in {**learned, "ranks.shrink-threshold": ranks.shrink_threshold}.items():
            if value and ranks.shrink_every >= self.train.rounds:
                raise UserError(
                    f"{key}={value} has no effect: ranks.shrink-every={ranks.shrink_every} is not below "
                    f"train.rounds={self.train.rounds}: lower it, or train for more rounds"
                )
        return self


def decided_by_rows() -> tuple[str, ...]:
    """Return the settings that each strategy has a value of its own for, by their dotted keys."""
    settings = [setting.key for setting in describe(ExperimentConfig) if setting.default == BY_STRATEGY.word]
    return tuple(key for key in settings if not key.startswith("data."))


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Read an experiment's TOML (None: all defaults, the demo) and lay ``overrides`` (dotted keys) over it."""
    return read(ExperimentConfig, path, overrides)
