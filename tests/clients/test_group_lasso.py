"""The group lasso in a device's local steps."""

from dataclasses import replace

import pytest
import torch
from batches import batch
from torch import nn

from fedmaestro import lod
from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Prefixes
from fedmaestro.lod.suffix import tail_of
from fedmaestro.rounds.training import Draws, LocalTraining, train_device
from fedmaestro.submodel import State

ONE_STEP = LocalTraining(epochs=1, batch_size=100, lr=0.1, momentum=0.0, weight_decay=0.0)
IMAGES = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
LABELS = (IMAGES[:, 0] > 0).long()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return lod.factorize(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)))


def trained(model: nn.Module, settings: LocalTraining) -> tuple[float, State]:
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = train_device(
        Prefixes(model=model, num_classes=2),
        start,
        OBJECTIVES["own-prefix"],
        batch(IMAGES, LABELS),
        settings,
        Draws(0, ()),
    )
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    return loss, after


def test_a_step_adds_the_gradient_of_the_penalty_and_reports_the_loss_without_it(model: nn.Module) -> None:
    plain_loss, plain = trained(model, ONE_STEP)
    loss, state = trained(model, replace(ONE_STEP, group_lasso=0.3))
    assert loss == plain_loss
    gradients = torch.autograd.grad(lod.group_lasso(model), list(model.parameters()), allow_unused=True)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        expected = plain[name] if gradient is None else plain[name] - 0.1 * 0.3 * gradient
        torch.testing.assert_close(state[name], expected)


def test_with_tails_a_prefix_is_pulled_as_in_the_whole_model(model: nn.Module) -> None:
    whole = lod.layers(model)["0"]
    (of_whole,) = torch.autograd.grad(lod.group_lasso(model), whole.v)
    small = lod.truncate(model, {"0": 2})
    prefix = lod.layers(small)["0"]
    tails = {"0": tail_of(whole.u.detach(), whole.v.detach(), 2)}
    (with_tails,) = torch.autograd.grad(lod.group_lasso(small, tails), prefix.v)
    (alone,) = torch.autograd.grad(lod.group_lasso(small), prefix.v)
    torch.testing.assert_close(with_tails, of_whole[:2])
    assert bool((alone.norm(dim=1) > 1.05 * with_tails.norm(dim=1)).all()), "the last columns are pulled harder"
