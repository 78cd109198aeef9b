"""A round's plan: a function of seed and round; cohorts of one tier; availability, over-commit and deadline."""

import math
import random
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.fleet.clock import device_timing
from fedmaestro.fleet.plan import Plan, make_plan
from fedmaestro.fleet.rule import SubmodelRule
from fedmaestro.fleet.selection import SELECTIONS
from fedmaestro.fleet.tiers import FLEETS, Tier, assign_tiers
from fedmaestro.models.architecture import Architecture
from fedmaestro.rounds.cohorts import Pace, cut
from fedmaestro.rounds.schedule import Schedule, schedule_round
from fedmaestro.rounds.tree import Span, Tree, reduced

DEVICES = 40
TIER_OF = assign_tiers(FLEETS["five-tiers"].tiers, DEVICES, 0)
EXAMPLES = [20 + 7 * (device % 13) for device in range(DEVICES)]
SEEDS = st.integers(0, 2**32 - 1)
ROUNDS = st.integers(1, 10**6)


@cache
def plan_of(trains: str = "own", availability: float = 1.0) -> Plan:
    tiers = tuple(tier.model_copy(update={"availability": availability}) for tier in FLEETS["five-tiers"].tiers)
    lenet = Architecture(name="lenet", input_shape=(1, 28, 28), num_classes=10)
    return make_plan(lenet, tiers, SubmodelRule(trains=trains), batch_size=32)  # type: ignore[arg-type]


def scheduled(plan: Plan | None = None, **changes: float) -> Schedule:
    arguments = {"seed": 0, "server_round": 1, "devices_per_round": 12, **changes}
    return schedule_round(
        plan=plan or plan_of(),
        tier_of=TIER_OF,
        examples=EXAMPLES,
        **arguments,  # type: ignore[arg-type]
    )


def finished(schedule: Schedule) -> list[int]:
    return [device for group in schedule.groups for device in group.devices]


def seconds(device: int, local_epochs: int = 1) -> float:
    tier = plan_of().by_index(TIER_OF[device])
    assert tier.trains is not None
    return device_timing(tier.tier, tier.trains.cost, EXAMPLES[device] * local_epochs).total


# Sampling


