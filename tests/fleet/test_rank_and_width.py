"""Submodels that cut channels together with ranks: nested, exact parts of the network, of the MACs they are given."""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedmaestro
from fedmaestro import lod
from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.tiers import FLEETS
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.width import part_of_rank
from fedmaestro.rounds.environment import open_environment
from fedmaestro.rounds.server import start
from fedmaestro.runs.model import load_model
from fedmaestro.submodel import cut, load

SHAPES = {"mlp": (1, 8, 8), "lenet": (1, 28, 28), "cnn": (3, 32, 32)}
BOTH, RANKS, WIDTHS = SubmodelRule(narrows=True), SubmodelRule(), SubmodelRule(form="dense")


def plan_of(model: str, rule: SubmodelRule = BOTH, *, match_macs: bool = False) -> Plan:
    architecture = Architecture(name=model, input_shape=SHAPES[model], num_classes=10, keep_dense="head")
    return make_plan(architecture, FLEETS["five-tiers"].tiers, rule, batch_size=16, match_macs=match_macs)


@pytest.mark.parametrize("power", [Fraction(0), Fraction(1, 4), Fraction(1)])
@pytest.mark.parametrize("match_macs", [False, True])
@pytest.mark.parametrize("model", SHAPES)
def test_tiers_are_nested_in_channels_and_ranks(model: str, match_macs: bool, power: Fraction) -> None:
    plan = plan_of(model, replace(BOTH, rank_power=power), match_macs=match_macs)
    for large, small in pairwise(plan.tiers):
        assert small.serves.cost.macs_per_example <= large.serves.cost.macs_per_example
        assert (small.serves.size.width or 0) <= (large.serves.size.width or 0)
        for name, shape in small.serves.shapes.items():
            assert all(a <= b for a, b in zip(shape, large.serves.shapes[name], strict=True)), name
    smallest = plan.tiers[-1].serves
    assert any(a < b for a, b in zip(smallest.shapes["fc1.v"], plan.full.shapes["fc1.v"], strict=True))


@pytest.mark.parametrize("model", SHAPES)
def test_macs_are_those_of_the_other_families(model: str) -> None:
    both, ranks, widths = (plan_of(model, rule, match_macs=True) for rule in (BOTH, RANKS, WIDTHS))
    for tier in both.tiers:
        macs = tier.serves.cost.macs_per_example
        for other in (ranks, widths):
            assert macs == pytest.approx(other.by_name(tier.tier.name).serves.cost.macs_per_example, rel=0.06)
    free = plan_of(model)
    for tier in free.tiers:
        limit = plan_of(model, RANKS).by_name(tier.tier.name).serves.cost.macs_per_example
        assert tier.serves.cost.macs_per_example <= limit


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_a_submodel_is_the_narrower_network_with_its_ranks(model: str) -> None:
    """Its function is that of a dense network whose weights are the products of the leading blocks."""
    plan = plan_of(model)
    state = plan.architecture.initial_state(0)
    tier = plan.tiers[2].serves
    module = plan.architecture.materialize(tier.size)
    load(module, cut(state, tier.shapes))
    dense = lod.recompose(module)
    images = torch.randn(3, *SHAPES[model], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.eval()(images), dense.eval()(images), rtol=1e-4, atol=1e-5)


@given(
    rank=st.integers(1, 500),
    width=st.fractions(Fraction(1, 500), 1, max_denominator=500),
    power=st.fractions(0, 4, max_denominator=20),
)
def test_a_width_leaves_the_integer_part_of_its_power_of_the_ranks(rank: int, width: Fraction, power: Fraction) -> None:
    part = part_of_rank(rank, width, power)
    exact = rank * float(width) ** float(power)
    assert part == pytest.approx(exact - 0.5, abs=0.5 + 1e-6)
    assert part_of_rank(rank, Fraction(1), power) == part_of_rank(rank, width, Fraction(0)) == rank


def test_an_exact_root_is_not_rounded_down() -> None:
    """1/16 to the power 1/4 is a half, whatever ``pow`` of the machine makes of it."""
    assert [part_of_rank(rank, Fraction(1, 16), Fraction(1, 4)) for rank in (2, 64, 120)] == [1, 32, 60]


@pytest.mark.parametrize("model", SHAPES)
def test_a_lower_power_cuts_fewer_ranks_and_more_channels(model: str) -> None:
    low, high = (plan_of(model, replace(BOTH, rank_power=Fraction(power))) for power in (0, 1))
    for tier in low.tiers[1:]:
        other = high.by_name(tier.tier.name).serves.size
        assert (tier.serves.size.width or 0) <= (other.width or 0)
    smallest = low.tiers[-1].serves.size
    assert smallest.width is not None
    assert smallest.width < (high.tiers[-1].serves.size.width or 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.submodel": "own"}, "train.rank-power=0.5 is for submodels with fewer channels and lower ranks"),
        ({"train.strategy": "heterofl"}, "use train.submodel=rank-and-width"),
        ({"ranks.rule": "learned"}, "those of train.submodel='own' have not both"),
    ],
)
def test_a_power_that_nothing_reads_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_environment(load_config(None, {"train.rank-power": 0.5, **settings}))


def test_a_wider_network_starts_as_nearly_the_narrower_one() -> None:
    """With a small start, inputs that few devices hold add little: without one, they are most of the outputs."""

    def gap(threshold: float) -> float:
        settings = {"train.strategy": "nested", "train.submodel": "rank-and-width", "server.tail-start": threshold}
        env = open_environment(load_config(None, {**settings, "data.devices": 100, "fleet.preset": "skewed"}))
        state, images = start(env).models[None], env.task.plain(torch.arange(64).numpy()).x
        outputs = []
        for tier in env.plan.tiers:
            module = env.plan.architecture.materialize(tier.serves.size)
            load(module, cut(state, tier.serves.shapes))
            outputs.append(module.eval()(images).detach())
        return float((outputs[0] - outputs[-1]).norm() / outputs[-1].norm())

    assert gap(10.0) < 0.3 * gap(0.0)


def test_a_run_and_its_artefacts(tmp_path: Path) -> None:
    settings = {"train.rounds": 3, "train.submodel": "rank-and-width", "train.evaluate-every": 3}
    run = fedmaestro.run(None, overrides=settings, out=tmp_path / "run", actors=0)
    for name, tier in run.summary["tiers"].items():
        assert set(tier["ranks"]) == {"width", "fc1", "fc2"}
        module = load_model(tmp_path / "run", name)
        assert sum(x.numel() for x in module.parameters()) == tier["params"]
