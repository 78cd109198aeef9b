"""Ranks over settings: Friedman's test, Nemenyi's critical difference, cliques."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmaestro.stats.ranks import (
    _iman_davenport,
    average_ranks,
    cliques,
    critical_difference,
    friedman,
    ranks_of,
)

_scores = st.integers(2, 6).flatmap(
    lambda rows: st.lists(st.lists(st.integers(0, 8), min_size=rows, max_size=rows), min_size=1, max_size=8)
)


def test_best_is_first_and_equal_values_share() -> None:
    assert ranks_of([0.9, 0.7, 0.9, 0.8]) == [1.5, 4.0, 1.5, 3.0]
    assert ranks_of([0.9, 0.7, 0.9, 0.8], higher_is_better=False) == [3.5, 1.0, 3.5, 2.0]
    assert average_ranks([[1, 2, 3], [3, 2, 1], [1, 3, 2]]) == pytest.approx([5 / 3, 7 / 3, 2.0])


def test_friedman_by_hand() -> None:
    """Rank sums 3, 7, 8 of 3 rows in 3 settings: χ² = 12 / (3·3·4) · (9 + 49 + 64) - 3·3·4 = 14/3.

    F = 2 · 14/3 / (6 - 14/3) = 7 with 2 and 4 degrees of freedom; its tail is (1 + 2·7/4)⁻² = .0494.
    One order in all settings has 1 / 6² = .0278 by chance.
    """
    found = friedman([[1, 2, 3], [1, 3, 2], [1, 2, 3]])
    assert found.chi_squared == pytest.approx(14 / 3)
    assert found.f == pytest.approx(7.0)
    assert found.p == pytest.approx(4.5**-2)
    assert found.smallest_p == pytest.approx(1 / 36)


def test_the_example_of_demsar() -> None:
    """Table 6 and section 3.2.2 of the paper: 14 settings, 4 rows, χ² = 9.28, F = 3.69, critical difference 1.25."""
    assert _iman_davenport(9.28, 14, 4) == pytest.approx(3.69, abs=0.005)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


@pytest.mark.parametrize(("rows", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_quantiles_of_demsars_table_5(rows: int, q: float) -> None:
    assert critical_difference(rows, 1) / math.sqrt(rows * (rows + 1) / 6) == pytest.approx(q, abs=1e-3)


def test_agreement_in_few_settings_is_not_certainty() -> None:
    same = friedman([[1, 2, 3], [1, 2, 3]])
    assert same.f is None
    assert same.p == pytest.approx(1 / 6), "the second setting has one of 6 orders"
    assert friedman([[1, 2, 3]]).p == 1.0
    assert friedman([[2, 2, 2], [2, 2, 2]]).p == 1.0


@given(_scores)
def test_friedman_against_scipy(scores: list[list[int]]) -> None:
    ranks = [ranks_of(row) for row in scores]
    found = friedman(ranks)
    assert 0 <= found.smallest_p <= found.p <= 1
    if len(scores[0]) > 2 and len(scores) > 1 and any(len(set(row)) > 1 for row in scores):
        assert found.chi_squared == pytest.approx(stats.friedmanchisquare(*zip(*scores, strict=True)).statistic)


@given(_scores, st.randoms())
def test_the_order_of_rows_and_settings_changes_nothing(scores: list[list[int]], random: object) -> None:
    rows, settings = list(range(len(scores[0]))), list(scores)
    random.shuffle(rows)  # type: ignore[attr-defined]
    random.shuffle(settings)  # type: ignore[attr-defined]
    before, after = (
        [ranks_of(row) for row in table] for table in (scores, [[row[i] for i in rows] for row in settings])
    )
    assert friedman(after).p == pytest.approx(friedman(before).p)
    averages = average_ranks(before)
    assert average_ranks(after) == pytest.approx([averages[i] for i in rows])


@given(st.lists(st.integers(0, 12).map(lambda x: x / 2), min_size=2, max_size=9), st.floats(0.01, 8))
def test_cliques_are_all_largest_groups_without_a_difference(averages: list[float], distance: float) -> None:
    found = [set(group) for group in cliques(averages, distance)]
    for group in found:
        assert len(group) > 1
        assert max(averages[i] for i in group) - min(averages[i] for i in group) < distance
    assert not any(left <= right for left, right in combinations(found, 2)), "none is a part of another"
    assert not any(right <= left for left, right in combinations(found, 2))
    for left, right in combinations(range(len(averages)), 2):
        together = abs(averages[left] - averages[right]) < distance
        assert together == any({left, right} <= group for group in found)


def test_cliques_best_first() -> None:
    assert cliques([3.0, 1.0, 2.0, 6.0], 1.5) == [(1, 2), (2, 0)]
    assert cliques([1.0, 5.0], 1.0) == []
    assert cliques([1.0, 2.0], 1.0) == [], "a difference of the critical one is a difference"
