"""Differences paired by seed: golden values with their derivation, SciPy as a second implementation, and laws."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fedmaestro.stats import paired
from fedmaestro.stats.paired import seeds_needed, sign_flip_p, smallest_p, t_half_width, tost_p

# Accuracies are counts over examples: ties are common, and sums of floats of them are not exact.
_differences = st.lists(st.integers(-30, 30).map(lambda count: count / 360), min_size=2, max_size=9)
_margins = st.floats(0.001, 0.1)


@pytest.mark.parametrize(("seeds", "factor"), [(3, 2.48), (5, 1.24), (10, 0.72)])
def test_half_widths_of_95_percent(seeds: int, factor: float) -> None:
    """t.975(n - 1) / √n from the tables: 4.303 / 1.732, 2.776 / 2.236, 2.262 / 3.162; here the deviation is 1."""
    differences = np.linspace(-1, 1, seeds)
    half = t_half_width(list(differences / differences.std(ddof=1)))
    assert half == pytest.approx(factor, abs=0.005)


def test_half_width_against_scipy() -> None:
    differences = [0.3, -0.1, 0.4, 0.2]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    assert t_half_width(differences, 0.9) == pytest.approx((high - low) / 2)
    assert t_half_width([0.3]) is None


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1, 2, 3], 2 / 8),  # only all signs alike reach ±6
        ([-1, -2, -3], 2 / 8),
        ([1, 2, -3], 8 / 8),  # the sum is 0, which every pattern reaches
        ([1, -2, 4], 6 / 8),  # |sum| is 7, 5, 3 and 1, twice each; 3 was seen
        ([3, -1, 2, 2], 4 / 16),  # |sum| = 6: ±8 and, with the 1 flipped, ±6
        ([5], 1.0),
        ([0, 0, 0], 1.0),
        ([1, 1, 0], 4 / 8),  # the zero has either sign
    ],
)
def test_sign_flips_counted_by_hand(differences: list[float], expected: float) -> None:
    assert sign_flip_p(differences) == expected


@pytest.mark.parametrize(("seeds", "p"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (10, 0.001953125)])
def test_smallest_p_is_what_differences_of_one_sign_give(seeds: int, p: float) -> None:
    assert smallest_p(seeds) == sign_flip_p([0.01 + 0.001 * seed for seed in range(seeds)]) == p


@pytest.mark.parametrize(("rows", "seeds"), [(1, 6), (2, 7), (3, 7), (4, 8), (20, 10)])
def test_seeds_needed_is_the_first_number_that_can_reject(rows: int, seeds: int) -> None:
    assert seeds_needed(rows) == seeds
    assert smallest_p(seeds, rows) <= 0.05 < smallest_p(seeds - 1, rows)


@given(_differences)
def test_sign_flips_against_a_loop_and_scipy(differences: list[float]) -> None:
    seen = abs(sum(differences))
    sums = [abs(sum(s * x for s, x in zip(signs, differences, strict=True))) for signs in _signs(len(differences))]
    expected = sum(x >= seen - 1e-12 for x in sums) / len(sums)
    assert sign_flip_p(differences) == expected
    # SciPy compares floats of one formula with a relative slack: without ties near zero both agree.
    assume(seen > 1e-9)
    theirs = stats.permutation_test(
        (np.array(differences) * 360,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_p(differences) == pytest.approx(theirs.pvalue)


def _signs(count: int) -> Iterator[tuple[int, ...]]:
    return itertools.product((1, -1), repeat=count)


@given(_differences, st.randoms())
def test_sign_and_order_change_no_p(differences: list[float], random: object) -> None:
    shuffled = list(differences)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    negated = [-x for x in differences]
    assert sign_flip_p(differences) == sign_flip_p(shuffled) == sign_flip_p(negated)
    assert tost_p(differences, 0.02) == pytest.approx(tost_p(negated, 0.02))
    assert t_half_width(differences) == pytest.approx(t_half_width(negated))


@given(_differences, st.integers(-20, 20))
def test_a_shift_moves_the_interval_and_keeps_its_width(differences: list[float], shift: int) -> None:
    shifted = [x + shift for x in differences]
    assert t_half_width(shifted) == pytest.approx(t_half_width(differences), abs=1e-9)


def test_more_seeds_than_are_counted_are_drawn_reproducibly(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.4, -0.1, 0.3, 0.2, 0.5, -0.3, 0.1, 0.25, -0.2, 0.35]
    exact = sign_flip_p(differences)
    monkeypatch.setattr(paired, "EXACT_SEEDS", 5)
    drawn = sign_flip_p(differences)
    assert drawn == pytest.approx(exact, abs=0.005)
    assert sign_flip_p(differences[::-1]) == drawn
    assert sign_flip_p([1.0] * 60) == 1 / (paired.DRAWS + 1), "never zero"


def test_twenty_seeds_are_exact() -> None:
    assert sign_flip_p([1.0] * 20) == 2.0**-19


@given(_differences, _margins)
def test_equivalence_is_the_interval_of_90_percent_inside_the_margin(differences: list[float], margin: float) -> None:
    p, half = tost_p(differences, margin), t_half_width(differences, 0.9)
    assert p is not None
    assert half is not None
    edge = abs(math.fsum(differences) / len(differences)) + half
    assume(abs(edge - margin) > 1e-9)
    assert (p < 0.05) == (edge < margin)


@given(_differences, _margins, _margins)
def test_a_wider_margin_makes_level_easier(differences: list[float], left: float, right: float) -> None:
    narrow, wide = (tost_p(differences, margin) for margin in sorted((left, right)))
    assert narrow is not None
    assert wide is not None
    assert wide <= narrow


def test_equivalence_by_hand_and_against_scipy() -> None:
    """Mean 0, deviation 1, n = 4, margin 1: t = 1 / (1 / 2) = 2 with 3 degrees of freedom, p = .0697 (tables)."""
    differences = [x / math.sqrt(2) * math.sqrt(3 / 2) for x in (-1, 1, -1, 1)]
    assert tost_p(differences, 1.0) == pytest.approx(0.0697, abs=5e-5)
    upper = stats.ttest_1samp(differences, 1.0, alternative="less").pvalue
    lower = stats.ttest_1samp(differences, -1.0, alternative="greater").pvalue
    assert tost_p(differences, 1.0) == pytest.approx(max(upper, lower))


def test_rows_without_any_spread() -> None:
    assert tost_p([0.0, 0.0], 0.005) == 0.0
    assert tost_p([0.01, 0.01], 0.005) == 1.0
    assert tost_p([0.0], 0.005) is None
