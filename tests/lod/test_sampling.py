"""Samplers of rank prefixes: pure functions of the step."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.lod import sampling

FULL = {"conv": 7, "head": 3, "wide": 12}
CYCLE = sum(FULL.values())
MODELS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(0, 9), min_size=1)
SAMPLERS = {
    "pairs": sampling.pairs,
    "independent": sampling.independent,
    "prefixes": lambda full, *rest: sampling.prefixes(
        [{n: max(r // d, 1) for n, r in full.items()} for d in (1, 2, 4)], *rest
    ),
}


def pair_of(ranks: Mapping[str, int], full: Mapping[str, int]) -> tuple[str, int] | None:
    """The one layer below its full rank, None if there is none (the pair is a layer at its full rank)."""
    below = [(name, rank) for name, rank in ranks.items() if rank != full[name]]
    assert len(below) <= 1
    return below[0] if below else None


def cycle_of(sample: sampling.Sampler, number: int, length: int) -> list[sampling.Ranks]:
    return [sample(number * length + i) for i in range(length)]


# ---------------------------------------------------------------- pairs


@settings(max_examples=60)
@given(full=MODELS, seed=st.integers(0, 2**40), cycle=st.integers(0, 3))
def test_a_cycle_holds_every_pair_once_and_all_other_layers_are_whole(
    full: dict[str, int], seed: int, cycle: int
) -> None:
    length = sum(full.values())
    drawn = cycle_of(sampling.pairs(full, seed), cycle, length)
    assert all(ranks.keys() == full.keys() for ranks in drawn)
    found = Counter(pair_of(ranks, full) for ranks in drawn)
    expected = Counter((name, rank) for name, top in full.items() for rank in range(1, top))
    # A pair (layer, R_i) runs the whole model: one per layer that has a rank at all.
    if tops := sum(top > 0 for top in full.values()):
        expected[None] = tops  # type: ignore[index]
    assert found == expected


def test_layers_are_hit_in_proportion_to_their_ranks() -> None:
    """A layer is below its full rank in ``R_i - 1`` of the ``Σ R_i`` steps of every cycle."""
    sample = sampling.pairs(FULL, 3)
    hits = Counter(pair[0] for step in range(5 * CYCLE) if (pair := pair_of(sample(step), FULL)))
    assert hits == {name: 5 * (rank - 1) for name, rank in FULL.items()}


def test_the_order_within_a_cycle_is_uniform() -> None:
    """At each position of 2,000 cycles, each of four pairs comes about 500 times (σ = √(2000·¼·¾) ≈ 19)."""
    sample = sampling.pairs({"a": 4}, 11)
    counts = np.zeros((4, 4), dtype=int)
    for step in range(4 * 2000):
        counts[step % 4, sample(step)["a"] - 1] += 1
    assert (abs(counts - 500) < 5 * 19.4).all()


def test_a_layer_of_rank_0_stays_there_and_takes_no_step() -> None:
    full = {"gone": 0, "left": 3}
    assert [ranks["gone"] for ranks in cycle_of(sampling.pairs(full, 1), 0, 3)] == [0, 0, 0]
    assert sorted(ranks["left"] for ranks in cycle_of(sampling.pairs(full, 1), 2, 3)) == [1, 2, 3]
    assert {sampling.independent(full, 1)(step)["gone"] for step in range(50)} == {0}


# ---------------------------------------------------------------- all samplers


@pytest.mark.parametrize("kind", SAMPLERS)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**40), steps=st.lists(st.integers(0, 5 * CYCLE), min_size=1, max_size=30))
def test_a_step_decides_alone_whatever_was_asked_before(kind: str, seed: int, steps: list[int]) -> None:
    """A resumed run makes a new sampler and asks for a later step first."""
    asked = SAMPLERS[kind](FULL, seed)
    assert [asked(step) for step in steps] == [SAMPLERS[kind](FULL, seed)(step) for step in steps]
    assert asked(steps[0]) == SAMPLERS[kind](FULL, seed)(steps[0])


@pytest.mark.parametrize("kind", SAMPLERS)
def test_seeds_indices_and_kinds_have_orders_of_their_own(kind: str) -> None:
    make = SAMPLERS[kind]
    argument_lists = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    sequences = [tuple(tuple(make(FULL, *a)(step).items()) for step in range(40)) for a in argument_lists]
    assert len(set(sequences)) == len(argument_lists)


# ---------------------------------------------------------------- independent


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_independent_marginals_are_uniform_and_layers_uncorrelated() -> None:
    """The bounds are exceeded by chance once in a million: chi-square with 6, 2, 11 and 7·3 - 1 degrees of freedom."""
    sample = sampling.independent(FULL, 5)
    steps = 6000
    draws = [sample(step) for step in range(steps)]
    for name, bound in (("conv", 39), ("head", 28), ("wide", 50)):
        assert chi_square(np.bincount([d[name] for d in draws], minlength=FULL[name] + 1)[1:]) < bound
        assert {d[name] for d in draws} == set(range(1, FULL[name] + 1))
    joint = np.zeros((7, 3))
    for d in draws:
        joint[d["conv"] - 1, d["head"] - 1] += 1
    assert chi_square(joint) < 66


# ---------------------------------------------------------------- prefixes


def test_prefixes_are_the_given_sizes_equally_often() -> None:
    sizes = [{"a": 8, "b": 4}, {"a": 4, "b": 2}, {"a": 1, "b": 0}]
    sample = sampling.prefixes(sizes, 2)
    draws = [sizes.index(sample(step)) for step in range(3000)]
    assert chi_square(np.bincount(draws, minlength=3)) < 28
