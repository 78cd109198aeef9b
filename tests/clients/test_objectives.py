"""Local objectives on a two-layer LoD net with three nested levels."""

from collections import Counter
from functools import cached_property

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Prefixes
from fedmaestro.submodel import shapes_of

RANKS = [{"0": 5, "2": 4}, {"0": 3, "2": 2}, {"0": 1, "2": 1}]
CLASSES = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return lod.factorize(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, CLASSES)))


def prefixes_of(model: nn.Module, levels: int = 3) -> Prefixes:
    meta = lod.truncate(model, {}).to("meta")
    templates = [lod.truncate(meta, ranks) for ranks in RANKS[1:levels]]
    smaller = [(template, shapes_of(template)) for template in templates]
    return Prefixes(model=model, smaller=smaller, num_classes=CLASSES)


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


class Recorder(Prefixes):
    """Prefixes that note which levels an objective runs, and with which logits."""

    @classmethod
    def of(cls, model: nn.Module, levels: int) -> "Recorder":
        return cls(model=model, smaller=prefixes_of(model, levels).smaller, num_classes=CLASSES)

    @cached_property
    def runs(self) -> list[int]:
        return []

    def __call__(self, images: Tensor, level: int = 0) -> Tensor:
        self.runs.append(level)
        return super().__call__(images, level)


def loss_of(
    name: str, prefixes: Prefixes, batch: tuple[Tensor, Tensor], generator: np.random.Generator | None = None
) -> Tensor:
    return OBJECTIVES[name].loss(prefixes, *batch, generator or np.random.default_rng(0))


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


# ---------------------------------------------------------------- Prefixes


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_computes_what_the_cut_model_does(model: nn.Module, batch: tuple[Tensor, Tensor], level: int) -> None:
    prefixes = prefixes_of(model)
    assert prefixes.levels == 3
    expected = lod.truncate(model, RANKS[level])(batch[0])
    torch.testing.assert_close(prefixes(batch[0], level), expected)
    others = [prefixes(batch[0], other) for other in range(3) if other != level]
    assert all(not torch.allclose(expected, other) for other in others)


def test_a_levels_gradient_touches_its_leading_block_only(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    prefixes_of(model)(batch[0], 1).square().sum().backward()
    for name, parameter in model.named_parameters():
        rank = RANKS[1][name.split(".")[0]]
        gradient = parameter.grad
        assert gradient is not None
        if name.endswith(".u"):
            assert gradient[:, :rank].any()
            assert not gradient[:, rank:].any()
        elif name.endswith(".v"):
            assert gradient[:rank].any()
            assert not gradient[rank:].any()


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_smallest_tier_minimises_the_cross_entropy(
    model: nn.Module, batch: tuple[Tensor, Tensor], name: str
) -> None:
    loss = loss_of(name, prefixes_of(model, levels=1), batch)
    assert loss.shape == ()
    assert torch.equal(loss, F.cross_entropy(model(batch[0]), batch[1]))


# ---------------------------------------------------------------- one by one


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ordered_prefixes_draws_every_level_equally_often(
    model: nn.Module, batch: tuple[Tensor, Tensor], levels: int
) -> None:
    prefixes, generator = Recorder.of(model, levels), np.random.default_rng(0)
    expected = [F.cross_entropy(prefixes_of(model)(batch[0], level), batch[1]) for level in range(levels)]
    draws = 300
    for _ in range(draws):
        loss = loss_of("ordered-prefixes", prefixes, batch, generator)
        assert torch.equal(loss, expected[prefixes.runs[-1]])
    counts = Counter(prefixes.runs)
    assert counts.keys() == set(range(levels))
    assert len(prefixes.runs) == draws
    assert all(abs(count - draws / levels) < 5 * draws**0.5 / 2 for count in counts.values())  # 5 σ


@pytest.mark.parametrize("name", ["paired-prefixes", "self-distillation", "mutual-distillation"])
def test_pairs_draw_every_smaller_level_equally_often(
    model: nn.Module, batch: tuple[Tensor, Tensor], name: str
) -> None:
    prefixes, generator = Recorder.of(model, levels=3), np.random.default_rng(0)
    for _ in range(300):
        loss_of(name, prefixes, batch, generator)
    counts = Counter(prefixes.runs)
    assert counts[0] == 300
    assert counts.keys() == {0, 1, 2}
    assert abs(counts[1] - 150) < 5 * 300**0.5 / 2  # 5 σ


def test_self_distillation_teaches_the_smaller_level_soft_targets(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    prefixes = prefixes_of(model, levels=2)
    targets = model(batch[0]).softmax(dim=1)
    soft = -(targets * prefixes(batch[0], 1).log_softmax(dim=1)).sum(dim=1).mean()
    expected = F.cross_entropy(model(batch[0]), batch[1]) + soft
    torch.testing.assert_close(loss_of("self-distillation", prefixes, batch), expected)


def distillation_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of the soft term alone: the objective's gradient less that of the own cross-entropy."""
    both = gradients(loss_of("self-distillation", prefixes_of(model, levels=2), batch), model)
    own = gradients(F.cross_entropy(model(batch[0]), batch[1]), model)
    return {name: both[name] - own[name] for name in both}


def test_self_distillation_gives_the_teacher_no_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    fixed = model(batch[0]).detach().softmax(dim=1)

    def through(targets: Tensor) -> dict[str, Tensor]:
        return gradients(F.cross_entropy(prefixes_of(model, levels=2)(batch[0], 1), targets), model)

    actual, expected = distillation_gradients(model, batch), through(fixed)
    leaky = through(model(batch[0]).softmax(dim=1))
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(actual[name], leaky[name], rtol=1e-4, atol=1e-6) for name in actual)
