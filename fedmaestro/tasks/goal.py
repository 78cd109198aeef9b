"""What a model learns from its outputs: the loss, what a smaller model copies of a larger one, the metrics.

Shapes: ``B`` examples, ``T`` tokens, ``K`` classes or size of the vocabulary, ``D`` values of a regression.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from fedmaestro.errors import UserError

NO_INDEX = -100
"""PyTorch's target value that does not count."""

Targets = Literal["classes", "values", "tokens"]
"""What a target is: a class ``(B,)``, numbers ``(B, D)``, a sequence of tokens ``(B, T)``."""


def outputs_of(result: Any) -> Tensor:
    """Return the tensor that a model put out: itself, ``["logits"]`` of a dictionary, or the first of several."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        result = result["logits"] if "logits" in result else next(iter(result.values()), None)
    elif isinstance(result, tuple | list) and result:
        result = result[0]
    if isinstance(result, Tensor):
        return result
    raise UserError(
        f"the model returned {type(result).__name__}: a task needs a tensor, a dictionary with 'logits', or a tuple "
        "whose first part is a tensor"
    )


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One row of ``TASKS``: what is learnt, whatever the data."""

    name: str
    targets: Targets
    loss: Callable[[Tensor, Tensor], Tensor]
    """``(outputs, targets) -> scalar``: the mean over the targets that count."""
    metrics: tuple[str, ...] = ("loss",)
    """Names in ``METRICS``; the first one is what tables and plots show."""
    distillation: Callable[[Tensor, Tensor, Tensor], Tensor]
    """``(outputs, teacher's outputs, targets) -> scalar``: what a smaller model minimises against a larger one."""
    outputs: Callable[[Any], Tensor] = outputs_of
    """What the model returned ``-> outputs``."""
    summed: Callable[[Tensor, Tensor], Tensor] | None = None
    """``(outputs, targets) -> Σ loss`` over the targets that count; None: the mean times their number."""
    smoothed: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """``(outputs, targets, label smoothing) -> scalar``; None: there is no such thing."""
    ignore_index: int = NO_INDEX
    """Token that does not count (padding)."""
    summary: str = ""

    def counted(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and targets as metrics take them: one row for each target that counts."""
        if self.targets == "values":
            return outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None], targets.reshape(len(targets), -1)
        outputs, targets = outputs.flatten(0, -2), targets.flatten()
        valid = targets != self.ignore_index
        return (outputs, targets) if bool(valid.all()) else (outputs[valid], targets[valid])

    def count(self, targets: Tensor) -> int:
        """Return how many targets count."""
        return len(targets) if self.targets == "values" else int((targets != self.ignore_index).sum())


def cross_entropy(
    name: str, targets: Targets, metrics: tuple[str, ...], summary: str, ignore_index: int = NO_INDEX
) -> Goal:
    """Return a task whose model puts out logits ``(…, K)`` for targets ``(…)``."""

    def loss(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, label_smoothing=smoothing
        )

    def distillation(outputs: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        outputs, teacher = outputs.flatten(0, -2), teacher.detach().flatten(0, -2)
        if targets == "tokens":
            valid = labels.flatten() != ignore_index
            outputs, teacher = outputs[valid], teacher[valid]
        return F.cross_entropy(outputs, teacher.softmax(dim=-1))

    def summed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum")

    return Goal(
        name=name,
        targets=targets,
        loss=loss,
        summed=summed,
        smoothed=loss,
        distillation=distillation,
        metrics=metrics,
        ignore_index=ignore_index,
        summary=summary,
    )


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples and values; outputs ``(B,)`` are taken for ``(B, 1)``."""
    return F.mse_loss(outputs.reshape(targets.shape), targets)


CLASSIFICATION = cross_entropy(
    "classification", "classes", ("accuracy",), "the class of an example; cross-entropy of logits (B, K)"
)
REGRESSION = Goal(
    name="regression",
    targets="values",
    loss=_squared_error,
    distillation=lambda outputs, teacher, _targets: F.mse_loss(outputs, teacher.detach()),
    metrics=("rmse", "r2"),
    summary="numbers; mean squared error of outputs (B, D)",
)
NEXT_TOKEN = cross_entropy(
    "next-token",
    "tokens",
    ("perplexity", "accuracy"),
    "each next token of a sequence; cross-entropy of logits (B, T, K)",
)
SEQUENCE_TO_SEQUENCE = cross_entropy(
    "sequence-to-sequence",
    "tokens",
    ("perplexity", "accuracy"),
    "each next token of the second sequence from the first one and the tokens before it; logits (B, T, K)",
)

TASKS: dict[str, Goal] = {goal.name: goal for goal in (CLASSIFICATION, REGRESSION, NEXT_TOKEN, SEQUENCE_TO_SEQUENCE)}
"""What can be learnt."""


def own_goal(name: str, made: Any, summary: str) -> Goal:
    """Return the row of an object with ``loss(outputs, targets)``.

    It may also have ``metrics`` (names, the main one first), ``targets`` (``classes``, ``values`` or ``tokens``),
    ``distillation(outputs, teacher, targets)`` and ``outputs(what the model returned)``. Without a distillation of its
    own, a smaller model learns from a larger one by cross-entropy, or by squared error where targets are values.
    """
    targets: Targets = getattr(made, "targets", "values")
    if targets not in ("classes", "values", "tokens"):
        raise UserError(f"extend.task({name!r}): targets={targets!r}: classes, values or tokens")
    like = REGRESSION if targets == "values" else NEXT_TOKEN if targets == "tokens" else CLASSIFICATION
    metrics = getattr(made, "metrics", ("loss",))
    return Goal(
        name=name,
        targets=targets,
        loss=made.loss,
        metrics=(metrics,) if isinstance(metrics, str) else tuple(metrics),
        distillation=getattr(made, "distillation", like.distillation),
        outputs=getattr(made, "outputs", outputs_of),
        summary=summary,
    )
