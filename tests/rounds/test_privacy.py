"""Differential privacy: what one device can change, the noise that hides it, and what is said of it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

import fedmaestro
from fedmaestro import extend
from fedmaestro.errors import UntrainedError, UserError
from fedmaestro.fleet.selection import Selection
from fedmaestro.flower.client_app import app as sound
from fedmaestro.report import write_report
from fedmaestro.rounds.privacy import Privacy
from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.submodel import Shapes, State, cut, leading_block

SMALL: dict[str, Any] = {
    "train.strategy": "nested",
    "train.selection": "poisson",
    "data.devices": 20,
    "train.devices-per-round": 8,
    "train.rounds": 4,
    "train.evaluate-every": 2,
    "model.name": "mlp",
    "privacy.noise-multiplier": 0.8,
    "privacy.clip-norm": 0.5,
}
RANKS = (2, 5)


def privacy(**more: Any) -> Privacy:
    return Privacy(**{"noise_multiplier": 1.0, "clip_norm": 0.5, "delta": 1e-5, "rate": 0.1, "seed": 0} | more)


def shapes(rank: int) -> Shapes:
    return {"fc.u": (6, rank), "fc.v": (rank, 4), "fc.bias": (6,)}


def drawn(rank: int, generator: torch.Generator, scale: float = 1.0) -> State:
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes(rank).items()}


def length(left: State, right: State) -> float:
    return math.sqrt(sum(float((x.double() - right[name].double()).square().sum()) for name, x in left.items()))


def expected(holders: dict[int, float], like: State) -> State:
    """``W`` of each entry where so many devices have each rank."""
    total = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in like.items()}
    for rank, devices in holders.items():
        for name, shape in shapes(rank).items():
            leading_block(total[name], shape).add_(devices)
    return total


@given(
    scale=st.sampled_from([0.0, 1e-3, 0.05, 1.0, 1e4]), clip=st.sampled_from([1e-3, 0.5, 10.0]), seed=st.integers(0, 99)
)
def test_no_update_is_longer_than_the_clip_norm(scale: float, clip: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = drawn(5, generator)
    moved = drawn(5, generator, scale)
    trained = {name: x + moved[name] for name, x in start.items()}
    sent = privacy(clip_norm=clip).clipped(trained, start)
    assert length(sent, start) <= clip * (1 + 1e-6)
    if length(trained, start) < clip * 0.999:
        assert all(torch.equal(x, trained[name]) for name, x in sent.items())
    else:
        assert length(sent, start) >= clip * 0.999 - 1e-4
        direction = {name: (sent[name] - x).double() for name, x in start.items()}
        whole = {name: (trained[name] - x).double() for name, x in start.items()}
        dot = sum(float((direction[name] * whole[name]).sum()) for name in start)
        assert dot >= 0.99 * length(sent, start) * length(trained, start) - 1e-6


@given(
    ranks=st.lists(st.sampled_from(RANKS), max_size=6),
    more=st.sampled_from(RANKS),
    scale=st.sampled_from([0.01, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_one_device_changes_the_sum_by_the_clip_norm_at_most(
    ranks: list[int], more: int, scale: float, seed: int
) -> None:
    """The law behind ε: on any fleet of nested submodels, whatever the device has learnt."""
    generator = torch.Generator().manual_seed(seed)
    mechanism, before = privacy(), drawn(5, generator)
    divisor = expected({2: 3.0, 5: 0.7}, before)
    agg = AGGREGATIONS["coverage-mean"]
    partials = []
    for extra in ([], [more]):
        devices = torch.Generator().manual_seed(seed + 1)
        partial = agg.init(before)
        for rank in [*ranks, *extra]:
            start = cut(before, shapes(rank))
            moved = drawn(rank, devices, scale)
            partial = agg.add(partial, mechanism.clipped({n: x + moved[n] for n, x in start.items()}, start), 1.0)
        partials.append(partial)
    without, with_it = (mechanism.released(partial, before, divisor, 3) for partial in partials)
    change = math.sqrt(
        sum(float(((with_it[n].double() - without[n].double()) * divisor[n]).square().sum()) for n in before)
    )
    assert change <= mechanism.clip_norm * (1 + 1e-4)


def test_noise_of_each_block_follows_the_devices_that_hold_it() -> None:
    before = {"fc.u": torch.zeros(2000, 5), "fc.v": torch.zeros(5, 2000), "fc.bias": torch.zeros(2000)}
    counts = expected({2: 8.0, 5: 2.0}, {name: torch.zeros(shape) for name, shape in shapes(5).items()})
    divisor = {
        "fc.u": counts["fc.u"][:1].expand(2000, 5),
        "fc.v": counts["fc.v"][:, :1].expand(5, 2000),
        "fc.bias": torch.full((2000,), 10.0),
    }
    agg = AGGREGATIONS["coverage-mean"]
    new = privacy(noise_multiplier=2.0, clip_norm=3.0).released(agg.init(before), before, divisor, 1)
    for block, devices in (
        (new["fc.u"][:, :2], 10.0),
        (new["fc.u"][:, 2:], 2.0),
        (new["fc.v"][:2], 10.0),
        (new["fc.v"][2:], 2.0),
        (new["fc.bias"], 10.0),
    ):
        assert float(block.std()) == pytest.approx(6.0 / devices, rel=0.06)
        assert float(block.mean()) == pytest.approx(0, abs=4 * 6.0 / devices / math.sqrt(block.numel()))
    again = privacy(noise_multiplier=2.0, clip_norm=3.0)
    assert torch.equal(again.released(agg.init(before), before, divisor, 1)["fc.u"], new["fc.u"])
    assert not torch.equal(again.released(agg.init(before), before, divisor, 2)["fc.u"], new["fc.u"])


def test_what_nobody_sends_has_no_noise() -> None:
    before = drawn(5, torch.Generator().manual_seed(0))
    divisor = {name: x for name, x in expected({2: 1.0}, before).items() if name != "fc.bias"}
    new = privacy().released(AGGREGATIONS["coverage-mean"].init(before), before, divisor, 1)
    assert torch.equal(new["fc.bias"], before["fc.bias"])
    assert torch.equal(new["fc.v"][2:], before["fc.v"][2:])
    assert not torch.equal(new["fc.v"][:2], before["fc.v"][:2])


def test_epsilon_is_that_of_opacus_and_a_bound() -> None:
    pytest.importorskip("opacus")
    from opacus.accountants import PRVAccountant, RDPAccountant

    mechanism = privacy(noise_multiplier=1.1, rate=0.05)
    assert mechanism.epsilon(0) == 0
    values = [mechanism.epsilon(rounds) for rounds in (1, 10, 100, 1000)]
    assert values == sorted(values)
    rdp, prv = RDPAccountant(), PRVAccountant()
    for _ in range(100):
        rdp.step(noise_multiplier=1.1, sample_rate=0.05)
        prv.step(noise_multiplier=1.1, sample_rate=0.05)
    assert values[2] == pytest.approx(rdp.get_epsilon(1e-5), rel=1e-9)
    assert prv.get_epsilon(1e-5) <= values[2] <= 1.5 * prv.get_epsilon(1e-5)
    # All devices in every round: zero-concentrated privacy of T / 2 z² (Bun and Steinke, 1605.02065, Proposition 1.3).
    rho = 40 / (2 * 5.0**2)
    bound = rho + 2 * math.sqrt(rho * math.log(1e5))
    assert 0.8 * bound <= privacy(noise_multiplier=5.0, rate=1.0).epsilon(40) <= bound


def test_a_private_run_says_what_it_has_spent(tmp_path: Path) -> None:
    run = fedmaestro.run(overrides=SMALL, out=tmp_path / "r", actors=0)
    epsilons = [record.epsilon for record in run.rounds]
    assert epsilons[0] is None
    spent = [x for x in epsilons if x is not None]
    assert spent == sorted(spent)
    assert len(spent) == 4
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["epsilon"], summary["delta"]) == (spent[-1], 0.1 / 20)
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert f"ε = {spent[-1]:.3g} at δ = 0.005" in page
    assert "Privacy spent (ε)" in page
    assert len({record.devices for record in run.rounds[1:]}) > 1, "as many as Poisson draws"


def test_a_comparison_shows_epsilon(tmp_path: Path) -> None:
    compared = fedmaestro.compare(
        None,
        ["private:nested", "open:nested+privacy.noise-multiplier=0.0"],
        1,
        overrides={k: x for k, x in SMALL.items() if k != "train.strategy"},
        out=tmp_path / "c",
        actors=0,
    )
    private, open_ = compared.results["strategies"]
    assert private["epsilon"] > 0
    assert open_["epsilon"] is None
    head, _, *rows = [line for line in (compared.path / "table.md").read_text().splitlines() if line.startswith("|")][
        :4
    ]
    assert "Privacy ε" in head
    assert f"{private['epsilon']:.3g}" in rows[0]


def test_a_private_run_is_the_same_whoever_does_the_work(tmp_path: Path) -> None:
    models = [
        fedmaestro.run(overrides=SMALL | more, out=tmp_path / str(i), actors=0).summary["model_sha256"]
        for i, more in enumerate(({}, {"train.cohort-size": 1}, {"privacy.noise-multiplier": 0.9}))
    ]
    assert models[0] == models[1] != models[2]


def test_a_round_without_devices_is_as_noisy_as_any(tmp_path: Path) -> None:
    """That nobody took part is private too."""
    few = SMALL | {
        "train.devices-per-round": 1,
        "train.rounds": 8,
        "train.evaluate-every": 1,
        "privacy.clip-norm": 50.0,
    }
    run = fedmaestro.run(overrides=few, out=tmp_path / "r", actors=0)
    empty = [record.round for record in run.rounds[1:] if not record.devices]
    assert empty
    by_round = {record.round: record.tiers["flagship"]["loss"] for record in run.rounds}
    assert all(by_round[number] != by_round[number - 1] for number in empty)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.selection": "uniform"}, "train.selection=poisson"),
        ({"fleet.over-commit": 1.5}, "fleet.over-commit=1"),
        ({"train.aggregation": "zero-pad"}, "train.aggregation=coverage-mean"),
        ({"train.aggregation": "coordinate-median"}, "train.aggregation=coverage-mean"),
        ({"train.strategy": "scaffold", "server.reorder-every": "never"}, "train.correction=none"),
        ({"train.strategy": "heterofl", "train.aggregation": "coverage-mean"}, "model.norm=group"),
        ({"train.reply-timeout-seconds": 60.0}, "train.reply-timeout-seconds=none"),
        ({"ranks.shrink-threshold": 0.1, "ranks.shrink-every": 2}, "ranks.shrink-threshold=0"),
        ({"server.tail-decay": 0.1}, "server.tail-decay=0"),
    ],
)
def test_settings_that_would_leak_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"privacy\.noise-multiplier=0\.8 needs") as error:
        fedmaestro.run(overrides=SMALL | changes, out=tmp_path / "r", actors=0)
    assert said in str(error.value)
    assert not (tmp_path / "r").exists()


def test_without_opacus_there_is_an_error_and_no_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UserError, match=r"pip install 'fedmaestro\[privacy\]'"):
        fedmaestro.run(overrides=SMALL, out=tmp_path / "r", actors=0)


def test_models_of_their_own_and_other_settings_have_noise_of_their_own() -> None:
    """Where two have the same, the difference of what is released is without."""
    before = drawn(5, torch.Generator().manual_seed(0))
    empty, divisor = AGGREGATIONS["coverage-mean"].init(before), expected({5: 2.0}, before)
    one = privacy(settings="a").released(empty, before, divisor, 1, "low")["fc.u"] - before["fc.u"]
    for other in (
        privacy(settings="a").released(empty, before, divisor, 1, "high"),
        privacy(settings="a").released(empty, before, divisor, 2, "low"),
        privacy(settings="b").released(empty, before, divisor, 1, "low"),
        privacy(settings="a", seed=1).released(empty, before, divisor, 1, "low"),
    ):
        moved = (other["fc.u"] - before["fc.u"]).flatten()
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), moved]))[0, 1])) < 0.6


def test_the_server_sees_to_the_clip_norm_itself(tmp_path: Path) -> None:
    """What hosts send is longer than agreed: it does not count."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = sound(message, context)
        sums = reply.content.array_records["sums"]
        for name in list(sums):
            sums[name] = Array(sums[name].numpy() + 0.1)
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return sound(message, context)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return sound(message, context)

    with pytest.raises(UntrainedError) as error:
        fedmaestro.run(overrides=SMALL, out=tmp_path / "r", actors=0, client_app=app)
    kinds = json.loads((error.value.path / "summary.json").read_text())["failed_by"]
    assert list(kinds) == ["too-large"]


