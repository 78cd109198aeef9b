"""The virtual clock against hand-computed times, and the laws of closing a round."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedmaestro.fleet.clock import Outcome, close_round, device_timing
from fedmaestro.fleet.cost import Cost
from fedmaestro.fleet.tiers import Tier

# Few different values, so that ties and exact hits of the deadline occur.
SECONDS = st.lists(st.integers(1, 12).map(float) | st.floats(0.01, 12), max_size=12)
WANTED = st.integers(1, 14)
DEADLINE = st.integers(1, 13).map(float) | st.floats(0.005, 13)


def make_cost(**figures: int) -> Cost:
    zero = dict.fromkeys(
        (
            "params",
            "macs_per_example",
            "train_macs_per_example",
            "train_memory_bytes",
            "activation_bytes",
            "download_bytes",
            "upload_bytes",
        ),
        0,
    )
    return Cost(**(zero | figures))


def test_timing_by_hand() -> None:
    """The reference device makes 4.1 GMACs in 59 ms.

    download: 250,000 bytes · 8 = 2,000,000 bits over 1,000 kb/s = 2 s
    upload:   250,000 bytes · 8 = 2,000,000 bits over   400 kb/s = 5 s
    compute:  10 examples of 8.2 GMACs (two inferences, 0.118 s at speed 1) = 1.18 s, at speed 0.5 2.36 s
    """
    tier = Tier(name="a", share=1, speed=0.5, download_kbps=1000, upload_kbps=400)
    cost = make_cost(download_bytes=250_000, upload_bytes=250_000, train_macs_per_example=8_200_000_000)
    timing = device_timing(tier, cost, examples=10)
    assert timing.download == pytest.approx(2, rel=1e-12)
    assert timing.upload == pytest.approx(5, rel=1e-12)
    assert timing.compute == pytest.approx(2.36, rel=1e-12)
    assert timing.total == pytest.approx(9.36, rel=1e-12)


def test_round_by_hand() -> None:
    assert close_round([5, 1, 4, 2, 3], 3) == Outcome(finished=(1, 3, 4), dropped=(0, 2), seconds=3)
    assert close_round([5, 1, 4, 2, 3], 3, deadline=2.5) == Outcome(finished=(1, 3), dropped=(0, 2, 4), seconds=2.5)
    assert close_round([5, 1, 4, 2, 3], 3, deadline=3) == Outcome(finished=(1, 3, 4), dropped=(0, 2), seconds=3)
    assert close_round([], 3) == Outcome(finished=(), dropped=(), seconds=0)


@given(SECONDS, WANTED, DEADLINE | st.just(0.0))
@example([3.0, 3.0], 2, 3.0)
def test_everyone_finishes_or_is_dropped(seconds: list[float], wanted: int, deadline: float) -> None:
    outcome = close_round(seconds, wanted, deadline)
    assert sorted(outcome.finished + outcome.dropped) == list(range(len(seconds)))
    assert list(outcome.finished) == sorted(outcome.finished)
    assert list(outcome.dropped) == sorted(outcome.dropped)
    assert len(outcome.finished) <= wanted


@given(SECONDS, WANTED)
def test_over_commit_takes_the_fastest(seconds: list[float], wanted: int) -> None:
    outcome = close_round(seconds, wanted)
    assert len(outcome.finished) == min(wanted, len(seconds))
    for slow in outcome.dropped:
        for fast in outcome.finished:
            assert (seconds[fast], fast) < (seconds[slow], slow)
    assert outcome.seconds == max((seconds[i] for i in outcome.finished), default=0)


@given(SECONDS, WANTED, DEADLINE)
@example([3.0, 3.0], 2, 3.0)
def test_a_deadline_removes_exactly_the_late_ones(seconds: list[float], wanted: int, deadline: float) -> None:
    free, outcome = close_round(seconds, wanted), close_round(seconds, wanted, deadline)
    assert outcome.finished == tuple(i for i in free.finished if seconds[i] <= deadline)
    # The server stops waiting when it has what it wanted, or else at the deadline.
    assert outcome.seconds == (free.seconds if outcome.finished == free.finished else deadline)


@given(SECONDS.filter(bool), WANTED)
def test_a_deadline_before_everybody(seconds: list[float], wanted: int) -> None:
    deadline = math.nextafter(min(seconds), 0)
    outcome = close_round(seconds, wanted, deadline)
    assert outcome == Outcome(finished=(), dropped=tuple(range(len(seconds))), seconds=deadline)
