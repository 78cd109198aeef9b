"""What a host does for one device: load the submodel into a resident model, train it locally, hand back its state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedmaestro.fleet.plan import Passes
from fedmaestro.lod import group_lasso
from fedmaestro.lod.suffix import Tail
from fedmaestro.submodel import Shapes, State, leading_block, load


class Prefixes:
    """A device's model and the smaller nested models inside it; level 0 is its own, then ever smaller tiers.

    ``prefixes(x, level)`` runs on views of the same parameters, so a smaller level does that prefix's work only and its
    gradient flows into the leading blocks.
    """

    classes: Tensor | None
    """Bool ``(num_classes,)``: the classes of the device in training, where its objective asks; None: unknown."""
    offsets: Tensor | None
    """``(num_classes,)``: what ``label_loss`` adds to the logits; None: nothing."""

    def __init__(self, model: nn.Module, smaller: Sequence[tuple[nn.Module, Shapes]]) -> None:
        self.model = model
        self.classes = None
        self.offsets = None
        self._smaller = smaller
        self._parameters = dict(model.named_parameters())

    @property
    def levels(self) -> int:
        """Number of nested models, the own one included."""
        return 1 + len(self._smaller)

    def __call__(self, images: Tensor, level: int = 0) -> Tensor:
        """Return the logits ``(B, classes)`` of ``images (B, C, H, W)``."""
        if level == 0:
            return self.model(images)  # type: ignore[no-any-return]
        template, shapes = self._smaller[level - 1]
        views = {name: leading_block(self._parameters[name], shape) for name, shape in shapes.items()}
        return functional_call(template, views, (images,))  # type: ignore[no-any-return]

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of ``logits (B, classes)``, with the logit adjustment where that is on.

        What the formulas of the objectives call ``CE(·, y)``.
        """
        return F.cross_entropy(logits if self.offsets is None else logits + self.offsets, labels)


Loss = Callable[[Prefixes, Tensor, Tensor, np.random.Generator], Tensor]
"""``(prefixes, images (B, C, H, W), labels (B,), generator) -> scalar``"""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One row of ``OBJECTIVES``: what a device minimises in each local step."""

    name: str
    loss: Loss
    passes: Passes
    """Which levels ``loss`` runs: budgets and virtual time count them all."""
    summary: str
    source: str
    needs_classes: bool = False
    """Whether ``loss`` reads ``Prefixes.classes``."""


OWN_AND_SMALLER = Passes(
    expected=lambda levels: [1.0] + [1 / (levels - 1)] * (levels - 1) if levels > 1 else [1.0], together=True
)
"""The own submodel, and one of the smaller levels drawn uniformly, in every step."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The local optimiser: plain SGD, as every method here uses it, and what it adds to an objective."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float = 0.0
    """Largest L2 norm of a step's gradient; 0: no clipping."""
    logit_adjustment: float = 0.0
    """τ of ``logit_offsets``; 0: the plain cross-entropy."""
    group_lasso: float = 0.0
    """Weight of ``lod.group_lasso`` of all columns that the device holds; 0: none."""
    tails: Mapping[str, Tail] = field(default_factory=dict)
    """For the group lasso, by layer: what the columns behind the device's prefix add to its suffix norms."""
    frozen: frozenset[str] = frozenset()
    """Parameters that stay as they were sent."""


class TrainingFailedError(RuntimeError):
    """A device's local training gave no usable model."""


def train_device(
    prefixes: Prefixes,
    start: State,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    settings: LocalTraining,
    generator: np.random.Generator,
) -> float:
    """Train a device's model in place from ``start``; ``prefixes.model`` then holds the result.

    Args:
        prefixes: the resident model and its smaller levels.
        start: the submodel that the server sent.
        objective: what a step minimises.
        images: ``(N, C, H, W)``, all examples of the device.
        labels: ``(N,)``.
        settings: epochs, batch size and SGD parameters; the last batch of an epoch may be smaller.
        generator: order of the examples and whatever the objective draws.

    Returns:
        The mean loss of a step, weighted by examples; without the group lasso, so that runs of any weight compare, but
        with the logit adjustment, whose strengths do not.

    Raises:
        TrainingFailedError: the loss or a parameter is not finite.
    """
    model = prefixes.model.train()
    load(model, start)
    asked = objective.needs_classes or settings.logit_adjustment
    counts = _class_counts(model, images, labels) if asked else None
    prefixes.classes = counts > 0 if counts is not None and objective.needs_classes else None
    prefixes.offsets = None if counts is None else logit_offsets(counts, settings.logit_adjustment)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in settings.frozen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    total = torch.zeros(())
    for _ in range(settings.epochs):
        order = torch.from_numpy(generator.permutation(len(labels)))
        for batch in torch.split(order, settings.batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = objective.loss(prefixes, images[batch], labels[batch], generator)
            _penalised(loss, model, settings).backward()  # type: ignore[no-untyped-call]
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            total += loss.detach() * len(batch)
    mean = float(total) / (settings.epochs * len(labels))
    if not np.isfinite(mean):
        raise TrainingFailedError(f"the training loss is {mean}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingFailedError(f"parameter {name} is not finite after training")
    return mean


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


@torch.no_grad()
def _class_counts(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return how many of ``labels`` each of the model's classes has: ``(num_classes,)``."""
    # One example tells how many classes there are; in evaluation mode, dropout draws nothing for it.
    logits = model.eval()(images[:1])
    model.train()
    return torch.bincount(labels, minlength=logits.shape[1])


def _penalised(loss: Tensor, model: nn.Module, settings: LocalTraining) -> Tensor:
    """Return ``loss`` plus the weighted group lasso of ``model``; ``loss`` itself where there is none."""
    return loss + settings.group_lasso * group_lasso(model, settings.tails) if settings.group_lasso else loss