def test_steps_of_a_users_own_see_nothing_of_the_devices(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    @extend.server_step("peek")
    def peek(state: State, memory: Any, server_round: Any) -> Any:
        seen.append((server_round.partial.devices, float(server_round.contributors["fc3.bias"].max())))
        return state, memory

    fedmaestro.run(overrides=SMALL | {"server.steps": "optimizer peek"}, out=tmp_path / "r", actors=0)
    assert seen == [(0, 8.0)] * 4, "eight devices in expectation"


def test_another_selection_is_no_poisson_sampling(tmp_path: Path) -> None:
    own = Selection(name="by-size", select=lambda _round, candidates, *_: candidates[:3], exact=False, summary="")
    extend.selection("by-size")(own)
    with pytest.raises(UserError, match=r"needs train\.selection=poisson"):
        fedmaestro.run(overrides=SMALL | {"train.selection": "by-size"}, out=tmp_path / "r", actors=0)


def test_idle_rounds_do_not_end_a_private_run(tmp_path: Path) -> None:
    few = SMALL | {"train.devices-per-round": 1, "train.rounds": 12, "train.max-idle-rounds": 1}
    run = fedmaestro.run(overrides=few, out=tmp_path / "r", actors=0)
    assert [record.round for record in run.rounds] == list(range(13))
    assert 0 in [record.devices for record in run.rounds[1:]]


@pytest.mark.parametrize("row", ["fedmaestro", "exclusive-tier", "alternating", "fjord"])
def test_rows_that_average_entries_can_be_private(row: str, tmp_path: Path) -> None:
    run = fedmaestro.run(overrides=SMALL | {"train.strategy": row, "train.rounds": 2}, out=tmp_path / "r", actors=0)
    assert run.summary["epsilon"] > 0
    assert np.isfinite(run.summary["mean_tier_accuracy"])
