"""What a local objective sees of a device, and what a row of the table of objectives is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedmaestro.fleet.rule import Passes
from fedmaestro.submodel import Shapes, leading_block


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefixes:
    """A device's model and the smaller nested models inside it; level 0 is its own, then ever smaller tiers.

    ``prefixes(x, level)`` runs on views of the same parameters, so a smaller level does that prefix's work only and its
    gradient flows into the leading blocks.

    Attributes:
        model: of the device's own size.
        smaller: a template on ``meta`` and the shapes of every smaller level, largest first.
        num_classes: of the logits.
        classes: bool ``(num_classes,)``, the classes of the device; None: all of them count.
        offsets: ``(num_classes,)``, what ``label_loss`` adds to the logits; None: nothing.
    """

    model: nn.Module
    smaller: Sequence[tuple[nn.Module, Shapes]] = ()
    num_classes: int
    classes: Tensor | None = None
    offsets: Tensor | None = None

    def of_device(self, labels: Tensor, *, masked: bool, logit_adjustment: float) -> "Prefixes":
        """Return the same models with what a device's ``labels (N,)`` say.

        Args:
            labels: of all its examples.
            masked: whether its objective reads ``classes``.
            logit_adjustment: τ of ``logit_offsets``.
        """
        if not (masked or logit_adjustment):
            return self
        counts = torch.bincount(labels, minlength=self.num_classes)
        return replace(self, classes=counts > 0 if masked else None, offsets=logit_offsets(counts, logit_adjustment))

    @property
    def levels(self) -> int:
        """Number of nested models, the own one included."""
        return 1 + len(self.smaller)

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def __call__(self, images: Tensor, level: int = 0) -> Tensor:
        """Return the logits ``(B, classes)`` of ``images (B, C, H, W)``."""
        if level == 0:
            return self.model(images)  # type: ignore[no-any-return]
        template, shapes = self.smaller[level - 1]
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
    masked: bool = False
    """Whether ``loss`` reads ``Prefixes.classes``."""


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
