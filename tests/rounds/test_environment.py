"""What an experiment's settings make of data, devices and tiers."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fedmaestro
from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.rounds.environment import open_environment


def test_dynamic_tiers_are_drawn_anew_by_the_tiers_shares() -> None:
    fixed = open_environment(load_config(None, {"data.devices": 60, "fleet.preset": "skewed"}))
    dynamic = open_environment(
        load_config(None, {"data.devices": 60, "fleet.preset": "skewed", "fleet.assignment": "dynamic"})
    )
    assert np.array_equal(fixed.tiers_in(1), fixed.tiers_in(2))
    drawn = [dynamic.tiers_in(number) for number in range(1, 201)]
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(dynamic.tiers_in(1), drawn[0])
    shares = np.bincount(np.concatenate(drawn), minlength=4) / (200 * 60)
    # 12,000 draws: a share has a standard deviation of at most 0.0045.
    assert np.abs(shares - [0.05, 0.10, 0.25, 0.60]).max() < 0.02


def test_a_run_with_dynamic_tiers_counts_who_trained_what(tmp_path: Path) -> None:
    run = fedmaestro.run(
        None,
        overrides={"train.rounds": 6, "data.devices": 10, "fleet.assignment": "dynamic", "train.evaluate-every": 6},
        out=tmp_path / "run",
        actors=0,
    )
    sampled: Counter[str] = Counter()
    for record in run.rounds:
        sampled.update({tier: counts.sampled for tier, counts in record.updates.items()})
    assert sum(sampled.values()) == 60
    # With ten devices of fixed tiers, all of them in each round, each tier would have trained twice a round.
    assert set(sampled.values()) != {12}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train.strategy": "scaffold"}, "train.correction=scaffold"),
        ({"data.device-test": 0.2}, "data.device-test"),
        ({"fleet.attack": "sign-flip", "fleet.attack-tiers": "low"}, "fleet.attack-tiers"),
    ],
)
def test_what_belongs_to_a_devices_tier_is_refused_with_dynamic_ones(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"fleet.assignment=dynamic .* {named}"):
        open_environment(load_config(None, {"fleet.assignment": "dynamic", **settings}))


def test_unit_pixels_are_between_0_and_1() -> None:
    env = open_environment(load_config(None, {"data.normalize": "unit"}))
    pixels = env.task.plain(np.arange(200)).x[0]
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert env.task.facts == {"mean": [0.0], "std": [1.0]}


def test_a_narrower_network_is_its_own_artefact(tmp_path: Path) -> None:
    settings = {"train.rounds": 1, "model.width": 0.25, "train.strategy": "fedavg-small", "fleet.preset": "uniform"}
    run = fedmaestro.run(None, overrides=settings, out=tmp_path / "run", actors=0)
    (tier,) = run.summary["tiers"].values()
    model = run.model("device")
    assert sum(x.numel() for x in model.parameters()) == tier["params"] < 5000
