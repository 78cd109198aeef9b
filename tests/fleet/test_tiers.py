"""Fleets: presets, files, who gets which tier, and the largest size that fits a budget."""

import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmaestro.errors import UserError
from fedmaestro.fleet.budgets import TRAINING_SHARE_OF_RAM, exact, fit, within_ranks
from fedmaestro.fleet.cost import Cost
from fedmaestro.fleet.tiers import Tier, assign_tiers, load_tiers


def make_cost(macs: int = 1, memory: int = 1, traffic: int = 2) -> Cost:
    return Cost(
        params=1,
        macs_per_example=macs,
        train_macs_per_example=3 * macs,
        train_memory_bytes=memory,
        activation_bytes=0,
        download_bytes=traffic // 2,
        upload_bytes=traffic - traffic // 2,
    )


# Presets


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown fleet\.preset 'five-tier': did you mean 'five-tiers'\?"):
        load_tiers("five-tier")


# Files


@pytest.fixture
def fleet_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "fleet.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_file_replaces_the_preset(fleet_file: Callable[[str], str]) -> None:
    file = fleet_file(
        "[tiers.big]\nshare = 0.25\nmacs-fraction = 0.5\navailability = 0.1\n"
        "[tiers.small]\nshare = 0.75\nram-bytes = 1_000_000\nround-bytes = 5\nmacs = 7\nupload-kbps = 12\n"
    )
    assert load_tiers("no such preset", file) == (
        Tier(name="big", share=0.25, macs_fraction=0.5, availability=0.1),
        Tier(name="small", share=0.75, ram_bytes=1_000_000, round_bytes=5, macs=7, upload_kbps=12),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tiers.a]\nshare = 1\nrank-fractoin = 0.5", ["tiers.a.rank-fractoin", "0.5"]),
        ("[tiers.a]\nshare = 1\nrank-fraction = 1.5", ["tiers.a.rank-fraction", "1.5"]),
        ("[tiers.a]\nshare = 0", ["tiers.a.share", "got 0"]),
        ("[tiers.a]\nshare = 1\nspeed = nan", ["tiers.a.speed", "nan"]),
        ("[tiers.a]\nshare = 1\nspeed = 'fast'", ["tiers.a.speed", "'fast'"]),
        ("[tiers.a]\nrank-fraction = 1", ["tiers.a.share", "required"]),
        ("[tiers.a]\nshare = 0.5\n[tiers.b]\nshare = 0.4", ["sum to 0.9"]),
        ("[tiers.a]\nshare = 0.5\n[tiers.b]\nshare = 0.6", ["sum to 1.1"]),
        ("", ["no tier", "[tiers.NAME]"]),
        ("tiers = 5", ["no tier"]),
        ("[tiers]", ["no tier"]),
        ("[tiers.a\nshare = 1", ["not valid TOML"]),
    ],
)
def test_file_error_names_the_place(fleet_file: Callable[[str], str], text: str, said: list[str]) -> None:
    file = fleet_file(text)
    with pytest.raises(UserError) as error:
        load_tiers("five-tiers", file)
    message = str(error.value)
    assert "\n" not in message
    for part in [*said, file]:
        assert part in message


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_bytes(b"\xef\xbb\xbf[tiers.all]\nshare = 1.0\n")
    assert [tier.name for tier in load_tiers("", str(file))] == ["all"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fleet\.file.*nowhere\.toml"):
        load_tiers("five-tiers", str(tmp_path / "nowhere.toml"))


# Who gets which tier

# Multiples of 1/64 are exact in floating point, and so is their product with the number of devices.
SHARES = st.lists(st.integers(1, 20), min_size=1, max_size=6).map(lambda parts: [*parts, 64 - sum(parts)])


def largest_remainder(parts: list[int], num_devices: int) -> list[int]:
    exact_counts = [Fraction(part * num_devices, 64) for part in parts]
    counts = [math.floor(x) for x in exact_counts]
    order = sorted(range(len(parts)), key=lambda i: (counts[i] - exact_counts[i], i))
    for i in order[: num_devices - sum(counts)]:
        counts[i] += 1
    return counts


@given(SHARES, st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_counts_by_largest_remainder(parts: list[int], num_devices: int, seed: int) -> None:
    assume(parts[-1] > 0)
    tiers = [Tier(name=f"t{i}", share=part / 64) for i, part in enumerate(parts)]
    counts = largest_remainder(parts, num_devices)
    if 0 in counts:
        with pytest.raises(UserError, match=rf"data\.devices={num_devices} .*'t{counts.index(0)}'"):
            assign_tiers(tiers, num_devices, seed)
        return
    assigned = assign_tiers(tiers, num_devices, seed)
    assert len(assigned) == num_devices
    assert [Counter(assigned)[i] for i in range(len(tiers))] == counts
    assert assigned.tolist() == assign_tiers(tiers, num_devices, seed).tolist()


def test_advice_for_too_few_devices_works() -> None:
    with pytest.raises(UserError, match="tier 'flagship'") as error:
        assign_tiers(load_tiers("skewed"), 5, 0)
    advised = int(re.search(r"at least (\d+) devices", str(error.value))[1])  # type: ignore[index]
    assert 0 in assign_tiers(load_tiers("skewed"), advised, 0)


# The largest size that fits


@st.composite
def chains(draw: st.DrawFn) -> dict[Fraction, Cost]:
    """A cost for every fraction; each figure grows with the fraction."""
    steps = st.lists(st.integers(0, 9), min_size=1, max_size=40)
    macs, total = [], 0
    for step in draw(steps):
        total += step
        macs.append(total + 1)
    memory_step, traffic_step = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    return {
        Fraction(i + 1, len(macs)): make_cost(m, 5 + memory_step * i, 3 + traffic_step * i) for i, m in enumerate(macs)
    }


FRACTION = st.floats(0.01, 1)
BUDGETS = {
    "rank_fraction": FRACTION,
    "macs_fraction": FRACTION,
    "macs": st.integers(1, 200),
    "memory_bytes": st.integers(1, 200),
    "ram_bytes": st.integers(4, 800),
    "round_bytes": st.integers(1, 200),
}


def fits(tier: Tier, cost: Cost, full: Cost) -> bool:
    used = {"macs": cost.macs_per_example, "memory": cost.train_memory_bytes}
    used["traffic"] = cost.download_bytes + cost.upload_bytes
    return (
        (tier.macs_fraction is None or used["macs"] <= tier.macs_fraction * full.macs_per_example)
        and (tier.macs is None or used["macs"] <= tier.macs)
        and (tier.memory_bytes is None or used["memory"] <= tier.memory_bytes)
        and (tier.ram_bytes is None or used["memory"] <= TRAINING_SHARE_OF_RAM * tier.ram_bytes)
        and (tier.round_bytes is None or used["traffic"] <= tier.round_bytes)
    )


def check_largest(chain: dict[Fraction, Cost], tier: Tier) -> None:
    fractions, full = list(chain), chain[Fraction(1)]
    assume((tier.macs_fraction or 1) * full.macs_per_example >= 1)  # see the test of budgets below one unit
    if not fits(tier, chain[fractions[0]], full):
        with pytest.raises(UserError, match="cannot afford the smallest submodel"):
            fit(tier, within_ranks(tier, fractions), chain.__getitem__, full)
        return
    cap = exact(1.0 if tier.rank_fraction is None else tier.rank_fraction)
    allowed = [f for f in fractions if fits(tier, chain[f], full) and (f <= cap or f == fractions[0])]
    assert fit(tier, within_ranks(tier, fractions), chain.__getitem__, full) == max(allowed)


@pytest.mark.parametrize("budget", BUDGETS)
@given(data=st.data(), chain=chains())
def test_fit_is_the_largest_that_fits_one_budget(budget: str, data: st.DataObject, chain: dict[Fraction, Cost]) -> None:
    check_largest(chain, Tier(name="a", share=1, **{budget: data.draw(BUDGETS[budget])}))


@given(chain=chains(), budgets=st.fixed_dictionaries({key: st.none() | value for key, value in BUDGETS.items()}))
def test_fit_is_the_largest_that_fits_all_budgets(chain: dict[Fraction, Cost], budgets: dict[str, float]) -> None:
    check_largest(chain, Tier(name="a", share=1, **budgets))  # type: ignore[arg-type]


def test_a_budget_may_be_used_up_exactly() -> None:
    chain = {Fraction(1, 2): make_cost(50, 50, 50), Fraction(1): make_cost(100, 100, 100)}
    for key, limit in (("macs", 100), ("memory_bytes", 100), ("round_bytes", 100), ("ram_bytes", 400)):
        for slack, best in ((0, Fraction(1)), (-4, Fraction(1, 2))):
            tier = Tier(name="a", share=1, **{key: limit + slack})  # type: ignore[arg-type]
            assert fit(tier, list(chain), chain.__getitem__, chain[Fraction(1)]) == best, key


def test_error_says_which_budgets_and_by_how_much() -> None:
    chain = {Fraction(1): make_cost(macs=3000, memory=500, traffic=9000)}
    tier = Tier(name="watch", share=1, macs=1000, memory_bytes=501, round_bytes=4500, macs_fraction=0.5)
    with pytest.raises(UserError) as error:
        fit(tier, list(chain), chain.__getitem__, chain[Fraction(1)])
    message = str(error.value)
    assert "\n" not in message
    assert "'watch'" in message
    assert re.search(r"\bmacs 1,000 MACs, needed 3,000 \(×3\.00\)", message)
    assert re.search(r"\bmacs-fraction 1,500 MACs, needed 3,000 \(×2\.00\)", message)
    assert re.search(r"\bround-bytes 4,500 bytes, needed 9,000 \(×2\.00\)", message)
    assert "memory-bytes" not in message
    assert "ram-bytes" not in message
