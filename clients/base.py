"""What a local objective sees of a device, and what a row of the table of objectives is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmaestro.fleet.rule import Passes
from fedmaestro.models.exits import EXITS
from fedmaestro.models.masks import kept_weights, maskable
from fedmaestro.submodel import Shapes, State, leading_block, state_of
from fedmaestro.tasks.goal import CLASSIFICATION, Goal

X = Tensor | tuple[Tensor, ...]
"""The inputs of some examples: a tensor, or several for a model that takes several."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefixes:
    """A device's model and the smaller nested models inside it; level 0 is its own, then ever smaller tiers.

    ``prefixes(x, level)`` runs on views of the same parameters, so a smaller level does that prefix's work only and its
    gradient flows into the leading blocks.

    Attributes:
        model: of the device's own size.
        smaller: a template on ``meta`` and the shapes of every smaller level, largest first.
        num_classes: of the logits.
        goal: what is learnt.
        classes: bool ``(num_classes,)``, the classes of the device; None: all of them count.
        offsets: ``(num_classes,)``, what ``label_loss`` adds to the logits; None: nothing.
        skew: ``label_skew`` of the device, a scalar; None: labels are not known, or nobody asks.
        state: the tensors of the model's state, which share its memory. Found once: walking through the modules takes
            a good part of the time that a small model trains.
        parameters: the model's.
    """

    model: nn.Module
    smaller: Sequence[tuple[nn.Module, Shapes]] = ()
    num_classes: int
    goal: Goal = CLASSIFICATION
    classes: Tensor | None = None
    offsets: Tensor | None = None
    skew: Tensor | None = None
    threshold: float | None = None
    """The smallest magnitude of weights that count; None: all do."""
    state: State = field(default_factory=dict)
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.state:
            object.__setattr__(self, "state", state_of(self.model))
            object.__setattr__(self, "parameters", dict(self.model.named_parameters()))

    def of_device(self, labels: Tensor, objective: "Objective", logit_adjustment: float) -> "Prefixes":
        """Return the same models with what a device's ``labels (N,)`` say, as far as it is read.

        Args:
            labels: of all its examples.
            objective: what the device minimises.
            logit_adjustment: τ of ``logit_offsets``.
        """
        if not (objective.masked or objective.by_skew or logit_adjustment):
            return self
        counts = torch.bincount(labels, minlength=self.num_classes)
        return replace(
            self,
            classes=counts > 0 if objective.masked else None,
            offsets=logit_offsets(counts, logit_adjustment),
            skew=label_skew(counts) if objective.by_skew else None,
        )

    @property
    def levels(self) -> int:
        """Number of nested models, the own one included."""
        return 1 + len(self.smaller)

    def __call__(self, x: X, level: int = 0) -> Tensor:
        """Return the outputs of a level: logits ``(B, classes)`` of images, say."""
        inputs = x if isinstance(x, tuple) else (x,)
        if level == 0:
            return self.goal.outputs(self._own(inputs))
        template, shapes = self.smaller[level - 1]
        views = {name: leading_block(self.parameters[name], shape) for name, shape in shapes.items()}
        return self.goal.outputs(functional_call(template, views, inputs))

    def _own(self, inputs: tuple[Tensor, ...]) -> Any:
        """Return what the own model puts out, with its weights masked where that is asked for."""
        if self.threshold is None:
            return self.model(*inputs)
        kept = {name: kept_weights(x, self.threshold) for name, x in self.parameters.items() if maskable(x.shape)}
        return functional_call(self.model, kept, inputs)

    def exits(self, x: X) -> list[Tensor]:
        """Return the outputs of every classifier of the own model, the shallowest first; of most models, of one."""
        result = self._own(x if isinstance(x, tuple) else (x,))
        outputs = result[EXITS] if isinstance(result, Mapping) and EXITS in result else [result]
        return [self.goal.outputs(one) for one in outputs]

    def label_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the task's loss, with the logit adjustment where that is on: the mean over the targets that count.

        What the formulas of the objectives call ``CE(·, y)``: cross-entropy where targets are classes or tokens.
        """
        return self.goal.loss(outputs if self.offsets is None else outputs + self.offsets, targets)

    def distillation(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Return what a smaller level minimises against a larger one, whose outputs carry no gradient.

        What the formulas call ``CE(·, softmax(teacher))``: cross-entropy on soft targets, squared error where outputs
        are numbers.
        """
        return self.goal.distillation(outputs, teacher, targets)


Loss = Callable[[Prefixes, Any, Tensor, np.random.Generator], Tensor]
"""``(prefixes, x, targets, generator) -> scalar``; ``x`` is a tensor, images ``(B, C, H, W)`` say, or a tuple of them.
"""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One row of ``OBJECTIVES``: what a device minimises in each local step."""

    name: str
    loss: Loss
    passes: Passes
    """Which levels ``loss`` runs: budgets and virtual time count them all."""
    summary: str
    source: str
    choices: Callable[[int], int] | None = None
    """``levels -> n``, if ``loss`` draws nothing from its generator but one ``generator.integers(n)`` in a step (0: not
    even that); None: it may draw anything, so that devices cannot be stacked (``rounds.stacked``)."""
    masked: bool = False
    """Whether ``loss`` reads ``Prefixes.classes``: for classification only."""
    by_skew: bool = False
    """Whether ``loss`` reads ``Prefixes.skew``: for classification only."""


OWN_AND_SMALLER = Passes(
    expected=lambda levels: [1.0] + [1 / (levels - 1)] * (levels - 1) if levels > 1 else [1.0], together=True
)
"""The own submodel, and one of the smaller levels drawn uniformly, in every step."""


def logit_offsets(counts: Tensor, strength: float) -> Tensor | None:
    """Return ``τ log π_c`` ``(num_classes,)``, which a device adds to its logits in training only; None for τ = 0.

    ``π_c = (n_c + 1) / Σ (n + 1)`` is the class frequency on the device. With ``τ = 1``, cross-entropy of ``z + log π``
    is the likelihood of labels that come at the frequencies ``π``, so ``z`` itself learns what it would from balanced
    labels: the skew of a device's labels stays on the device instead of entering the shared network.

    Source: logit adjustment (Menon et al., ICLR 2021, equation 10), at ``τ = 1`` balanced softmax (Ren et al., NeurIPS
    2020); FedLC (Zhang et al., ICML 2022) calibrates by each device's own counts too, with ``-τ n_c^{-1/4}`` instead of
    the log frequency, and leaves the label out of the denominator. Departure: one is added to every count, because
    devices lack classes, and without examples of a class ``log π`` is infinite.

    Args:
        counts: ``(num_classes,)``, examples of each class on the device.
        strength: τ.
    """
    if not strength:
        return None
    smoothed = counts + 1.0
    return strength * (smoothed / smoothed.sum()).log()


def label_skew(counts: Tensor) -> Tensor:
    """Return ``1 - H(π) / log C`` of the class frequencies ``π``: 0 where all classes are as frequent, 1 for one class.

    Args:
        counts: ``(C,)``, examples of each class.
    """
    frequencies = counts / counts.sum()
    skew: Tensor = 1 + torch.special.xlogy(frequencies, frequencies).sum() / math.log(max(len(counts), 2))
    return skew
