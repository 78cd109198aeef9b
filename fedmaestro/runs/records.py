"""What runs write down, as typed records; ``runs.reader`` reads all of them.

Every file says the number of its format. Keys that a record does not know are kept: a file of a later version that is
rewritten loses nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from fedmaestro.config.base import Value

if TYPE_CHECKING:
    from fedmaestro.fleet.selection import History


class Record(BaseModel):
    """A frozen record that is written as JSON; numbers in it are finite or None."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return self.model_dump(mode="json")


class MetricFacts(Record):
    """The metric that tables and plots are about."""

    name: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True
    """Whether values are shares, which people read in percent."""

    def better(self, left: float, right: float) -> bool:
        """Return whether ``left`` is better than ``right``."""
        return left > right if self.higher_is_better else left < right

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best of ``values``; None of none."""
        return (max if self.higher_is_better else min)(values, default=None)

    def worst(self, values: Iterable[float]) -> float | None:
        """Return the worst of ``values``; None of none."""
        return (min if self.higher_is_better else max)(values, default=None)


ACCURACY = MetricFacts()


class Updates(Record):
    """What became of devices that were asked to train; ``sampled = trained + failed + dropped``."""

    sampled: int = 0
    trained: int = 0
    """Whose updates count."""
    failed: int = 0
    dropped: int = 0
    """Too late by the virtual clock, or not needed."""

    def __add__(self, other: "Updates") -> "Updates":
        return Updates(
            sampled=self.sampled + other.sampled,
            trained=self.trained + other.trained,
            failed=self.failed + other.failed,
            dropped=self.dropped + other.dropped,
        )

    @property
    def lost(self) -> int:
        """Those that do not count."""
        return self.failed + self.dropped


class RoundRecord(Record):
    """One line of ``rounds.jsonl``; round 0 is the initial model."""

    round: int
    tiers: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """``{tier: {metric: value, …, "loss": value}}``, largest tier first, the main metric first.

    Empty in rounds without evaluation. A value that is not finite is None.
    """
    metric: MetricFacts | None = None
    """The main metric; in round 0."""
    train_loss: float | None = None
    """Mean over the examples of all devices; None when none trained."""
    devices: int = 0
    failed: int = 0
    failed_by: dict[str, int] = Field(default_factory=dict)
    """Of them, by kind (``rounds.failure.KINDS``)."""
    dropped: int = 0
    attackers: int = 0
    """Of the devices whose updates count (``fleet.attack``)."""
    updates: dict[str, Updates] = Field(default_factory=dict)
    """Of each tier that was sampled."""
    download_bytes: int = 0
    upload_bytes: int = 0
    virtual_seconds: float = 0.0
    epsilon: float | None = None
    """ε of all rounds so far at ``privacy.delta``, with differential privacy: of the models, not of what else is in
    this file."""
    wall_seconds: float = 0.0
    """Since the round before was complete: a round's evaluation overlaps with the training of the next one."""
    device_test: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """``{tier: {"devices", "mean", "std", "worst_decile"}}``: the main metric of the model that serves each tier, on
    the own test examples of the tier's devices; the worst decile is the mean of the worst tenth, rounded up."""
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


class DeviceRecord(Record):
    """One line of ``devices.jsonl``: what single devices reached in a round."""

    round: int
    loss: dict[str, float] = Field(default_factory=dict)
    """Mean training loss of every device that took part, by its number."""
    test: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Every metric, and the loss, of the model that serves its tier on each device's own test examples."""

    @staticmethod
    def of(server_round: int, history: "History", test: Mapping[int, Mapping[str, float]]) -> "DeviceRecord":
        """Return the record of a round; what is not finite is left out."""
        took_part = (history.last_round == server_round).nonzero()[0] if server_round else []
        return DeviceRecord(
            round=server_round,
            loss={str(d): float(history.loss[d]) for d in took_part},
            test={str(d): {k: x for k, x in values.items() if math.isfinite(x)} for d, values in test.items()},
        )


class TierFigures(Record):
    """What a tier's submodel costs a device, under a strategy.

    Ranks, parameters and MACs per example are those of what serves the tier; training and traffic those of what its
    devices train, which is more under an oracle and nothing where they do not take part.
    """

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
    round_seconds: float | None = None
    """Virtual, of a device with a mean number of examples; None in files of earlier versions."""


