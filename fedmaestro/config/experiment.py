"""The experiment: one schema for the command line, the Python function and Flower's run config.

TOML has nested tables (``[train] rounds = 60``), ``--set`` and Flower have dotted keys (``train.rounds``). Flower's run
config knows neither lists nor null, hence the empty strings and zeros that mean "not set".
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from fedmaestro.errors import UserError, check_name

Value = bool | int | float | str

Positive = Annotated[int, Field(ge=1)]


def _zero_or_more_or_unset(value: float) -> float:
    if -1 < value < 0:
        raise PydanticCustomError("per_strategy", "input should be 0 or more, or -1 for the strategy's")
    return value


PerStrategy = Annotated[float, Field(ge=-1), AfterValidator(_zero_or_more_or_unset)]
"""A switch that each strategy sets; -1 leaves it so."""

Schema = TypeVar("Schema", bound=BaseModel)


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Table(BaseModel):
    """Frozen, strict about names, kebab-case in TOML."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=_kebab, validate_by_name=False, allow_inf_nan=False
    )


class DataConfig(Table):
    """Which examples, and how they are spread over the devices."""

    name: str = Field("digits", description="dataset (`fedmaestro list datasets`)")
    dir: str = Field("", description="folder of local parquet files; empty: $FEDMAESTRO_DATA_DIR, or the hub")
    devices: Positive = Field(20, description="number of simulated devices")
    partition: str = Field("dirichlet", description="iid, dirichlet or pathological")
    alpha: float = Field(1.0, gt=0, description="Dirichlet concentration: smaller is more skewed")
    classes_per_device: Positive = Field(2, description="for partition = pathological")
    min_examples: Positive = Field(1, description="fewest examples of a device, for partition = dirichlet")


class ModelConfig(Table):
    """The shared network."""

    name: str = Field("mlp", description="model (`fedmaestro list models`)")
    keep_dense: str = Field(
        "first-conv head",
        description="layers that are not factorised: first-conv, head, none or names, separated by spaces",
    )
    norm: Literal["default", "group", "static"] = Field(
        "default",
        description="group: GroupNorm; static: HeteroFL's BatchNorm without running averages; default: the strategy's",
    )
    scaler: Literal["default", "on", "off"] = Field(
        "default",
        description="HeteroFL's scaler: narrow models divide activations by their width; default: the strategy's",
    )


class FleetConfig(Table):
    """The devices' tiers and the simulated time."""

    preset: str = Field("five-tiers", description="fleet (`fedmaestro list fleets`)")
    file: str = Field("", description="TOML file with tiers of your own; overrides the preset")
    over_commit: float = Field(
        1.0, ge=1.0, le=10.0, description="sample this many times more devices and take the first to finish"
    )
    deadline_seconds: float = Field(0.0, ge=0.0, description="virtual seconds of a round at most; 0: none")
    ranks: Literal["uniform", "learned"] = Field(
        "uniform",
        description="uniform: one rank fraction per tier; learned: re-derived from the model under the same budgets",
    )
    match_macs: bool = Field(
        False, description="give rank and width submodels of a tier the same MACs (within 3 %), to compare them"
    )


class TrainConfig(Table):
    """Rounds, strategy and local training."""

    rounds: Positive = Field(60, description="communication rounds")
    strategy: str = Field("fedmaestro", description="strategy (`fedmaestro list strategies`)")
    objective: str = Field(
        "default", description="local objective (`fedmaestro list objectives`); default: the strategy's own"
    )
    submodel: str = Field(
        "default", description="submodel rule (`fedmaestro list submodels`); default: the strategy's own"
    )
    aggregation: str = Field(
        "default", description="aggregation rule (`fedmaestro list aggregations`); default: the strategy's own"
    )
    server_optimizer: str = Field("default", description="none, momentum, adam or yogi; default: the strategy's own")
    server_lr: float = Field(
        0.0, ge=0, description="learning rate of the server optimiser; 0: 1 for momentum, 0.03 for adam and yogi"
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="β₁ of the server optimiser")
    server_damping: PerStrategy = Field(
        -1.0, description="devices at which a block takes half a server step; 0: whole steps; -1: the strategy's"
    )
    devices_per_round: Positive = Field(10, description="devices whose work a round waits for")
    cohort_size: Positive = Field(5, description="devices of one tier per message; 1 is classic Flower")
    local_epochs: Positive = Field(2, description="passes of a device over its examples in a round")
    batch_size: Positive = Field(16, description="examples per local SGD step")
    lr: float = Field(0.2, gt=0, description="learning rate of the first round")
    lr_final_factor: float = Field(
        0.05, gt=0, le=1, description="cosine decay over the rounds to this share of lr; 1: constant"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="local SGD momentum")
    weight_decay: float = Field(0.0, ge=0, description="local SGD weight decay")
    clip_norm: float = Field(5.0, ge=0, description="largest norm of a local step's gradient; 0: no clipping")
    group_lasso: float = Field(
        0.0,
        ge=0,
        description="weight of the hierarchical group lasso in the local loss; 0: none (not for dense models)",
    )
    shrink_threshold: float = Field(
        0.0, ge=0, description="cut columns of the global model whose importance is below this; 0: never"
    )
    shrink_every: Positive = Field(
        10, description="rounds between cuts, and between re-derivations of learned ranks (none after the last round)"
    )
    shrink_min_updates: int = Field(
        20, ge=0, description="device updates that must have trained a column before it may be cut"
    )
    reorder_every: int = Field(
        -1,
        ge=-1,
        description="rounds between re-orderings of all factor columns by SVD, after the server optimiser; 0: never; "
        "-1: the strategy's",
    )
    tail_decay: PerStrategy = Field(
        -1.0,
        le=1,
        description="share of a factor column that fades in a round in which no device holds it, less where some do; "
        "0: none; -1: the strategy's",
    )
    tail_start: PerStrategy = Field(
        -1.0,
        description="factor columns that fewer than this many devices of a round hold, in expectation, start with "
        "smaller singular values; 0: none; -1: the strategy's",
    )
    logit_adjustment: PerStrategy = Field(
        -1.0,
        description="devices add this times the log frequency of their classes to the logits in training; 0: plain "
        "cross-entropy; -1: the strategy's",
    )
    record_bias: bool = Field(
        False, description="estimate in every round what averaging factors instead of products does (`factor_bias`)"
    )
    reply_timeout_seconds: float = Field(
        0.0, ge=0, description="wall seconds to wait for hosts; devices of late replies count as failed; 0: no limit"
    )
    evaluate_every: Positive = Field(5, description="rounds between evaluations of every tier (the last one is)")


