"""New ranks from the global model: what may be cut, one nested path, budgets that hold, and what follows the ranks."""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmaestro.fleet.cost import Cost, cost
from fedmaestro.fleet.learned import (
    Memories,
    Ranked,
    Rederivation,
    columns_to_keep,
    count_updates,
    losses_of,
    no_updates,
    prices_of,
    rank_path,
    rederive,
    tails,
)
from fedmaestro.fleet.plan import Plan, decode_ranks, encode_ranks, make_plan, trace_of
from fedmaestro.fleet.rule import OWN_PASS, Passes, SubmodelRule
from fedmaestro.fleet.tiers import FLEETS, Tier
from fedmaestro.models.architecture import Architecture
from fedmaestro.submodel import State, cut, leading_block, shapes_of

LENET = Architecture(name="lenet", input_shape=(1, 28, 28), num_classes=10)
FIVE = FLEETS["five-tiers"].tiers
PAIRS = Passes(expected=lambda levels: [1.0] * levels, together=True)
LEARNED = Rederivation(every=1, learned=True)


def planned(tiers: tuple[Tier, ...] = FIVE, rule: SubmodelRule = SubmodelRule(), passes: Passes = OWN_PASS) -> Plan:  # noqa: B008
    return make_plan(LENET, tiers, rule, batch_size=32, passes=passes)


@cache
def full_ranks() -> dict[str, int]:
    return dict(LENET.full_size.ranks or {})


def model(seed: int, decay: Mapping[str, float] | float = 0.0) -> State:
    """A state whose columns fade by ``exp(-decay · b)``, decay by layer, with noise in their order."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in LENET.shapes(LENET.full_size).items()}
    for layer, rank in full_ranks().items():
        fade = torch.exp(-(decay if isinstance(decay, float) else decay[layer]) * torch.arange(rank))
        state[f"{layer}.u"] *= fade
        state[f"{layer}.v"] *= fade.view(-1, *[1] * (state[f"{layer}.v"].dim() - 1))
    return state


def path_of(state: State) -> list[dict[str, int]]:
    return rank_path(losses_of(state, full_ranks()), prices_of(full_ranks(), trace_of(LENET)))


def start(plan: Plan, state: State, memory: Memories | None = None, updates: State | None = None) -> Ranked:
    return Ranked(plan=plan, state=state, memory=memory or {}, updates=updates or no_updates(plan))


def everything_trained(plan: Plan) -> State:
    return count_updates(no_updates(plan), plan.full.size.ranks or {}, 1000)


# What is cut


@st.composite
def columns(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Strengths of a layer's columns, some of them 0, and how many updates each has had."""
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-4, 1e-3, 0.01, 0.1, 1.0]), min_size=1, max_size=12))
    counts = draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    return torch.tensor(sizes), torch.tensor(sorted(counts, reverse=True))


@given(columns=columns(), threshold=st.sampled_from([0.0, 1e-7, 1e-3, 0.05, 10.0]), least=st.integers(0, 6))
def test_only_a_suffix_of_weak_and_trained_columns_is_cut(
    columns: tuple[Tensor, Tensor], threshold: float, least: int
) -> None:
    sizes, counts = columns
    state = {"a.u": sizes[None], "a.v": torch.ones(len(sizes), 1)}
    rule = Rederivation(every=1, threshold=threshold, min_updates=least)
    kept = columns_to_keep(state, {"a": counts}, rule)["a"]

    def may_go(column: int) -> bool:
        importance = sizes[column:].double().norm() * (len(sizes) - column) ** 0.5
        return bool(importance < threshold) and bool(counts[column] >= least)

    assert 1 <= kept <= len(sizes)
    assert all(may_go(column) for column in range(kept, len(sizes)))
    assert kept == 1 or not may_go(kept - 1)


def test_updates_are_counted_by_column() -> None:
    before = no_updates(planned())
    after = count_updates(before, {"conv2": 3}, 4)
    assert after["conv2"].tolist()[:5] == [4, 4, 4, 0, 0]
    assert all(int(counts.sum()) == 0 for layer, counts in after.items() if layer != "conv2")
    assert all(int(counts.sum()) == 0 for counts in before.values())


# The path


@pytest.mark.parametrize("seed", range(3))
def test_the_path_is_one_chain_from_all_columns_to_one_per_layer(seed: int) -> None:
    path = path_of(model(seed, 0.05))
    assert path[-1] == full_ranks()
    assert path[0] == dict.fromkeys(full_ranks(), 1)
    for small, large in pairwise(path):
        assert sum(large[layer] - small[layer] for layer in large) == 1
        assert all(small[layer] <= large[layer] for layer in large)


