"""Networks with early exits: blocks, a classifier after each, and submodels that leave out the last blocks.

A submodel of depth ``d`` has the layers of the first ``d`` blocks and their classifiers, under the names that these
have in the whole network: its tensors are a subset of the whole network's, and each is a leading block of its namesake.
The classifier after the last block is what follows it in the plain network. The others are one linear layer on the
block's outputs; of a feature map, on its means over a grid of at most ``4 × 4`` places.

Sources: DepthFL (Kim et al., ICLR 2023), ScaleFL (Ilhan et al., CVPR 2023). Departures: early classifiers have
convolutions of their own in ScaleFL's release and in Flower's baseline of DepthFL; ScaleFL's release takes width and
depth of each level as options, here they are scaled in one proportion (``Architecture.size_at``).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedmaestro.lod import LoDLinear
from fedmaestro.models.shape import InputShape

Answer = Literal["none", "ensemble", "last"]
"""What a network with early exits puts out in evaluation: the mean logits of all of its classifiers, or the logits of
the last one; none: it has no early exits."""

GRID = 4
"""Places along each side of a feature map that an early classifier sees, at most."""

EXITS = "exits"
"""Where the outputs of all classifiers are in what a network in training puts out."""


class EarlyExits(nn.Module):
    """The first blocks of a network, each with its classifier; names of tensors are those of the plain network.

    In training, calling it gives ``{"logits": (B, K), "exits": [(B, K), …]}``, the shallowest exit first; in
    evaluation, the logits only. Those are the ensemble's or the last exit's (``Answer``).
    """

    def __init__(self, layers: "OrderedDict[str, nn.Module]", stages: Sequence["Stage"], answer: Answer) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.stages, self.answer = tuple(stages), answer

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor | list[Tensor]]:
        """Return logits ``(B, K)``; in training, those of every exit too."""
        exits: list[Tensor] = []
        for block, classifier in self.stages:
            x = self._run(block, x)
            if self.training or self.answer == "ensemble" or (block, classifier) == self.stages[-1]:
                exits.append(self._run(classifier, x))
        logits = torch.stack(exits).mean(0) if self.answer == "ensemble" else exits[-1]
        return {"logits": logits, EXITS: exits} if self.training else logits

    def _run(self, names: Sequence[str], x: Tensor) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


Stage = tuple[tuple[str, ...], tuple[str, ...]]
"""Names of the layers of a block, and of the classifier after it."""


def with_exits(
    plain: nn.Module, ends: Sequence[str], depth: int, input_shape: InputShape, num_classes: int, answer: Answer
) -> EarlyExits:
    """Return the first blocks of a network with their classifiers; call it where the network was made (``meta``).

    Args:
        plain: a sequence of layers.
        ends: the last layer of each block.
        depth: how many blocks, from 1 on.
        input_shape: of an example.
        num_classes: ``K``.
        answer: of the new network.

    Raises:
        ValueError: a number of blocks that there is not.
    """
    if not 1 <= depth <= len(ends):
        raise ValueError(f"{depth} of {len(ends)} blocks")
    layers = OrderedDict(plain.named_children())
    blocks = _blocks(list(layers), ends)
    after_last = tuple(layers)[sum(map(len, blocks)) :]
    whole = depth == len(blocks)
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    early: OrderedDict[str, nn.Module] = OrderedDict()
    stages: list[Stage] = []
    x = torch.zeros(2, *input_shape)
    for number, block in enumerate(blocks[:depth], start=1):
        for name in block:
            kept[name] = layers[name]
            with torch.no_grad():
                x = layers[name](x)
        name = f"exit{number}"
        if whole and number == depth:
            kept |= {last: layers[last] for last in after_last}
        else:
            early[name] = _classifier(tuple(x.shape[1:]), num_classes)
        stages.append((block, after_last if whole and number == depth else (name,)))
    # Early classifiers behind all that the plain network has too, which so starts from the same draws.
    return EarlyExits(kept | early, stages, answer)


def classifiers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that put out a model's answers: of most models, the last one."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | LoDLinear)]
    if not isinstance(model, EarlyExits):
        return linear[-1:]
    heads = [classifier for _, classifier in model.stages]
    inside = [[x for x in linear if x.split(".")[0] in names] for names in heads]
    return [names[-1] for names in inside]


def _blocks(names: Sequence[str], ends: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the names of the layers of each block."""
    last = [names.index(end) + 1 for end in ends]
    return [tuple(names[first:end]) for first, end in zip([0, *last], last, strict=False)]


def _classifier(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return an early classifier for features ``(C,)`` or ``(C, H, W)``."""
    if len(shape) == 1:
        return nn.Sequential(OrderedDict(fc=nn.Linear(shape[0], num_classes)))
    channels, height, width = shape
    grid = min(GRID, height), min(GRID, width)
    fc = nn.Linear(channels * grid[0] * grid[1], num_classes)
    return nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(grid), flatten=nn.Flatten(), fc=fc))
