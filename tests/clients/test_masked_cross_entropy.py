"""The masked cross-entropy: classes that a device lacks have logit 0."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import batch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.rounds.training import Draws, LocalTraining, train_device
from fedmaestro.submodel import State

MASKED, OWN = OBJECTIVES["masked-cross-entropy"], OBJECTIVES["own-prefix"]
SETTINGS = LocalTraining(epochs=3, batch_size=4, lr=0.2, momentum=0.0, weight_decay=0.0, clip_norm=1.0)
CLASSES = 6
PRESENT = [1, 4]
ABSENT = [0, 2, 3, 5]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES))


def prefixes_of(model: nn.Module) -> Prefixes:
    return Prefixes(model=model, num_classes=CLASSES)


def data(classes: list[int], n: int = 18) -> tuple[Tensor, Tensor]:
    images = torch.randn(n, 5, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor(classes)[torch.arange(n) % len(classes)]


def mask(classes: list[int]) -> Tensor:
    return torch.isin(torch.arange(CLASSES), torch.tensor(classes))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], classes: Tensor | None) -> Tensor:
    prefixes = Prefixes(model=model, num_classes=CLASSES, classes=classes)
    return MASKED.loss(prefixes, *batch, np.random.default_rng(0))


def trained(
    model: nn.Module, classes: list[int], objective: Objective = MASKED, settings: LocalTraining = SETTINGS
) -> tuple[float, State]:
    model = copy.deepcopy(model)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = train_device(prefixes_of(model), start, objective, batch(*data(classes)), settings, Draws(0, ()))
    return loss, model.state_dict()


# ---------------------------------------------------------------- the loss


def test_an_absent_class_competes_with_logit_0() -> None:
    """Logits (2, 5, 1, -3), label 0, classes 0 and 2: -2 + ln(e² + e⁰ + e¹ + e⁰)."""
    logits = torch.tensor([[2.0, 5.0, 1.0, -3.0]])
    classes = torch.tensor([True, False, True, False])
    expected = -2 + math.log(math.exp(2) + 1 + math.exp(1) + 1)
    assert float(loss_of(nn.Identity(), (logits, torch.tensor([0])), classes)) == pytest.approx(expected)


def test_rows_of_absent_classes_get_a_gradient_of_exactly_0(model: nn.Module) -> None:
    loss_of(model, data(PRESENT), mask(PRESENT)).backward()  # type: ignore[no-untyped-call]
    for parameter in model[2].parameters():  # type: ignore[index]
        assert not parameter.grad[ABSENT].any()
        assert parameter.grad[PRESENT].abs().min() > 0
    assert all(bool(parameter.grad.any()) for parameter in model[0].parameters())  # type: ignore[index]


@pytest.mark.parametrize("classes", [None, mask(list(range(CLASSES)))])
def test_with_all_classes_it_is_the_cross_entropy_bit_for_bit(model: nn.Module, classes: Tensor | None) -> None:
    images, labels = data(PRESENT)
    losses = loss_of(model, (images, labels), classes), F.cross_entropy(model(images), labels)
    results = [[loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))] for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- a device


class Spy:
    """The masked loss, noting the classes that it was given."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def __call__(self, prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
        assert all(module.training for module in prefixes.model.modules())
        self.seen.append(prefixes.classes)
        return MASKED.loss(prefixes, images, labels, generator)


def test_every_device_brings_its_own_classes(model: nn.Module) -> None:
    prefixes, start = prefixes_of(model), copy.deepcopy(model.state_dict())
    spy, settings = Spy(), replace(SETTINGS, epochs=1, batch_size=100)
    for objective in (MASKED, OWN):
        for classes in ([5], PRESENT):
            spied = replace(objective, loss=spy)
            train_device(prefixes, start, spied, batch(*data(classes)), settings, Draws(0, ()))
    first, second, *unasked = spy.seen
    assert first is not None
    assert second is not None
    assert first.dtype == torch.bool
    assert first.tolist() == mask([5]).tolist()
    assert second.tolist() == mask(PRESENT).tolist()
    assert unasked == [None, None]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_of_absent_classes_stay_as_they_were_sent(model: nn.Module, momentum: float) -> None:
    """Also with momentum: it is the mean of gradients that are all 0."""
    _, state = trained(model, PRESENT, settings=replace(SETTINGS, momentum=momentum))
    for name, before in model.state_dict().items():
        if name.startswith("2."):
            assert torch.equal(state[name][ABSENT], before[ABSENT])
            assert bool((state[name][PRESENT] != before[PRESENT]).all())
        else:
            assert not torch.equal(state[name], before)
    _, plain = trained(model, PRESENT, OWN)
    assert bool((plain["2.bias"][ABSENT] < model.state_dict()["2.bias"][ABSENT]).all()), "what the mask is for"


def test_the_rows_of_a_factorised_head_are_those_of_u(model: nn.Module) -> None:
    factors = lod.factorize(model)
    _, state = trained(factors, PRESENT)
    before = factors.state_dict()
    for name in ("2.u", "2.bias"):
        assert torch.equal(state[name][ABSENT], before[name][ABSENT])
        assert not torch.equal(state[name][PRESENT], before[name][PRESENT])


def test_nothing_runs_only_to_count_the_classes(model: nn.Module) -> None:
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = replace(SETTINGS, epochs=1, batch_size=100, logit_adjustment=1.0)
    train_device(prefixes_of(model), start, MASKED, batch(*data(PRESENT)), settings, Draws(0, ()))
    assert len(runs) == 1, "one step"


def test_weight_decay_leaves_rows_of_absent_classes_as_they_were_sent(model: nn.Module) -> None:
    settings = replace(SETTINGS, weight_decay=0.1, momentum=0.9, clip_norm=0.0, lr=0.05)
    _, after = trained(model, PRESENT, settings=settings)
    head, bias = (dict(model.state_dict())[name] for name in ("2.weight", "2.bias"))
    assert torch.equal(after["2.weight"][ABSENT], head[ABSENT])
    assert torch.equal(after["2.bias"][ABSENT], bias[ABSENT])
    # All other rows are those of training with the decay on everything, since absent rows are no part of the loss.
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    images, labels = data(PRESENT)
    order = Draws(0, ()).order
    for _ in range(settings.epochs):
        for indices in torch.split(torch.from_numpy(order.permutation(len(labels))), settings.batch_size):
            optimizer.zero_grad()
            loss_of(plain, (images[indices], labels[indices]), mask(PRESENT)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    expected = plain.state_dict()
    torch.testing.assert_close(after["2.weight"][PRESENT], expected["2.weight"][PRESENT])
    torch.testing.assert_close(after["0.weight"], expected["0.weight"])
