"""What a round costs beside training, counted: Python calls, messages, bytes. Seconds are for benchmarks/."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from fedmaestro.config.experiment import load_config
from fedmaestro.rounds import storage
from fedmaestro.rounds.device import train_cohort
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.rounds.server import schedule, start

Federate = Callable[..., Any]
SETTINGS = {
    "data.devices": 100,
    "data.partition": "iid",
    "train.local-epochs": 1,
    "train.batch-size": 16,
    "train.objective": "own-prefix",
    "train.logit-adjustment": 0.0,
    "train.clip-norm": 0.0,
}


def calls(work: Callable[[], object]) -> int:
    """Return how many Python functions are called by ``work``, from its second time on."""
    work()
    count = 0

    def counted(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def environment(**more: Any) -> Environment:
    return open_environment(load_config(None, SETTINGS | more))


def test_a_device_costs_few_calls_beside_its_steps() -> None:
    env = environment()
    state = start(env)
    tier = env.plan.tiers[0]
    assert tier.trains is not None
    sent = storage.download(env.plan, state.models, tier.trains)

    def cohort(devices: int) -> Callable[[], object]:
        return lambda: train_cohort(env, env.plan, tier.tier.name, list(range(devices)), sent, 1)

    per_device = (calls(cohort(24)) - calls(cohort(8))) / 16
    steps = 1  # of 14 or 15 examples
    # 160 of data, seeds, loading, checks and sums, and 60 of a step; the rest is room for other versions of Python.
    assert per_device <= 280 + 90 * (steps - 1), f"{per_device} calls per device"


def test_a_round_of_a_million_devices_is_scheduled_with_the_calls_of_a_hundred() -> None:
    counts = []
    for devices in (100, 1_000_000):
        env = environment(**{"data.devices": devices, "data.share-examples": 20})
        state = start(env)
        counts.append(calls(lambda env=env, state=state: schedule(env, state, 3)))  # type: ignore[misc]
    assert counts[1] <= 1.3 * counts[0], counts


def test_a_million_devices_share_the_embedded_data(federate: Federate) -> None:
    """What a run keeps grows with the devices that took part."""
    sizes = []
    for devices in (1000, 1_000_000):
        summary, folder, _ = federate({"data.devices": devices, "data.share-examples": 20})
        assert summary["failed"] == 0
        sizes.append(sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file()))
    assert sizes[1] <= 1.02 * sizes[0]


@pytest.mark.parametrize(("devices", "most"), [(10, 8), (100, 14)])
def test_messages_of_a_round_are_few(federate: Federate, devices: int, most: int) -> None:
    """Of five tiers on two hosts; a message costs some 5 ms."""
    _, _, grid = federate({"data.devices": 200, "train.devices-per-round": devices, "train.rounds": 3})
    jobs = [message.content.config_records["job"] for message in grid.sent]
    rounds = [job["round"] for job in jobs if "devices" in job]
    assert max(rounds.count(number) for number in (2, 3)) <= most
