"""Metrics that add up over parts of a test set: sums of examples now, the figure at the end.

A metric is two pure functions. ``update`` maps what a model put out for some examples, and their targets, to named
sums; sums of disjoint parts are added up, wherever the parts were scored; ``compute`` maps the total to the figure.

Shapes: ``n`` targets that count (padding is left out), ``K`` classes or size of the vocabulary, ``D`` values of a
regression. Outputs are ``(n, K)`` with targets ``(n,)``, or both are ``(n, D)``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmaestro.errors import UserError, check_name

if TYPE_CHECKING:
    from fedmaestro.tasks.goal import Goal

Sums = Mapping[str, Tensor]
"""Named sums of any shapes, float64. ``compute`` is also given ``loss`` (the sum) and ``examples`` (how many)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of ``METRICS``."""

    name: str
    update: Callable[[Tensor, Tensor], Sums]
    """``(outputs, targets) -> sums``; may return other tensors than float64 ones, which are converted."""
    compute: Callable[[Sums], float]
    """``sums -> figure``."""
    higher_is_better: bool = True
    percent: bool = False
    """Whether the figure is a share, which people read in percent."""
    summary: str = ""
    source: str = ""


def _count(sums: Sums) -> float:
    return float(sums["examples"])


def _nothing(outputs: Tensor, targets: Tensor) -> Sums:  # noqa: ARG001
    return {}


def _correct(outputs: Tensor, targets: Tensor) -> Sums:
    return {"correct": (outputs.argmax(dim=-1) == targets).sum()}


def _accuracy(sums: Sums) -> float:
    return float(sums["correct"]) / _count(sums)


def top_k(k: int) -> Metric:
    """Return the metric ``top-K``: the share of examples whose class is among the ``k`` highest outputs."""

    def update(outputs: Tensor, targets: Tensor) -> Sums:
        best = outputs.topk(min(k, outputs.shape[-1]), dim=-1).indices
        return {"correct": (best == targets[:, None]).any(dim=-1).sum()}

    summary = f"share of examples whose class is among the {k} highest outputs"
    return Metric(name=f"top-{k}", update=update, compute=_accuracy, percent=True, summary=summary)


def _confusion(outputs: Tensor, targets: Tensor) -> Sums:
    classes, predicted = outputs.shape[-1], outputs.argmax(dim=-1)
    return {
        "hits": torch.bincount(targets[predicted == targets], minlength=classes),
        "predicted": torch.bincount(predicted, minlength=classes),
        "actual": torch.bincount(targets, minlength=classes),
    }


def _macro_f1(sums: Sums) -> float:
    """Mean F1 of the classes that occur, among targets or predictions."""
    total = sums["predicted"] + sums["actual"]
    occur = total > 0
    return float((2 * sums["hits"][occur] / total[occur]).mean())


def _balanced(sums: Sums) -> float:
    occur = sums["actual"] > 0
    return float((sums["hits"][occur] / sums["actual"][occur]).mean())


_BINS, _REACH = 4096, 20.0


def _odds_histogram(outputs: Tensor, targets: Tensor) -> Sums:
    """Histograms ``(K, bins)`` of each class's log-odds, of its own examples and of the others."""
    classes = outputs.shape[-1]
    logits = outputs.double().log_softmax(dim=-1)
    # log p - log(1 - p), without 1 - p: that is 0 for a sure model.
    odds = torch.stack(
        [logits[:, c] - logits[:, [i for i in range(classes) if i != c]].logsumexp(dim=-1) for c in range(classes)]
    )
    bins = ((odds.clamp(-_REACH, _REACH) + _REACH) / (2 * _REACH) * (_BINS - 1)).round().long()
    own = torch.nn.functional.one_hot(targets, classes).T.bool()
    rows = [
        (torch.bincount(at[mine], minlength=_BINS), torch.bincount(at[~mine], minlength=_BINS))
        for at, mine in zip(bins, own, strict=True)
    ]
    return {"own": torch.stack([a for a, _ in rows]), "others": torch.stack([b for _, b in rows])}


def _auc(sums: Sums) -> float:
    """Mean over classes (of two: one figure) of the share of pairs in the right order; a tie counts half."""
    own, others = sums["own"], sums["others"]
    below = others.cumsum(dim=-1) - others / 2
    pairs = own.sum(dim=-1) * others.sum(dim=-1)
    both = pairs > 0
    return float(((own * below).sum(dim=-1)[both] / pairs[both]).mean()) if bool(both.any()) else math.nan


def _moments(outputs: Tensor, targets: Tensor) -> Sums:
    y, error = targets.double(), outputs.double() - targets.double()
    return {
        "squared-error": error.square().sum(dim=0),
        "absolute-error": error.abs().sum(dim=0),
        "sum": y.sum(dim=0),
        "squares": y.square().sum(dim=0),
    }