class TierSummary(TierFigures):
    """A tier in ``summary.json``."""

    final: float | None = None
    """``final_METRIC`` in the file, as ``best`` is ``best_METRIC``."""
    final_round: int | None = None
    """The round that the final value is of: the last one whose evaluation succeeded."""
    best: float | None = None
    updates: Updates = Updates()


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
    split: str = "test"
    """What the values are of: ``test``, or ``validation`` with ``data.validation``."""
    interrupted: bool = False
    """Whether the run can go on: the last round was not reached."""
    tiers: dict[str, TierSummary]
    """Largest first."""
    metric: MetricFacts = ACCURACY
    mean_tier: float | None = None
    """``mean_tier_METRIC`` in the file: mean over tiers of the final values."""
    worst_tier: float | None = None
    """``worst_tier_METRIC`` in the file."""
    rounds: int
    download_bytes: int
    upload_bytes: int
    failed: int
    failed_by: dict[str, int] = Field(default_factory=dict)
    """By kind (``rounds.failure.KINDS``)."""
    updates: Updates = Updates()
    """Of all tiers."""
    epsilon: float | None = None
    """ε of the whole run, with differential privacy."""
    delta: float | None = None
    """Its δ."""
    stopped: str | None = None
    """Why the run ended before its last round, unless it was interrupted."""
    wall_seconds: float
    virtual_seconds: float
    model_sha256: str
    seal: str = ""
    """Hash of all this and of the history (``runs.history.seal_of``): says whether they are as they were written."""

    @model_validator(mode="before")
    @classmethod
    def _by_metric(cls, content: Any) -> Any:
        return _renamed(content, _SUMMARY_KEYS, "tiers", _TIER_KEYS, written=False)

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = _renamed(super().to_dict(), _SUMMARY_KEYS, "tiers", _TIER_KEYS, written=True)
        return written


_SUMMARY_KEYS, _TIER_KEYS = ("mean_tier", "worst_tier"), ("final", "best")


def _renamed(content: Any, own: Sequence[str], below: str, keys: Sequence[str], *, written: bool) -> Any:
    """Return a record's content with the metric's name behind some keys, as files have it, or without.

    Args:
        content: of the record; what is none stays as it is.
        own: keys of the record itself.
        below: key of the records by name in it.
        keys: of those.
        written: whether the names are put there, or taken away.
    """
    if not isinstance(content, Mapping):
        return content
    metric = content.get("metric")
    name = metric.get("name", "accuracy") if isinstance(metric, Mapping) else getattr(metric, "name", "accuracy")

    def rename(mapping: Any, names: Sequence[str]) -> Any:
        if not isinstance(mapping, Mapping):
            return mapping
        pairs = {key: f"{key}_{name}" for key in names}
        pairs = pairs if written else {long: short for short, long in pairs.items()}
        return {pairs.get(key, key): value for key, value in mapping.items()}

    renamed = rename(content, own)
    if isinstance(inner := renamed.get(below), Mapping):
        renamed[below] = {key: rename(value, keys) for key, value in inner.items()}
    return renamed


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
    facts: MetricFacts | None = None
    """What the metric is; None: accuracy or perplexity."""
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
    """The main metric over seeds, in the last round and in the best one."""

    final: Stat = Stat()
    best: Stat = Stat()
    last: Stat | None = None
    """Mean of the last rounds that were evaluated (``Analysis.last``), where more than one was asked for."""

    @property
    def judged(self) -> Stat:
        """What rows are compared by: the mean of the last rounds, which is the final value unless more were asked."""
        return self.final if self.last is None else self.last


class OwnTest(Record):
    """The main metric on devices' own test examples, over seeds, in the last round that tested them."""

    mean: Stat = Stat()
    """Over devices."""
    worst_decile: Stat = Stat()
    """Mean of the worst tenth of them, rounded up."""


class Reached(Record):
    """When a run first reached a target, and what had been spent until then."""

    round: int
    bytes: int
    """Received and sent by all devices."""
    virtual_seconds: float