def test_a_layer_whose_columns_fade_gives_up_more_of_them() -> None:
    for fading in full_ranks():
        decay = {layer: 0.3 if layer == fading else 0.01 for layer in full_ranks()}
        path = path_of(model(2, decay))
        kept = {layer: rank / full_ranks()[layer] for layer, rank in path[len(path) // 2].items()}
        assert min(kept, key=kept.__getitem__) == fading


# Tiers on the path


def tiers_on_path(plan: Plan, state: State) -> Plan:
    return rederive(plan, start(plan, state), LEARNED).plan


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Tier, ...]:
    """Tiers with all kinds of budgets, none below the smallest size's cost."""
    whole = planned().full.cost
    least = planned((Tier(name="a", share=1, rank_fraction=0.001),)).tiers[0].serves.cost

    def between(figure: str) -> st.SearchStrategy[int | None]:
        return st.none() | st.integers(getattr(least, figure), getattr(whole, figure))

    def tier(index: int) -> Tier:
        traffic = draw(between("params"))
        return Tier(
            name=f"t{index}",
            share=0.2,
            rank_fraction=draw(st.none() | st.floats(0.01, 1)),
            macs_fraction=draw(st.none() | st.floats(0.5, 1)),
            macs=draw(between("macs_per_example")),
            memory_bytes=draw(between("train_memory_bytes")),
            round_bytes=None if traffic is None else 8 * traffic,
        )

    return tuple(tier(index) for index in range(draw(st.integers(1, 4))))


@settings(max_examples=25)
@given(tiers=fleets(), seed=st.integers(0, 9), together=st.booleans())
def test_learned_ranks_are_nested_and_keep_every_budget(tiers: tuple[Tier, ...], seed: int, together: bool) -> None:
    uniform = planned(tiers, passes=PAIRS if together else OWN_PASS)
    learned = tiers_on_path(uniform, model(seed, 0.03))
    for large, small in pairwise(learned.tiers):
        assert all(rank <= large.serves.size.ranks[x] for x, rank in small.serves.size.ranks.items())  # type: ignore[index, union-attr]
    for now in learned.tiers:
        tier, figures = now.tier, now.serves.cost
        assert tier == tiers[now.index]
        assert min(now.serves.size.ranks.values()) >= 1  # type: ignore[union-attr]
        if tier.rank_fraction is not None:
            assert figures.macs_per_example <= uniform.by_index(now.index).serves.cost.macs_per_example
            assert figures.params <= uniform.by_index(now.index).serves.cost.params
        assert figures.macs_per_example <= (tier.macs or figures.macs_per_example)
        assert figures.macs_per_example <= (tier.macs_fraction or 1) * uniform.full.cost.macs_per_example
        assert now.step_memory_bytes <= (tier.memory_bytes or now.step_memory_bytes)
        assert figures.download_bytes + figures.upload_bytes <= (tier.round_bytes or 8 * figures.params)


@pytest.mark.parametrize("seed", range(3))
def test_no_tier_leaves_out_a_column_that_costs_no_more_than_its_uniform_ranks(seed: int) -> None:
    """On the path alone, a dear column (conv2's) that comes next keeps a tier from cheap ones of other layers."""
    uniform, state = planned(), model(seed, 0.03)
    path = path_of(state)
    learned = tiers_on_path(uniform, state)
    assert learned.tiers[0].serves.size == uniform.tiers[0].serves.size
    for above, now in pairwise(learned.tiers):
        ranks, most = dict(now.serves.size.ranks or {}), above.serves.size.ranks or {}
        limit = uniform.by_index(now.index).serves.cost

        def affords(candidate: Mapping[str, int], limit: Cost = limit) -> bool:
            own = cost(trace_of(LENET), candidate, batch_size=32)
            return own.macs_per_example <= limit.macs_per_example and own.params <= limit.params

        assert affords(ranks)
        assert not any(affords({**ranks, x: rank + 1}) for x, rank in ranks.items() if rank < most[x])
        on_path = [size for size in path if affords(size)][-1]
        assert all(rank <= ranks[x] for x, rank in on_path.items()), "what the path gave is kept"


@pytest.mark.parametrize("trains", ["own", "smallest", "full", "capable"])
def test_every_rule_has_somebody_who_trains(trains: str) -> None:
    plan = tiers_on_path(planned(rule=SubmodelRule(trains=trains)), model(5, 0.02))  # type: ignore[arg-type]
    trained = {tier.tier.name: tier.trains for tier in plan.tiers if tier.trains is not None}
    assert list(trained) == (["flagship"] if trains == "capable" else [tier.name for tier in FIVE])
    if trains in ("full", "capable"):
        assert all(submodel is plan.full for submodel in trained.values())
    if trains == "smallest":
        assert len({tier.serves.cost.params for tier in plan.tiers}) == 1


def test_capable_devices_stay_so_when_a_smaller_tier_would_need_their_memory() -> None:
    """The largest tier has just the memory for the uniform smaller one, whose learned ranks keep more activations."""
    small = Tier(name="small", share=0.5, rank_fraction=0.25)
    rule = SubmodelRule(trains="capable")
    roomy = planned((Tier(name="large", share=0.5), small), rule, PAIRS)
    exact = Tier(name="large", share=0.5, memory_bytes=roomy.by_name("large").step_memory_bytes)
    plan = planned((exact, small), rule, PAIRS)
    decay = {layer: 0.001 if layer.startswith("conv") else 1.0 for layer in full_ranks()}
    state = model(6, decay)
    hungry = tiers_on_path(planned((Tier(name="large", share=0.5), small), rule, PAIRS), state)
    assert hungry.by_name("large").step_memory_bytes > plan.by_name("large").step_memory_bytes, "the case is none"
    assert tiers_on_path(plan, state).by_name("large").trains is not None


# What follows


def cut_case() -> tuple[Plan, Ranked, Ranked]:
    """A model whose columns beyond 3 in conv2 and 5 in fc1 have vanished, before and after the cut."""
    plan, state = planned(), model(7)
    for layer, rank in (("conv2", 3), ("fc1", 5)):
        state[f"{layer}.u"][:, rank:] = 0
    memory = {
        "optimizer": {
            "momentum": {name: tensor + 1 for name, tensor in state.items()},
            "second": {name: tensor.double() - 1 for name, tensor in state.items()},
        },
        "mine": {"steps": {"count": torch.tensor(3), "fc1.u": torch.tensor(4)}},
    }
    now = start(plan, state, memory, everything_trained(plan))
    return plan, now, rederive(plan, now, Rederivation(every=1, threshold=1e-9, min_updates=1000))


def test_state_memory_and_counts_are_cut_to_their_leading_blocks() -> None:
    _, now, new = cut_case()
    full = {**full_ranks(), "conv2": 3, "fc1": 5}
    assert new.plan.full.size.ranks == full
    assert shapes_of(new.state) == new.plan.full.shapes == LENET.shapes(new.plan.full.size)
    for name, tensor in new.state.items():
        assert torch.equal(tensor, leading_block(now.state[name], tuple(tensor.shape)))
        assert tensor.is_contiguous()
        for slot in ("momentum", "second"):
            expected = leading_block(now.memory["optimizer"][slot][name], tuple(tensor.shape))
            assert torch.equal(new.memory["optimizer"][slot][name], expected)
    assert {layer: len(counts) for layer, counts in new.updates.items()} == full
    assert new.memory["mine"] == now.memory["mine"], "not a tensor of the model, or not its shape"


def test_uniform_ranks_stay_as_far_as_columns_are_left() -> None:
    plan, _, new = cut_case()
    for before in plan.tiers:
        after = new.plan.by_name(before.tier.name)
        limits = new.plan.full.size.ranks or {}
        assert after.serves.size.ranks == {x: min(r, limits[x]) for x, r in (before.serves.size.ranks or {}).items()}
        assert after.serves.cost.params <= before.serves.cost.params
        assert cut(new.state, after.serves.shapes)
    assert [tier.tier for tier in new.plan.tiers] == [tier.tier for tier in plan.tiers]


def test_ranks_survive_their_text() -> None:
    plan = planned()
    for new in (plan, tiers_on_path(plan, model(10, 0.02)), cut_case()[2].plan):
        text = encode_ranks(new)
        again = decode_ranks(plan, text)
        assert encode_ranks(again) == text
        assert again.tiers == new.tiers
        assert again.full == new.full
        assert len(text) < 200


def test_tails_are_what_a_prefix_lacks() -> None:
    state = model(11)
    ranks = {layer: rank // 3 for layer, rank in full_ranks().items()}
    for (of_u, of_v), (layer, rank) in zip(tails(state, ranks), ranks.items(), strict=True):
        assert of_u == pytest.approx(float(state[f"{layer}.u"][:, rank:].norm() ** 2), rel=1e-5)
        assert of_v == pytest.approx(float(state[f"{layer}.v"][rank:].norm() ** 2), rel=1e-5)
    assert set(tails(state, full_ranks())) == {(0.0, 0.0)}


# When


@pytest.mark.parametrize(
    ("rule", "rounds"),
    [
        (Rederivation(every=3, learned=True), [3, 6, 9]),
        (Rederivation(every=5, threshold=1e-9), [5, 10]),
        (Rederivation(every=6, learned=True), [6]),
        (Rederivation(every=1), []),
    ],
)
def test_ranks_change_between_rounds_of_training(rule: Rederivation, rounds: list[int]) -> None:
    assert [n for n in range(13) if rule.due(n, 12)] == rounds