def _mse(sums: Sums) -> float:
    return float(sums["squared-error"].mean()) / _count(sums)


def _r2(sums: Sums) -> float:
    """``1 - Σ (ŷ - y)² / Σ (y - mean)²``, mean over the values of an example."""
    spread = sums["squares"] - sums["sum"].square() / sums["examples"]
    return float((1 - sums["squared-error"] / spread).mean())


def _mean_loss(sums: Sums) -> float:
    return float(sums["loss"]) / _count(sums)


METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric(name="accuracy", update=_correct, compute=_accuracy, percent=True, summary="share of right classes"),
        top_k(5),
        Metric(
            name="balanced-accuracy",
            update=_confusion,
            compute=_balanced,
            percent=True,
            summary="mean over classes of the share of each that is right",
        ),
        Metric(
            name="macro-f1",
            update=_confusion,
            compute=_macro_f1,
            percent=True,
            summary="mean F1 of the classes that occur among targets or predictions",
        ),
        Metric(
            name="auc",
            update=_odds_histogram,
            compute=_auc,
            percent=True,
            summary=f"area under the ROC curve, one class against the rest, mean over classes; log-odds in {_BINS} "
            f"bins from -{_REACH:g} to {_REACH:g}, pairs within a bin count half",
        ),
        Metric(
            name="perplexity",
            update=_nothing,
            compute=lambda sums: math.exp(min(_mean_loss(sums), 700.0)),
            higher_is_better=False,
            summary="exp of the mean cross-entropy of a token",
        ),
        Metric(name="mse", update=_moments, compute=_mse, higher_is_better=False, summary="mean squared error"),
        Metric(
            name="rmse",
            update=_moments,
            compute=lambda sums: math.sqrt(_mse(sums)),
            higher_is_better=False,
            summary="root of the mean squared error",
        ),
        Metric(
            name="mae",
            update=_moments,
            compute=lambda sums: float(sums["absolute-error"].mean()) / _count(sums),
            higher_is_better=False,
            summary="mean absolute error",
        ),
        Metric(name="r2", update=_moments, compute=_r2, summary="share of the targets' variance that is explained"),
        Metric(
            name="loss", update=_nothing, compute=_mean_loss, higher_is_better=False, summary="mean loss of the task"
        ),
    )
}
"""What a task can be scored by."""


def metrics_of(goal: "Goal", names: str | None = None) -> tuple[Metric, ...]:
    """Return the metrics of a task, the main one first.

    Args:
        goal: whose own ones are taken by default.
        names: others, separated by spaces.

    Raises:
        UserError: an unknown name, none, or one twice.
    """
    words = list(goal.metrics) if names is None else names.split()
    for word in words:
        check_name("data.metrics", word, METRICS)
    if not words or len(set(words)) < len(words):
        raise UserError(f"data.metrics={names!r}: name each metric once, the main one first")
    return tuple(METRICS[word] for word in words)


def own_metric(name: str, made: Any, summary: str, **options: Any) -> Metric:
    """Return the row of an object with ``update(outputs, targets) -> sums`` and ``compute(sums) -> float``.

    A TorchMetrics metric will do if all of its states are sums. ``higher_is_better`` and ``percent`` are options, or
    attributes of the object.
    """
    facts = {key: options.get(key, getattr(made, key, default)) for key, default in _FLAGS.items()}
    facts = {key: default if facts[key] is None else bool(facts[key]) for key, default in _FLAGS.items()}
    if hasattr(made, "_reductions"):
        update, compute = _torchmetrics(name, made)
        return Metric(name=name, update=update, compute=compute, summary=summary, source="TorchMetrics", **facts)
    return Metric(name=name, update=made.update, compute=made.compute, summary=summary, source="user code", **facts)


_FLAGS = {"higher_is_better": True, "percent": False}


def _torchmetrics(name: str, metric: Any) -> tuple[Callable[[Tensor, Tensor], Sums], Callable[[Sums], float]]:
    """Return the two functions of a TorchMetrics metric whose states add up."""
    states = list(metric._defaults)
    for state in states:
        reduction = getattr(metric._reductions[state], "__name__", None)
        if reduction != "dim_zero_sum" or not isinstance(metric._defaults[state], Tensor):
            raise UserError(
                f"extend.metric({name!r}): the state {state!r} of {type(metric).__name__} is no sum, so parts of the "
                "test set do not add up: give it thresholds, if it takes some, or write update and compute"
            )

    def update(outputs: Tensor, targets: Tensor) -> Sums:
        metric.reset()
        metric.update(outputs, targets)
        return {state: getattr(metric, state) for state in states}

    def compute(sums: Sums) -> float:
        metric.reset()
        for state in states:
            setattr(metric, state, sums[state].to(metric._defaults[state].dtype))
        metric._update_count = 1
        return float(metric.compute())

    return update, compute
