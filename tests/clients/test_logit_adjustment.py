"""The logit adjustment: skewed labels of a device stay on the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import batch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Objective, Prefixes, logit_offsets
from fedmaestro.rounds.training import Draws, LocalTraining, train_device
from fedmaestro.submodel import shapes_of

SETTINGS = LocalTraining(epochs=1, batch_size=100, lr=0.1, momentum=0.0, weight_decay=0.0, logit_adjustment=1.0)
COUNTS = torch.tensor([7, 1, 0, 0])


@pytest.fixture
def prefixes() -> Prefixes:
    torch.manual_seed(0)
    model = lod.factorize(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)))
    small = lod.truncate(model, {"0": 1, "2": 1}).to("meta")
    return Prefixes(model=model, smaller=[(small, shapes_of(small))], num_classes=4)


def batch_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(1)), labels


def test_offsets_are_the_logs_of_smoothed_frequencies() -> None:
    # (7 + 1, 1 + 1, 0 + 1, 0 + 1) of 12.
    expected = torch.tensor([8 / 12, 2 / 12, 1 / 12, 1 / 12]).log()
    for strength in (1.0, 0.5, 2.0):
        offsets = logit_offsets(COUNTS, strength)
        assert offsets is not None
        torch.testing.assert_close(offsets, strength * expected)
    assert logit_offsets(COUNTS, 0.0) is None


def test_balanced_logits_fit_skewed_labels() -> None:
    """Why: with logits that say nothing (all 0), the adjusted loss is stationary where labels come at the frequencies.

    Its gradient in the logits, summed over the labels, is Σ (π - 1_y) = n π - counts: 0 but for the added ones. The
    plain one pushes the absent classes down by n / C.
    """
    counts = torch.tensor([700, 200, 100, 0])
    _, labels = batch_of(counts)
    logits = torch.zeros(len(labels), 4, requires_grad=True)
    offsets = logit_offsets(counts, 1.0)
    assert offsets is not None
    F.cross_entropy(logits + offsets, labels, reduction="sum").backward()
    assert logits.grad is not None
    expected = 1000 * (counts + 1) / 1004 - counts
    torch.testing.assert_close(logits.grad.sum(0), expected, rtol=1e-3, atol=1e-2)
    assert float(logits.grad.sum(0).abs().max()) < 3  # plain: 450


class Spy:
    """An objective that notes what ``label_loss`` adds."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.seen = objective, list[Tensor | None]()

    def __call__(self, prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
        self.seen.append(prefixes.offsets)
        return self.objective.loss(prefixes, images, labels, generator)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_each_devices_own_frequencies(prefixes: Prefixes, name: str) -> None:
    start = {key: tensor.clone() for key, tensor in prefixes.model.state_dict().items()}
    spy = Spy(OBJECTIVES[name])
    spied = replace(OBJECTIVES[name], loss=spy)
    losses = {}
    for counts in (COUNTS, torch.tensor([0, 0, 5, 4])):
        for strength in (0.0, 1.0):
            settings = replace(SETTINGS, logit_adjustment=strength)
            loss = train_device(prefixes, start, spied, batch(*batch_of(counts)), settings, Draws(0, ()))
            losses[tuple(counts.tolist()), strength] = loss
    plain, first, plain_again, second = spy.seen
    assert plain is None
    assert plain_again is None
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first, logit_offsets(COUNTS, 1.0))
    torch.testing.assert_close(second, logit_offsets(torch.tensor([0, 0, 5, 4]), 1.0))
    for counts in {key for key, _ in losses}:
        assert losses[counts, 0.0] != losses[counts, 1.0], "the objective's label loss is not the adjusted one"
