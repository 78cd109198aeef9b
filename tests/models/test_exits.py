"""Networks with early exits: names, sizes, functions, costs, objectives, artefacts and whole runs."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro.clients import OBJECTIVES
from fedmaestro.clients.base import Prefixes
from fedmaestro.config.experiment import load_config
from fedmaestro.deploy.extract import Target, extract
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import Cost, cost
from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.tiers import FLEETS, Tier
from fedmaestro.fleet.traces import trace_of
from fedmaestro.flower.run import Run
from fedmaestro.models import MODELS, example_inputs
from fedmaestro.models.architecture import Architecture, Scales, Size
from fedmaestro.models.exits import EXITS, Answer
from fedmaestro.rounds.device import resident_prefixes
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.training import LocalTraining
from fedmaestro.strategies import SUBMODELS
from fedmaestro.submodel import cut, load, state_of

Federate = Callable[..., Any]

SHAPES = {
    "mlp": (1, 8, 8),
    "lenet": (1, 28, 28),
    "cnn": (3, 16, 16),
    "conv": (1, 9, 8),
    "resnet18": (3, 8, 8),
    "vgg19": (3, 32, 32),
}
SMALL = ("mlp", "lenet", "cnn")
DEPTH, BOTH = SUBMODELS["depth"], SUBMODELS["width-depth"]


def architecture(name: str, scales: Scales = "depth", exits: Answer = "ensemble") -> Architecture:
    return Architecture(name=name, input_shape=SHAPES[name], num_classes=10, form="dense", scales=scales, exits=exits)


def images(arch: Architecture, count: int = 3) -> Tensor:
    return torch.randn(count, *arch.input_shape, generator=torch.Generator().manual_seed(0))


def cost_of(arch: Architecture, size: Size) -> Cost:
    return cost(trace_of(arch, size.width, size.depth), {}, batch_size=4)


def filled(arch: Architecture, size: Size) -> torch.nn.Module:
    model = arch.materialize(size)
    load(model, cut(arch.initial_state(0), arch.shapes(size)))
    return model


def test_every_model_with_blocks_is_tried() -> None:
    assert {name for name, spec in MODELS.items() if spec.blocks} == SHAPES.keys()


@pytest.mark.parametrize("scales", ["depth", "both"])
@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_leading_blocks_of_a_subset_of_tensors(name: str, scales: Scales) -> None:
    arch = architecture(name, scales)
    fractions = arch.fractions()
    sizes = [arch.shapes(arch.size_at(f)) for f in fractions[:: max(1, len(fractions) // 8)]] + [
        arch.shapes(arch.full_size)
    ]
    assert fractions[-1] == 1
    for small, large in pairwise(sizes):
        assert small.keys() <= large.keys()
        assert [x for x in large if x in small] == list(small)
        assert all(n <= m for x, shape in small.items() for n, m in zip(shape, large[x], strict=True))
    depths = [arch.size_at(f).depth for f in fractions]
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (1, len(arch.spec.blocks))


@pytest.mark.parametrize("name", SMALL)
def test_the_last_exit_is_the_plain_network_from_the_same_start(name: str) -> None:
    arch = architecture(name, exits="last")
    plain = replace(arch, scales="width", exits="none")
    model, x = filled(arch, arch.full_size).eval(), images(arch)
    reference = filled(plain, plain.full_size).eval()
    assert state_of(reference).keys() < state_of(model).keys()
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("name", SMALL)
def test_a_smaller_depth_has_the_same_exits(name: str) -> None:
    arch, x = architecture(name), images(architecture(name))
    whole = filled(arch, arch.full_size).train()(x)
    for depth in range(1, len(arch.spec.blocks) + 1):
        model = filled(arch, Size(depth=depth))
        trained = model.train()(x)
        assert len(trained[EXITS]) == depth
        for own, of_whole in zip(trained[EXITS], whole[EXITS], strict=False):
            torch.testing.assert_close(own, of_whole)
        mean = torch.stack(trained[EXITS]).mean(0)
        torch.testing.assert_close(trained["logits"], mean)
        torch.testing.assert_close(model.eval()(x), mean)


@pytest.mark.parametrize("scales", ["depth", "both"])
@pytest.mark.parametrize("name", SMALL)
def test_costs_are_those_that_pytorch_counts_and_grow(name: str, scales: Scales) -> None:
    arch = architecture(name, scales)
    fractions = arch.fractions()
    costs = []
    for fraction in fractions[:: max(1, len(fractions) // 5)]:
        size = arch.size_at(fraction)
        model = arch.measurable(size)
        with FlopCounterMode(display=False) as counter:
            model(*example_inputs(arch.inputs, 1))
        costs.append(cost_of(arch, size))
        assert costs[-1].macs_per_example == counter.get_total_flops() // 2
        assert costs[-1].upload_bytes == 4 * sum(x.numel() for x in state_of(arch.build(size)).values())
    for small, large in pairwise(costs):
        assert small.macs_per_example < large.macs_per_example
        assert small.params < large.params
        assert small.train_memory_bytes < large.train_memory_bytes


# ---------------------------------------------------------------- budgets


def planned(name: str, tiers: tuple[Tier, ...], rule: SubmodelRule, **more: Any) -> Plan:
    arch = Architecture(name=name, input_shape=SHAPES[name], num_classes=10)
    return make_plan(arch, tiers, rule, batch_size=16, **more)


@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("rule", [DEPTH, BOTH], ids=["depth", "both"])
def test_a_tier_gets_the_largest_size_that_its_ranks_macs_allow(rule: SubmodelRule, match: bool) -> None:
    tiers = FLEETS["five-tiers"].tiers
    plan, widths = (
        planned("cnn", tiers, rule, match_macs=match),
        planned("cnn", tiers, SubmodelRule(form="dense"), match_macs=match),
    )
    arch = plan.architecture
    sizes = [arch.size_at(f) for f in arch.fractions()]
    least = cost_of(arch, sizes[0]).macs_per_example
    ranks = planned("cnn", tiers, SubmodelRule())
    for tier in plan.tiers:
        limit = (widths if match else ranks).by_index(tier.index).serves.cost.macs_per_example
        allowed = [x for x in sizes if cost_of(arch, x).macs_per_example <= max(limit, least)]
        assert tier.serves.shapes == arch.shapes(allowed[-1])
    assert [x.serves.cost.params for x in plan.tiers] == sorted(
        (x.serves.cost.params for x in plan.tiers), reverse=True
    )


def test_a_budget_binds_where_a_rank_fraction_does_not() -> None:
    one = architecture("mlp")
    least = cost_of(one, Size(depth=1)).macs_per_example
    assert planned("mlp", (Tier(name="a", share=1.0, rank_fraction=0.01),), DEPTH).tiers[0].serves.size == Size(depth=1)
    with pytest.raises(UserError, match="cannot afford the smallest submodel"):
        planned("mlp", (Tier(name="a", share=1.0, macs=least - 1),), DEPTH)


def test_a_model_without_blocks_is_refused() -> None:
    settings = {"train.strategy": "depthfl", "model.name": "transformer-small", "data.name": "multi30k"}
    with pytest.raises(UserError):
        open_environment(load_config(None, settings))


# ---------------------------------------------------------------- objectives


def prefixes_of(depth: int) -> tuple[Prefixes, Tensor, Tensor]:
    arch = architecture("lenet")
    x, y = images(arch, 5), torch.tensor([0, 1, 2, 3, 4])
    return Prefixes(model=filled(arch, Size(depth=depth)).train(), num_classes=10), x, y


def gradients(loss: Tensor, prefixes: Prefixes) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(prefixes.parameters.values()), allow_unused=True, retain_graph=True))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depthfl_is_cross_entropy_and_the_mean_divergence_from_the_others(depth: int) -> None:
    prefixes, x, y = prefixes_of(depth)
    exits = prefixes.exits(x)
    loss = sum(F.cross_entropy(z, y) for z in exits)
    for i, own in enumerate(exits):
        for j, other in enumerate(exits):
            if i != j:
                log_p, q = own.log_softmax(1), other.detach().softmax(1)
                loss = loss + (q * (q.log() - log_p)).sum(1).mean() / (depth - 1)
    ours = OBJECTIVES["exit-distillation"].loss(prefixes, x, y, np.random.default_rng(0))
    assert isinstance(loss, Tensor)
    for own, expected in zip(gradients(ours, prefixes), gradients(loss, prefixes), strict=True):
        torch.testing.assert_close(own, expected)


def test_scalefl_weighs_exits_by_their_number() -> None:
    prefixes, x, y = prefixes_of(3)
    first, second, last = prefixes.exits(x)
    soft = last.detach().softmax(1)
    early = [(F.cross_entropy(z, y) + F.cross_entropy(z, soft)) / 2 for z in (first, second)]
    expected = (early[0] + 2 * early[1] + 3 * F.cross_entropy(last, y)) / 6
    ours = OBJECTIVES["exits-from-last"].loss(prefixes, x, y, np.random.default_rng(0))
    torch.testing.assert_close(ours, expected)


def test_any_objective_trains_a_network_with_exits() -> None:
    """``prefixes(x)`` is what the tier is served."""
    prefixes, x, y = prefixes_of(2)
    loss = OBJECTIVES["own-prefix"].loss(prefixes, x, y, np.random.default_rng(0))
    torch.testing.assert_close(loss, F.cross_entropy(torch.stack(prefixes.exits(x)).mean(0), y))


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(("strategy", "model"), [("depthfl", "mlp"), ("scalefl", "cnn")])
def test_what_a_run_leaves_is_what_it_evaluated(federate: Federate, tmp_path: Path, strategy: str, model: str) -> None:
    settings = {"train.strategy": strategy, "model.name": model, "train.per-tier": "head", "train.evaluate-every": 1}
    summary, folder, _ = federate(settings, nodes=2)
    for tier, facts in summary["tiers"].items():
        extracted = extract(folder.path, Target(tier=tier), out=tmp_path / tier)
        loaded, again = Run(folder.path).model(tier), extracted.model()
        assert state_of(loaded).keys() == state_of(again).keys()
        assert extracted.card["test_accuracy"] == pytest.approx(facts["final_accuracy"])
        assert extracted.card["params"] == facts["params"]


def test_a_budget_finds_ranks_of_the_whole_network(federate: Federate, tmp_path: Path) -> None:
    summary, folder, _ = federate({"train.strategy": "depthfl", "train.rounds": 1})
    budget = 0.8 * summary["tiers"]["flagship"]["macs_per_example"]
    smaller = extract(folder.path, Target(max_macs=budget), out=tmp_path / "budget", calibration=32)
    assert smaller.card["macs_per_example"] <= budget
    assert smaller.model()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("strategy", ["depthfl", "scalefl"])
def test_hosts_and_stacks_change_nothing(federate: Federate, strategy: str) -> None:
    settings = {"train.strategy": strategy, "train.rounds": 2, "server.optimizer": "adam"}
    one, _, _ = federate(settings, nodes=1)
    many, _, _ = federate(settings | {"train.cohort-size": 1}, nodes=3)
    assert one["model_sha256"] == many["model_sha256"]
    stacked, _, _ = federate(settings | {"train.stack": 4})
    for tier, facts in stacked["tiers"].items():
        assert facts["final_accuracy"] == pytest.approx(one["tiers"][tier]["final_accuracy"], abs=0.02)


def test_devices_of_all_depths_train_what_they_hold() -> None:
    env = open_environment(load_config(None, {"train.strategy": "depthfl", "model.name": "cnn"}))
    from fedmaestro.rounds.training import Draws, train_device

    settings = LocalTraining(epochs=1, batch_size=16, lr=0.05, momentum=0.0, weight_decay=0.0)
    state = env.plan.architecture.initial_state(0)
    for tier in env.plan.tiers:
        assert tier.trains is not None
        prefixes, start = resident_prefixes(env, env.plan, tier.trains), cut(state, tier.trains.shapes)
        batch = env.task.plain(env.parts[0])
        train_device(prefixes, start, env.method.objective, batch, settings, Draws(0, ()))
        assert prefixes.state.keys() == start.keys()
        assert all(not torch.equal(x, start[name]) for name, x in prefixes.state.items())


def test_a_card_with_an_odd_size_is_named(tmp_path: Path, federate: Federate) -> None:
    import json

    _, folder, _ = federate({"train.strategy": "depthfl", "train.rounds": 1})
    path = folder.path / "model.json"
    card = json.loads(path.read_text())
    assert card["tiers"]["low"] == {"depth": 1}
    for odd in ({"depth": 0}, {"depth": "2"}, {"depth": 99}):
        path.write_text(json.dumps(card | {"tiers": {**card["tiers"], "low": odd}}))
        with pytest.raises(UserError):
            Run(folder.path).model("low")


def test_widths_keep_their_fractions() -> None:
    assert architecture("cnn", "both").size_at(Fraction(1, 3)) == Size(width=Fraction(1, 3), depth=2)
    assert architecture("cnn", "depth").size_at(Fraction(3, 4)) == Size(depth=3)
