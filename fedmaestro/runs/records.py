"""What runs write down, as typed records; ``runs.reader`` reads all of them.

Every file says the number of its format. Keys that a record does not know are kept: a file of a later version that is
rewritten loses nothing.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fedmaestro.config.base import Value


class Record(BaseModel):
    """A frozen record that is written as JSON; numbers in it are finite or None."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return self.model_dump(mode="json")


class RoundRecord(Record):
    """One line of ``rounds.jsonl``; round 0 is the initial model."""

    round: int
    tiers: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """``{tier: {"accuracy", "loss"}}``, largest tier first; empty in rounds without evaluation.

    A loss that is not finite is None.
    """
    train_loss: float | None = None
    """Mean over the examples of all devices; None when none trained."""
    devices: int = 0
    failed: int = 0
    dropped: int = 0
    download_bytes: int = 0
    upload_bytes: int = 0
    virtual_seconds: float = 0.0
    wall_seconds: float = 0.0
    ranks: dict[str, dict[str, int]] = Field(default_factory=dict)
    """``{tier: {layer: rank}}`` of what serves each tier from this round's evaluation on.

    Filled where shrinking or learned ranks are on: in round 0 and after each time that ranks were derived anew.
    """
    full_ranks: dict[str, int] = Field(default_factory=dict)
    """``{layer: rank}`` of the whole model, in the same rounds."""
    tail_energy: float | None = None
    """Share of the global model's energy beyond the smallest tier's ranks (``rounds.spectrum.tail_energy``).

    In rounds with evaluation, where tiers are prefixes of one LoD model.
    """
    factor_bias: float | None = None
    """``rounds.spectrum.factor_bias``, with ``train.record-bias``, for rules that average factors."""


class TierFigures(Record):
    """What a tier's submodel costs a device, under a strategy."""

    devices: int
    ranks: dict[str, int | float]
    """``{layer: rank}``, or ``{"width": share}``."""
    params: int
    macs_per_example: int
    train_macs_per_example: int
    """Of a local step, all passes of the objective together."""
    train_memory_bytes: int
    download_bytes: int
    upload_bytes: int


class TierSummary(TierFigures):
    """A tier in ``summary.json``."""

    final_accuracy: float | None = None
    final_round: int | None = None
    """The round that the final accuracy is of: the last one whose evaluation succeeded."""
    best_accuracy: float | None = None


class Summary(Record):
    """``summary.json`` of a federation."""

    format: int = 1
    strategy: str
    objective: str
    settings: dict[str, Value] = Field(default_factory=dict)
    """Every switch that a strategy has, as this run had it."""
    seed: int
    dataset: str
    model: str
    interrupted: bool = False
    """Whether the run can go on: the last round was not reached."""
    tiers: dict[str, TierSummary]
    """Largest first."""
    mean_tier_accuracy: float | None = None
    worst_tier_accuracy: float | None = None
    rounds: int
    download_bytes: int
    upload_bytes: int
    failed: int
    wall_seconds: float
    virtual_seconds: float
    model_sha256: str


class EpochRecord(Record):
    """One line of ``epochs.jsonl``; epoch 0 is the initial model."""

    epoch: int
    train_loss: float | None
    """Mean cross-entropy of the steps (with a full pass, of both passes)."""
    loss: float
    value: float
    """The task's metric on the validation split at the current full ranks."""
    ranks: dict[str, int]
    params: int
    macs_per_example: int
    """Of the model as it would be deployed (dense where that is smaller)."""
    seconds: float


class TrainingSummary(Record):
    """``summary.json`` of a training on one machine."""

    format: int = 1
    task: str
    model: str
    form: str
    seed: int
    metric: str
    split: str
    """What the values are of: ``validation``, or ``test`` where nothing was held out."""
    interrupted: bool = False
    epochs: int
    final_value: float
    final_loss: float
    best_value: float
    params: int
    macs_per_example: int
    ranks: dict[str, int]
    dense_params: int
    dense_macs_per_example: int
    wall_seconds: float
    model_sha256: str


class CostPoint(Record):
    """A model on an accuracy–cost curve."""

    params: int
    macs: int
    """Per example, as deployed."""
    latency_ms: float | None
    """Of a forward pass; None: not measured."""
    value: float
    """The task's metric on the test set."""
    loss: float
    validation_value: float | None = None
    budget: float = 1.0
    """Part of the dense model's MACs."""
    ranks: dict[str, int] = Field(default_factory=dict)
    calibration_loss: float | None = None


class CostCurve(Record):
    """``curve.json``: models for budgets, largest first."""

    format: int = 1
    metric: str
    device: str
    seed: int
    dense_params: int
    dense_macs: int
    series: dict[str, list[CostPoint]]
    dense: CostPoint | None
    """The dense model itself, where one was trained."""


class Stat(Record):
    """A figure over seeds."""

    mean: float | None = None
    """None where a seed lacks it."""
    std: float | None = None
    """Sample standard deviation; None for fewer than two seeds."""
    values: list[float | None] = Field(default_factory=list)
    """Of every seed."""


class Scores(Record):
    """Accuracy over seeds, in the last round and in the best one."""

    final: Stat = Stat()
    best: Stat = Stat()


class Series(Record):
    """The evaluated rounds of one seed."""

    seed: int
    round: list[int]
    accuracy: dict[str, list[float | None]]
    """By tier, one for each round."""
    bytes: list[int]
    """Received and sent by all devices until then."""
    virtual_seconds: list[float]
    """Until then."""
    tail_energy: list[float | None]
    factor_bias: list[float | None]


class StrategyResults(Record):
    """One row of a comparison."""

    name: str
    summary: str
    source: str
    form: str
    submodel: str
    objective: str
    aggregation: str
    server: str
    seeds: list[int]
    """The finished ones."""
    budgets: dict[str, TierFigures]
    tiers: dict[str, Scores]
    mean: Scores
    """Over tiers."""
    worst: Scores
    """Tier."""
    monotone_seeds: int
    download_bytes: float | None
    upload_bytes: float | None
    virtual_seconds: float | None
    failed: float | None
    series: list[Series]


class Results(Record):
    """``results.json`` of a comparison: everything in its tables and plots."""

    format: int = 1
    experiment: str
    complete: bool
    seeds: list[int]
    tiers: list[str]
    """Largest first."""
    matched_macs: bool
    protocol: dict[str, Value]
    """Settings that all cells share."""
    strategies: list[StrategyResults]
