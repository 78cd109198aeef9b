"""A round that takes far too long is said to; one that does not, is not."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from fedmaestro.flower import watchdog
from fedmaestro.flower.watchdog import watched


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.05)


def test_what_takes_ten_times_as_long_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with watched("round 3", 4, 0.01) as this:
        this.replied()
        deadline = time.monotonic() + 20
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    first = caplog.records[0]
    assert first.levelno == logging.WARNING
    assert "round 3 has taken" in first.getMessage()
    assert "0.0 s were predicted: 1 of 4 replies are here" in first.getMessage()
    assert len(caplog.records) >= 2, "and again"


@pytest.mark.parametrize(("replies", "predicted"), [(4, None), (0, 1e-9), (4, 1e9)])
def test_nothing_is_said_otherwise(replies: int, predicted: float | None, caplog: pytest.LogCaptureFixture) -> None:
    with watched("round 3", replies, predicted):
        time.sleep(0.15)
    assert caplog.records == []


def test_a_host_that_hangs_is_told(
    federate: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run: once there is a prediction."""
    monkeypatch.setattr(watchdog, "FACTOR", 0)

    def slow(message: Any) -> None:
        if int(message.content.config_records["job"].get("round", 0)) == 3:
            time.sleep(0.1)

    federate({"train.rounds": 4}, spoil=slow)
    said = [record.getMessage() for record in caplog.records if "were predicted" in record.getMessage()]
    assert [line for line in said if line.startswith("round 3 ")]
    assert not [line for line in said if line.startswith(("round 0 ", "round 1 "))], "nothing was known then"
