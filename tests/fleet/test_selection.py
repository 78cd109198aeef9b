"""Client selections: who is asked, and that a resumed run asks the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro import extend
from fedmaestro.errors import UserError
from fedmaestro.fleet.selection import SELECTIONS, History, Round, Selection, selected
from fedmaestro.runs.checkpoint import load_checkpoint

Federate = Callable[..., Any]


def round_of(devices: int, wanted: int, number: int = 1, seed: int = 0) -> Round:
    generator = np.random.default_rng(seed)
    return Round(
        number=number,
        wanted=wanted,
        tiers=generator.integers(3, size=devices),
        examples=generator.integers(1, 50, size=devices),
        seconds=generator.random(devices) + 0.1,
    )


@pytest.mark.parametrize("name", SELECTIONS)
@given(devices=st.integers(1, 30), seed=st.integers(0, 9), data=st.data())
def test_as_many_candidates_as_are_wanted(name: str, devices: int, seed: int, data: st.DataObject) -> None:
    candidates = np.array(sorted(data.draw(st.sets(st.integers(0, devices - 1), min_size=1))))
    wanted = data.draw(st.integers(0, len(candidates)))
    took_part = data.draw(st.dictionaries(st.integers(0, devices - 1), st.floats(0, 9)))
    history = History.empty(devices).after(3, took_part)
    this = round_of(devices, wanted, number=4, seed=seed)
    chosen = selected(SELECTIONS[name], this, candidates, history, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == wanted or not SELECTIONS[name].exact
    assert set(chosen) <= set(candidates.tolist())
    assert chosen == selected(SELECTIONS[name], this, candidates, history, seed)


def test_poisson_asks_every_device_by_itself() -> None:
    """As many as wanted of the whole fleet in expectation; who else can be reached makes no difference."""
    devices = 2000
    this = round_of(devices, 500)
    history, row = History.empty(devices), SELECTIONS["poisson"]
    counts = [len(selected(row, this, np.arange(devices), history, seed)) for seed in range(30)]
    assert np.mean(counts) == pytest.approx(500, abs=4 * np.sqrt(375 / 30))
    assert np.std(counts) == pytest.approx(np.sqrt(375), rel=0.5)
    some = np.arange(0, devices, 3)
    everybody = selected(row, this, np.arange(devices), history, 1)
    assert selected(row, this, some, history, 1) == sorted({*everybody} & {*some.tolist()})


def test_stratified_gives_each_tier_its_share() -> None:
    this = Round(
        number=1, wanted=10, tiers=np.repeat([0, 1, 2], [50, 30, 20]), examples=np.ones(100, int), seconds=np.ones(100)
    )
    for seed in range(5):
        chosen = selected(SELECTIONS["stratified"], this, np.arange(100), History.empty(100), seed)
        assert np.bincount(this.tiers[chosen]).tolist() == [5, 3, 2]


def test_power_of_choice_prefers_high_losses_and_oort_fast_useful_devices() -> None:
    history = History.empty(20).after(1, {device: float(device) for device in range(20)})
    this = Round(number=2, wanted=5, tiers=np.zeros(20, int), examples=np.ones(20, int), seconds=np.ones(20))
    drawn = [selected(SELECTIONS["power-of-choice"], this, np.arange(20), history, seed) for seed in range(40)]
    assert np.mean(drawn) > 12, "9.5 without a preference"
    drawn = [selected(SELECTIONS["oort"], this, np.arange(20), history, seed) for seed in range(40)]
    assert np.mean(drawn) > 12
    slow = Round(**{**vars(this), "seconds": np.where(np.arange(20) >= 17, 100.0, 1.0)})
    kept = [selected(SELECTIONS["oort"], slow, np.arange(20), history, seed) for seed in range(40)]
    assert np.mean([np.sum(np.array(x) >= 17) for x in kept]) < 0.5, "the three slow ones have the highest losses"


def test_oort_explores_the_fastest_first() -> None:
    seconds = np.arange(1.0, 21.0)
    this = Round(number=1, wanted=5, tiers=np.zeros(20, int), examples=np.ones(20, int), seconds=seconds)
    assert selected(SELECTIONS["oort"], this, np.arange(20), History.empty(20), 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [[1, 1], [0], [0, 1, 2], [0, 9]])
def test_what_user_code_returns_is_checked(bad: list[int]) -> None:
    row = Selection(name="mine", select=lambda *_: bad, summary="")
    with pytest.raises(UserError, match=r"train\.selection='mine' must return 2 different candidates in round 1"):
        selected(row, round_of(9, 2), np.arange(3), History.empty(9), 0)


def test_history_goes_into_the_checkpoint_and_a_resumed_run_selects_the_same(
    federate: Federate, tmp_path: Path
) -> None:
    seen: list[list[float]] = []

    def by_loss(this: Round, candidates: np.ndarray, history: History, generator: np.random.Generator) -> list[int]:
        seen.append(history.loss.tolist())
        return [int(i) for i in candidates[np.argsort(np.nan_to_num(history.loss[candidates]))][: this.wanted]]

    extend.selection("by-loss")(by_loss)
    overrides = {"train.selection": "by-loss", "train.rounds": 4}
    whole, folder, _ = federate(overrides)
    checkpoint = load_checkpoint(folder.checkpoint)
    assert checkpoint is not None
    times = checkpoint.tensors["history", "times"]
    assert int(times.sum()) == 40
    assert not np.isnan(seen[-1]).all()
    for name in ("uniform", "oort"):
        first, folder, _ = federate({"train.selection": name, "train.rounds": 4})
        assert first["failed"] == 0
    assert first["model_sha256"] != whole["model_sha256"]


def test_devices_without_examples_are_never_asked(federate: Federate) -> None:
    overrides = {"data.alpha": 0.02, "data.min-examples": 0, "data.devices": 40, "train.rounds": 3}
    summary, folder, grid = federate(overrides)
    assert summary["failed"] == 0
    from fedmaestro.config.experiment import load_config
    from fedmaestro.rounds.environment import open_environment

    env = open_environment(load_config(None, overrides))
    empty = {device for device, count in enumerate(env.parts.sizes) if not count}
    assert empty
    jobs = [message.content.config_records["job"] for message in grid.sent if message.metadata.message_type == "train"]
    asked = {device for job in jobs for device in job["devices"]}
    assert asked
    assert not asked & empty
    assert all(record.devices <= 10 for record in folder.read_rounds())
