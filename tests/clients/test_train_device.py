"""What a host does for one device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import batch
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Objective, Prefixes
from fedmaestro.errors import DivergedError
from fedmaestro.rounds.training import Draws, LocalTraining, train_device
from fedmaestro.submodel import State, shapes_of

SETTINGS = LocalTraining(epochs=2, batch_size=8, lr=0.2, momentum=0.9, weight_decay=0.0)
OWN = OBJECTIVES["own-prefix"]


@pytest.fixture
def prefixes() -> Prefixes:
    torch.manual_seed(0)
    model = lod.factorize(nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)))
    small = lod.truncate(model, {"0": 1, "2": 1}).to("meta")
    return Prefixes(model=model, smaller=[(small, shapes_of(small))], num_classes=2)


@pytest.fixture
def start(prefixes: Prefixes) -> State:
    return {name: tensor.clone() for name, tensor in prefixes.model.state_dict().items()}


def separable(seed: int, n: int = 37) -> tuple[Tensor, Tensor]:
    """Labels are the sign of the first feature, which is at least 1 away from 0."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, generator=generator)
    images[:, 0] += images[:, 0].sign()
    return images, (images[:, 0] > 0).long()


def trained(
    prefixes: Prefixes,
    start: State,
    *,
    data: int = 1,
    seed: int = 0,
    objective: Objective = OWN,
    settings: LocalTraining = SETTINGS,
) -> tuple[float, State]:
    loss = train_device(prefixes, start, objective, batch(*separable(data)), settings, Draws(seed, ()))
    return loss, {name: tensor.clone() for name, tensor in prefixes.model.state_dict().items()}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_depends_on_the_generator_only(prefixes: Prefixes, start: State, name: str) -> None:
    torch.manual_seed(11)
    first = trained(prefixes, start, objective=OBJECTIVES[name])
    torch.manual_seed(12)
    second = trained(prefixes, start, objective=OBJECTIVES[name])
    other = trained(prefixes, start, objective=OBJECTIVES[name], seed=1)
    assert first[0] == second[0]
    assert equal(first[1], second[1])
    assert not equal(first[1], other[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls_on_a_separable_problem(prefixes: Prefixes, start: State, name: str) -> None:
    objective = OBJECTIVES[name]
    first, _ = trained(prefixes, start, objective=objective, settings=replace(SETTINGS, epochs=1, lr=1e-6))
    _, state = trained(prefixes, start, objective=objective, settings=replace(SETTINGS, epochs=12))
    last, _ = trained(prefixes, state, objective=objective, settings=replace(SETTINGS, epochs=1, lr=1e-6))
    assert last < 0.4 * first
    images, labels = separable(1)
    assert bool((prefixes(images).argmax(dim=1) == labels).all())


def test_a_device_leaves_nothing_behind_for_the_next_one(prefixes: Prefixes, start: State) -> None:
    alone = trained(prefixes, start, data=2)
    trained(prefixes, start, data=1, seed=5)
    after_another = trained(prefixes, start, data=2)
    assert alone[0] == after_another[0]
    assert equal(alone[1], after_another[1])


def test_one_step_is_plain_sgd_with_weight_decay(prefixes: Prefixes, start: State) -> None:
    images, labels = separable(1)
    prefixes.model.load_state_dict(start)
    loss = nn.functional.cross_entropy(prefixes.model(images), labels)
    gradients = torch.autograd.grad(loss, list(prefixes.model.parameters()))
    settings = LocalTraining(epochs=1, batch_size=100, lr=0.1, momentum=0.9, weight_decay=0.01)
    mean, state = trained(prefixes, start, settings=settings)
    assert mean == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, old), gradient in zip(start.items(), gradients, strict=True):
        torch.testing.assert_close(state[name], old - 0.1 * (gradient + 0.01 * old), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_a_step_is_clipped_to_the_norm(prefixes: Prefixes, start: State, share: float) -> None:
    """The limit is a share of the gradient's own norm; above 1 it changes nothing."""
    one_step = LocalTraining(epochs=1, batch_size=100, lr=1.0, momentum=0.0, weight_decay=0.0)

    def step(settings: LocalTraining) -> Tensor:
        state = trained(prefixes, start, settings=settings)[1]
        return torch.cat([(start[name] - tensor).flatten() for name, tensor in state.items()])

    free = step(one_step)
    clipped = step(replace(one_step, clip_norm=share * float(free.norm())))
    torch.testing.assert_close(clipped, min(1.0, share) * free, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lr", [1e30, float("nan")])
def test_training_that_diverges_is_reported(prefixes: Prefixes, start: State, lr: float) -> None:
    with pytest.raises(DivergedError):
        trained(prefixes, start, settings=replace(SETTINGS, lr=lr))


def test_a_last_step_that_breaks_a_parameter_is_reported(prefixes: Prefixes, start: State) -> None:
    """All losses are finite: the only step comes after the only loss."""
    with pytest.raises(DivergedError, match=r"parameter .* is not finite"):
        trained(prefixes, start, settings=replace(SETTINGS, epochs=1, batch_size=100, lr=float("inf")))


def test_every_epoch_sees_every_example_and_the_last_batch_is_smaller(prefixes: Prefixes, start: State) -> None:
    batches: list[Tensor] = []

    def loss(prefixes: Prefixes, images: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
        assert torch.equal(labels, (images[:, 0] > 0).long())
        batches.append(images)
        return OWN.loss(prefixes, images, labels, generator)

    trained(prefixes, start, objective=replace(OWN, loss=loss))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5] * 2
    everything = separable(1)[0].sort(dim=0).values
    epochs = torch.cat(batches[:5]), torch.cat(batches[5:])
    assert all(torch.equal(epoch.sort(dim=0).values, everything) for epoch in epochs)
    assert not torch.equal(*epochs)
