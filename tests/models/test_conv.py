"""HeteroFL's convolutional network and widths of the whole model: the parameter counts of its table, exactly.

Golden values: HeteroFL (2010.01264), table of MNIST, levels a to e; the mean over levels of its modes is that of these.
"""

from fractions import Fraction

import pytest

from fedmaestro.fleet.plan import make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.tiers import FLEETS, Tier
from fedmaestro.models.architecture import Architecture

PARAMETERS = {"a": 1_556_874, "b": 391_370, "c": 98_922, "d": 25_274, "e": 6_594}
WIDTHS = {name: Fraction(1, 2**i) for i, name in enumerate("abcde")}


def architecture(width: Fraction = Fraction(1)) -> Architecture:
    return Architecture(
        name="conv", input_shape=(1, 28, 28), num_classes=10, form="dense", norm="static", scaler=True, width=width
    )


def test_the_tiers_of_the_preset_are_the_papers_levels() -> None:
    plan = make_plan(
        Architecture(name="conv", input_shape=(1, 28, 28), num_classes=10, norm="static"),
        FLEETS["five-widths"].tiers,
        SubmodelRule(form="dense"),
        batch_size=10,
    )
    assert {tier.tier.name: tier.serves.cost.params for tier in plan.tiers} == PARAMETERS


@pytest.mark.parametrize("level", PARAMETERS)
def test_a_narrower_whole_network_is_a_level_of_its_own(level: str) -> None:
    whole = architecture(WIDTHS[level])
    assert whole.shapes(whole.full_size) == architecture().shapes(architecture().size_at(WIDTHS[level]))
    assert sum(x.numel() for x in whole.full.parameters()) == PARAMETERS[level]


def test_levels_of_a_narrower_network_are_parts_of_it() -> None:
    tiers = (Tier(name="d", share=0.5, width=1.0), Tier(name="e", share=0.5, width=0.5))
    d = Architecture(name="conv", input_shape=(1, 28, 28), num_classes=10, norm="static", width=WIDTHS["d"])
    plan = make_plan(d, tiers, SubmodelRule(form="dense"), batch_size=10)
    assert [tier.serves.cost.params for tier in plan.tiers] == [PARAMETERS["d"], PARAMETERS["e"]]


def test_rank_models_get_the_macs_of_a_tiers_width() -> None:
    ranked = Architecture(name="cnn", input_shape=(3, 32, 32), num_classes=10)
    dense = Architecture(name="cnn", input_shape=(3, 32, 32), num_classes=10, form="dense")
    tiers = (Tier(name="large", share=0.5), Tier(name="half", share=0.5, width=0.5))
    plan = make_plan(ranked, tiers, SubmodelRule(), batch_size=10)
    wide = make_plan(dense, tiers, SubmodelRule(form="dense"), batch_size=10)
    assert plan.by_name("half").serves.cost.macs_per_example <= wide.by_name("half").serves.cost.macs_per_example
    assert plan.by_name("large").serves.size == ranked.full_size