class Series(Record):
    """The evaluated rounds of one seed."""

    seed: int
    round: list[int]
    values: dict[str, list[float | None]] = Field(validation_alias=AliasChoices("values", "accuracy"))
    """Of the main metric by tier, one for each round."""
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
    over_devices: Scores = Scores()
    """Mean over devices: tiers weighted by how many they have."""
    own_test: dict[str, OwnTest] = Field(default_factory=dict)
    """Of each tier's devices, where they have test examples of their own."""
    own_test_mean: Stat | None = None
    """Over all of them."""
    reached: list[Reached | None] = Field(default_factory=list)
    """The target (``Analysis.target``) by the mean over tiers: one for each seed, None where it never was."""
    monotone_seeds: int
    download_bytes: float | None
    upload_bytes: float | None
    virtual_seconds: float | None
    failed: float | None
    epsilon: float | None = None
    """Of differential privacy, mean over seeds; None without."""
    updates: dict[str, Updates] = Field(default_factory=dict)
    """Of each tier, all seeds together."""
    failed_by: dict[str, int] = Field(default_factory=dict)
    """By kind (``rounds.failure.KINDS``), all seeds together."""
    series: list[Series]


class Analysis(Record):
    """How the rows of a comparison are judged; values are in the metric's own unit: shares are fractions."""

    baseline: str | None = None
    """The row that all others are compared with; None: the first."""
    margin: float | None = None
    """Differences below it count as none; None: half a point for shares, unknown otherwise."""
    last: int = 1
    """Evaluated rounds at the end of a run whose mean is judged."""
    target: float | None = None


AS_IT_IS = Analysis()


class TuningCost(Record):
    """What trials have cost, all their runs together."""

    runs: int = 0
    """Those that were run to their end."""
    updates: int = 0
    """Of devices, that count: how often a device has trained."""
    download_bytes: int = 0
    upload_bytes: int = 0
    virtual_seconds: float = 0.0
    wall_seconds: float = 0.0

    def __add__(self, other: "TuningCost") -> "TuningCost":
        return TuningCost(**{key: getattr(self, key) + getattr(other, key) for key in TuningCost.model_fields})


class Trial(Record):
    """Settings that a row was tried with, once with every tuning seed."""

    number: int
    """From 1 on."""
    settings: dict[str, Value]
    values: list[float] = Field(default_factory=list)
    """Of the runs that succeeded: the main metric on the validation split in the last round, mean over tiers."""
    value: float | None = None
    """Their mean; None: a run failed, so the trial is worse than all that did not."""
    failed: str = ""
    """Why."""
    cost: TuningCost = TuningCost()


class TunedRow(Record):
    """One row of a tuning."""

    name: str
    strategy: str
    set: dict[str, Value] = Field(default_factory=dict)
    """What the row changes anyway."""
    searched: dict[str, str]
    """What was declared for each setting, in words."""
    chosen: dict[str, Value] = Field(default_factory=dict)
    """The settings of the best trial, of equal ones the first; none where all failed."""
    trial: int | None = None
    """Its number."""
    value: float | None = None
    """Its value."""
    edges: dict[str, str] = Field(default_factory=dict)
    """Chosen settings that lie at an end of what was declared, and at which: a better value may lie beyond."""
    cost: TuningCost = TuningCost()
    """Of all trials."""
    trials: list[Trial] = Field(default_factory=list)


class Tuned(Record):
    """``tuned.toml``: what a tuning has searched, at what cost, and what it has chosen."""

    format: int = 1
    experiment: str
    complete: bool
    """Whether every row has had all its trials."""
    seeds: list[int]
    """Of the trials; no comparison may use them."""
    validation: int | float
    """``data.validation`` of the trials."""
    sampler: str
    trials: int
    """Of every row."""
    metric: MetricFacts
    rows: list[TunedRow]
    versions: dict[str, str]
    """Of what the trials ran with."""
    settings: dict[str, Value]
    """What all trials share, by dotted keys."""

    @property
    def cost(self) -> TuningCost:
        """Of all rows."""
        return sum((row.cost for row in self.rows), TuningCost())


class Results(Record):
    """``results.json`` of a comparison: everything in its tables and plots."""

    format: int = 1
    experiment: str
    complete: bool
    seeds: list[int]
    tiers: list[str]
    """Largest first."""
    metric: MetricFacts = ACCURACY
    matched_macs: bool
    protocol: dict[str, Value]
    """Settings that all cells share."""
    analysis: Analysis = Analysis()
    tuned: Tuned | None = None
    """How settings of the rows were chosen; None: nobody says."""
    strategies: list[StrategyResults]
