"""Submodels of the largest weights: masks, gradients, costs, and whole runs."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.tiers import FLEETS, Tier
from fedmaestro.flower.run import Run
from fedmaestro.models.architecture import Architecture, Size
from fedmaestro.models.masks import kept_count, kept_weights, maskable, masked, threshold_of
from fedmaestro.rounds import storage
from fedmaestro.rounds.device import resident_prefixes
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.server import start
from fedmaestro.rounds.training import Draws, local_training, train_device
from fedmaestro.runs.model import read_card
from fedmaestro.strategies import SUBMODELS
from fedmaestro.submodel import State, state_of

Federate = Callable[..., Any]
FIARSE = {"train.strategy": "fiarse"}


def weights(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (3, 5, 2, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def entries(state: State) -> Tensor:
    return torch.cat([x.flatten() for x in state.values() if maskable(x.shape)])


@given(seed=st.integers(0, 100), few=st.fractions(0, 1), many=st.fractions(0, 1))
def test_masks_are_nested_and_keep_the_largest(seed: int, few: Fraction, many: Fraction) -> None:
    state, (few, many) = weights(seed), sorted((few, many))
    small, large = masked(state, few), masked(state, many)
    for share, own in ((few, small), (many, large)):
        kept = entries(own) != 0
        assert int(kept.sum()) == kept_count(95, share)
        assert bool(kept.all()) or entries(state)[kept].abs().min() > entries(state)[~kept].abs().max()
        assert torch.equal(entries(own)[kept], entries(state)[kept])
        assert torch.equal(own["a.bias"], state["a.bias"])
        assert threshold_of(own) == float(entries(state)[kept].abs().min())
    assert bool((entries(large)[entries(small) != 0] != 0).all())


def test_the_gradient_is_the_straight_through_one() -> None:
    w = torch.tensor([[-2.0, -0.5], [0.25, 1.0]], requires_grad=True)
    above = torch.tensor([[3.0, -5.0], [7.0, 11.0]])
    out = kept_weights(w, 0.5)
    assert torch.equal(out, torch.tensor([[-2.0, -0.5], [0.0, 1.0]]))
    out.backward(above)
    factors = [1 + 2 * 0.5 * x / (x + 0.5) ** 2 for x in (2.0, 0.5, 1.0)]
    torch.testing.assert_close(w.grad, torch.tensor([[3 * factors[0], -5 * factors[1]], [0.0, 11 * factors[2]]]))
    plain = torch.randn(3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(kept_weights(plain, 0.0).square().sum(), plain)
    torch.testing.assert_close(gradient, 2 * plain)


def test_a_device_moves_its_own_entries_only() -> None:
    env = open_environment(load_config(None, FIARSE))
    server = start(env)
    tier = env.plan.by_name("low")
    assert tier.trains is not None
    sent = storage.download(env.plan, server.models, tier.trains)
    assert sum(x.numel() - int((x == 0).sum()) for x in sent.values() if maskable(x.shape)) == (
        tier.trains.cost.params - sum(x.numel() for x in sent.values() if not maskable(x.shape))
    )
    prefixes = resident_prefixes(env, env.plan, tier.trains)
    batch = env.task.plain(env.parts[0])
    train_device(prefixes, sent, env.method.objective, batch, local_training(env, 1), Draws(0, ()))
    for name, tensor in prefixes.state.items():
        if maskable(tensor.shape):
            assert torch.equal(tensor[sent[name] == 0], sent[name][sent[name] == 0])
            assert not torch.equal(tensor, sent[name])


def planned(tiers: tuple[Tier, ...]) -> Plan:
    architecture = Architecture(name="mlp", input_shape=(1, 8, 8), num_classes=10)
    return make_plan(architecture, tiers, SUBMODELS["entries"], batch_size=16)


def test_it_saves_traffic_and_nothing_else() -> None:
    plan, all_entries = planned(FLEETS["five-tiers"].tiers), 8192 + 16384 + 1280
    ranks = make_plan(
        Architecture(name="mlp", input_shape=(1, 8, 8), num_classes=10),
        FLEETS["five-tiers"].tiers,
        SUBMODELS["own"],
        batch_size=16,
    )
    for large, small in pairwise(plan.tiers):
        assert large.serves.cost.params > small.serves.cost.params
        assert large.serves.cost.upload_bytes > small.serves.cost.upload_bytes
        assert large.serves.cost.macs_per_example == small.serves.cost.macs_per_example == all_entries
        assert large.serves.cost.train_memory_bytes == small.serves.cost.train_memory_bytes
    for tier in plan.tiers:
        cost, own = tier.serves.cost, ranks.by_index(tier.index).serves.cost
        assert cost.params <= own.params
        assert cost.upload_bytes == 4 * cost.params
        places = 0 if tier.serves.size == Size(share=Fraction(1)) else all_entries // 8
        assert cost.download_bytes == 4 * cost.params + places


def test_budgets_bind_all_the_same() -> None:
    with pytest.raises(UserError, match="cannot afford the smallest submodel: macs 25,855"):
        planned((Tier(name="a", share=1.0, macs=25_855),))
    (tier,) = planned((Tier(name="a", share=1.0, round_bytes=60_000),)).tiers
    assert 59_000 < tier.serves.cost.download_bytes + tier.serves.cost.upload_bytes <= 60_000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train.aggregation": "coverage-mean"}, "coverage-mean' takes zeros for weights.*entry-mean"),
        ({"train.objective": "self-distillation"}, "trains smaller tiers' submodels too"),
        ({"train.correction": "scaffold"}, "tensors that devices hold as a whole"),
        ({"train.weight-decay": 0.1}, "train.weight-decay=0.1 moves the entries"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_environment(load_config(None, FIARSE | settings))


def test_a_tier_is_served_its_mask_of_what_the_server_has(federate: Federate) -> None:
    summary, folder, _ = federate(FIARSE | {"train.per-tier": "bias head", "server.optimizer": "momentum"})
    sizes = read_card(folder.path).tiers
    for tier, facts in summary["tiers"].items():
        state = state_of(Run(folder.path).model(tier))
        kept = entries(state) != 0
        assert int(kept.sum()) == kept_count(kept.numel(), sizes[tier].share or Fraction(1))
        assert facts["params"] == int(kept.sum()) + 128 + 128 + 10
    again, _, _ = federate(FIARSE | {"train.per-tier": "bias head", "server.optimizer": "momentum"}, nodes=3)
    assert again["model_sha256"] == summary["model_sha256"]


def test_devices_are_not_stacked(federate: Federate) -> None:
    plain, _, _ = federate(FIARSE | {"train.rounds": 1})
    stacked, _, _ = federate(FIARSE | {"train.rounds": 1, "train.stack": 4})
    assert plain["model_sha256"] == stacked["model_sha256"]