@given(SEEDS, ROUNDS)
def test_seed_and_round_fix_the_schedule(seed: int, server_round: int) -> None:
    one = scheduled(seed=seed, server_round=server_round, over_commit=1.5, deadline_seconds=1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert scheduled(seed=seed, server_round=server_round, over_commit=1.5, deadline_seconds=1) == one


@given(SEEDS, ROUNDS, st.integers(1, DEVICES), st.floats(1, 3))
def test_every_sampled_device_is_there_once(seed: int, server_round: int, wanted: int, over_commit: float) -> None:
    schedule = scheduled(seed=seed, server_round=server_round, devices_per_round=wanted, over_commit=over_commit)
    sampled = [*finished(schedule), *schedule.dropped]
    assert len(set(sampled)) == len(sampled)
    assert set(sampled) <= set(range(DEVICES))
    assert len(finished(schedule)) == wanted


# Groups and cohorts


@given(SEEDS, ROUNDS, st.integers(1, DEVICES), st.integers(1, 9), st.integers(1, 5), st.floats(0.001, 1000))
def test_cohorts_are_nodes_of_their_tiers_trees_and_hold_every_device_once(
    seed: int, server_round: int, wanted: int, limit: int, workers: int, other: float
) -> None:
    schedule = scheduled(seed=seed, server_round=server_round, devices_per_round=wanted, local_epochs=3)
    cohorts = cut(schedule.groups, lambda x: x.work * 1e-6, workers=workers, limit=limit, other_seconds=other)
    assert sorted(device for cohort in cohorts for device in cohort.devices) == sorted(finished(schedule))
    assert [cohort.work for cohort in cohorts] == sorted((cohort.work for cohort in cohorts), reverse=True)
    for group in schedule.groups:
        tree: Tree[int] = Tree(len(group.devices), lambda a, b: a + b)
        for cohort in cohorts:
            if cohort.group is group:
                tree.put(cohort.span, len(cohort.devices))
        assert tree.root == len(group.devices)
    for cohort in cohorts:
        assert 1 <= len(cohort.devices) <= limit
        assert list(cohort.devices) == sorted(cohort.devices)
        assert {TIER_OF[device] for device in cohort.devices} == {cohort.tier.index}
        assert cohort.submodel == cohort.tier.trains
        examples = sum(EXAMPLES[device] for device in cohort.devices)
        assert cohort.work == 3 * examples * cohort.submodel.cost.train_macs_per_example


def test_workers_end_together_and_messages_are_few() -> None:
    schedule = scheduled(devices_per_round=40)
    for workers in (1, 2, 4):
        cohorts = cut(schedule.groups, lambda x: float(x.work), workers=workers)
        ends = [0.0] * workers
        for cohort in cohorts:
            ends[ends.index(min(ends))] += cohort.work
        assert max(ends) <= 1.15 * sum(ends) / workers
        assert len(cohorts) <= 12 * workers
    assert len(cut(schedule.groups, lambda _: 1e-4, workers=4)) == len(schedule.groups), "tiny ones are not cut"


def test_what_was_measured_replaces_the_prediction() -> None:
    pace = Pace()
    assert pace.seconds("a", 2e9) == pytest.approx(2.0)
    pace.measure("a", 1e9, 5.0)
    assert pace.seconds("a", 2e9) == pytest.approx(10.0)
    assert pace.seconds("b", 1e9) == pytest.approx(5.0), "other kinds are guessed by those that are known"
    for _ in range(50):
        pace.measure("a", 1e9, 1.0)
    assert pace.seconds("a", 1e9) == pytest.approx(1.0, rel=1e-3)


@given(st.integers(1, 40), st.data())
def test_a_tree_adds_up_in_one_order(count: int, data: st.DataObject) -> None:
    """Strings show the order of every addition."""

    def leaf(position: int) -> str | None:
        return None if position in failed else str(position)

    def join(left: str, right: str) -> str:
        return f"({left} {right})"

    failed = data.draw(st.sets(st.integers(0, count - 1)))
    spans, nodes = [Span(0, count)], []
    while spans:
        span = spans.pop()
        if len(span) > 1 and data.draw(st.booleans()):
            spans += span.halves
        else:
            nodes.append(span)
    tree: Tree[str] = Tree(count, join)
    for span in data.draw(st.permutations(nodes)):
        tree.put(span, reduced(span, leaf, join))
    assert tree.root == reduced(Span(0, count), leaf, join)


def test_a_tree_knows_what_is_missing_and_what_is_none_of_its_nodes() -> None:
    tree: Tree[int] = Tree(5, max)
    tree.put(Span(0, 3), 1)
    with pytest.raises(ValueError, match="only"):
        _ = tree.root
    with pytest.raises(ValueError, match="no node"):
        tree.put(Span(2, 5), 1)


# Who takes part


def test_tiers_that_do_not_train_are_never_sampled() -> None:
    plan = plan_of("capable")
    capable = {device for device in range(DEVICES) if FLEETS["five-tiers"].tiers[TIER_OF[device]].name == "flagship"}
    seen = set()
    for server_round in range(1, 30):
        schedule = scheduled(plan, server_round=server_round, devices_per_round=3, over_commit=1.4)
        assert len(finished(schedule)) == 3
        seen |= {*finished(schedule), *schedule.dropped}
    assert seen == capable


@given(SEEDS, ROUNDS, st.integers(1, DEVICES), st.sets(st.integers(0, DEVICES - 1), max_size=DEVICES - 1))
def test_under_poisson_sampling_devices_do_not_depend_on_each_other(
    seed: int, server_round: int, wanted: int, without_data: set[int]
) -> None:
    """Whoever else has no examples: a device takes part or not. Nobody is one too many."""
    plan, poisson = plan_of(), SELECTIONS["poisson"]
    shared = {"seed": seed, "server_round": server_round, "devices_per_round": wanted, "selection": poisson}
    everybody = schedule_round(plan=plan, tier_of=TIER_OF, examples=EXAMPLES, **shared)  # type: ignore[arg-type]
    examples = [0 if device in without_data else count for device, count in enumerate(EXAMPLES)]
    fewer = schedule_round(plan=plan, tier_of=TIER_OF, examples=examples, **shared)  # type: ignore[arg-type]
    assert sorted(finished(fewer)) == sorted(set(finished(everybody)) - without_data)
    assert not fewer.dropped
    assert not everybody.dropped


def test_availability_is_the_share_of_reachable_devices() -> None:
    """3,000 devices; a tier of n devices at availability a has n·a reachable ones, ± 5 standard deviations."""
    tiers = (Tier(name="often", share=0.5, availability=0.7), Tier(name="rarely", share=0.5, availability=0.1))
    lenet = Architecture(name="lenet", input_shape=(1, 28, 28), num_classes=10)
    plan = make_plan(lenet, tiers, SubmodelRule(), batch_size=32)
    tier_of = assign_tiers(tiers, 3000, 0)

    def reachable(server_round: int) -> set[int]:
        schedule = schedule_round(
            plan=plan,
            tier_of=tier_of,
            examples=[1] * 3000,
            seed=0,
            server_round=server_round,
            devices_per_round=3000,
        )
        return set(finished(schedule))

    first, second = reachable(1), reachable(2)
    for index, tier in enumerate(tiers):
        members = {device for device in range(3000) if tier_of[device] == index}
        for found, probability in (
            (first, tier.availability),
            (second, tier.availability),
            (first & second, tier.availability**2),  # rounds are independent
        ):
            deviation = math.sqrt(1500 * probability * (1 - probability))
            assert abs(len(found & members) - 1500 * probability) < 5 * deviation


# Over-commit and deadline


@given(SEEDS, ROUNDS, st.integers(1, 20), st.integers(100, 400))
def test_over_commit_keeps_the_fastest(seed: int, server_round: int, wanted: int, percent: int) -> None:
    """Of a decimal, as settings are: 10 devices at 1.1 are 11, although the float product is above 11."""
    over_commit = percent / 100
    schedule = scheduled(seed=seed, server_round=server_round, devices_per_round=wanted, over_commit=over_commit)
    sampled = sorted([*finished(schedule), *schedule.dropped])
    assert len(sampled) == min(math.ceil(Fraction(wanted * percent, 100)), DEVICES)
    assert sorted(finished(schedule)) == sorted(sorted(sampled, key=lambda d: (seconds(d), d))[:wanted])
    assert list(schedule.dropped) == sorted(schedule.dropped)
    assert schedule.virtual_seconds == max(map(seconds, finished(schedule)))
    download = {tier.index: tier.trains.cost.download_bytes for tier in plan_of().tiers if tier.trains}
    assert schedule.download_bytes == sum(download[TIER_OF[device]] for device in sampled)


@given(SEEDS, ROUNDS, st.integers(1, 3), st.floats(0.05, 4))
def test_deadline_drops_the_late(seed: int, server_round: int, local_epochs: int, deadline: float) -> None:
    free = scheduled(seed=seed, server_round=server_round, local_epochs=local_epochs)
    schedule = scheduled(seed=seed, server_round=server_round, local_epochs=local_epochs, deadline_seconds=deadline)
    times = {device: seconds(device, local_epochs=local_epochs) for device in finished(free)}
    assert finished(schedule) == [device for device in finished(free) if times[device] <= deadline]
    assert list(schedule.dropped) == sorted(device for device in times if times[device] > deadline)
    assert schedule.download_bytes == free.download_bytes
    assert schedule.virtual_seconds == (deadline if schedule.dropped else max(times.values()))


def test_over_commit_means_the_decimal() -> None:
    tiers = (Tier(name="a", share=1, rank_fraction=0.1),)
    plan = make_plan(
        Architecture(name="lenet", input_shape=(1, 28, 28), num_classes=10), tiers, SubmodelRule(), batch_size=32
    )
    schedule = schedule_round(
        plan=plan,
        tier_of=[0] * 200,
        examples=[1] * 200,
        seed=0,
        server_round=1,
        devices_per_round=100,
        over_commit=1.1,
    )
    assert len(schedule.dropped) == 10


# Exclusive learning: every size on all devices that afford it


@given(SEEDS, ROUNDS)
def test_a_device_trains_every_size_that_it_affords_and_pays_for_all(seed: int, server_round: int) -> None:
    lenet = Architecture(name="lenet", input_shape=(1, 28, 28), num_classes=10)
    rule = SubmodelRule(separate=True, trains="affordable")
    plan = make_plan(lenet, FLEETS["five-tiers"].tiers, rule, batch_size=32)
    own = scheduled(plan_of(), seed=seed, server_round=server_round)
    schedule = scheduled(plan, seed=seed, server_round=server_round)
    sampled = sorted(finished(own))
    assert len(sampled) == 12
    sizes = [tier.tier.name for tier in plan.tiers]  # largest first, five of them
    rank = {tier.index: sizes.index(tier.tier.name) for tier in plan.tiers}
    for group in schedule.groups:
        expected = [device for device in sampled if rank[int(TIER_OF[device])] <= rank[group.tier.index]]
        assert list(group.devices) == expected
    costs = {tier.index: tier.serves.cost.download_bytes for tier in plan.tiers}
    paid = sum(costs[i] for device in sampled for i in costs if rank[i] >= rank[int(TIER_OF[device])])
    assert schedule.download_bytes == paid
    assert schedule.virtual_seconds >= own.virtual_seconds