class ExperimentConfig(Table):
    """One whole run. Frozen; its resolved form is written to ``config.toml`` in the run folder."""

    seed: int = Field(0, ge=0, lt=2**32, description="the one seed: same seed and cohort size, same result")
    out: str = Field("", description="run folder; empty: a new one under runs/")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    fleet: FleetConfig = FleetConfig()
    train: TrainConfig = TrainConfig()

    def flat(self) -> dict[str, Value]:
        """Return ``{"seed": 0, "data.name": "digits", …}``, Flower's form of the run config."""
        return flatten(self.model_dump(by_alias=True))

    def to_toml(self) -> str:
        """Return the experiment's TOML with every setting."""
        return tomli_w.dumps(self.model_dump(by_alias=True))

    def to_json(self) -> str:
        """Return the compact form that messages to hosts carry."""
        return json.dumps(self.flat(), sort_keys=True)


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Turn nested tables into dotted keys."""
    flat: dict[str, Value] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def from_flat(flat: Mapping[str, Any], source: str = "") -> ExperimentConfig:
    """Validate the dotted keys of an experiment; see ``validated``."""
    return validated(ExperimentConfig, flat, source)


def validated(schema: type[Schema], flat: Mapping[str, Any], source: str = "") -> Schema:
    """Validate dotted keys.

    Raises:
        UserError: the first unknown key (with the nearest valid one) or value out of bounds, in one line.
    """
    known = flatten(schema().model_dump(by_alias=True))
    where = f" in {source}" if source else ""
    for key in flat:
        check_name("setting", key, known, where)
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, last = key.split(".")
        table = nested
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    try:
        return schema.model_validate(nested, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"setting {key} = {first['input']!r}{where}: {first['msg'].lower()}") from None


def read_flat(path: str | Path) -> dict[str, Value]:
    """Read a TOML file as dotted keys."""
    try:
        return flatten(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the experiment {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Read an experiment's TOML (None: all defaults, the demo) and lay ``overrides`` (dotted keys) over it."""
    return load(ExperimentConfig, path, overrides)


def load(schema: type[Schema], path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Schema:
    """Read a TOML file (None: all defaults) of a schema and lay ``overrides`` (dotted keys) over it."""
    flat = {} if path is None else read_flat(path)
    checked = validated(schema, flat, str(path)) if flat else schema()
    return validated(schema, {**flatten(checked.model_dump(by_alias=True)), **(overrides or {})}, "the overrides")


def parse_assignment(text: str) -> tuple[str, Value]:
    """Parse ``train.rounds=5`` of ``--set``: the value is TOML, or else a plain string."""
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set {text!r}: write KEY=VALUE, for example train.rounds=5")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if isinstance(parsed, Value):
        return key.strip(), parsed
    raise UserError(f"--set {text!r}: the value must be a string, a number or a boolean")


def describe_settings(schema: type[BaseModel] = ExperimentConfig) -> list[tuple[str, Value, str]]:
    """Return (dotted key, default, description) of every setting, for the documentation and ``--help``."""
    rows: list[tuple[str, Value, str]] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            key = prefix + _kebab(name)
            if isinstance(info.default, BaseModel):
                walk(type(info.default), f"{key}.")
            else:
                rows.append((key, cast(Value, info.default), info.description or ""))

    walk(schema, "")
    return rows
