"""What may be said: Holm's adjustment, and the word that follows from the tests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.stats.verdict import Difference, Verdict, differences_from, holm

_p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)
ZEROS = dict.fromkeys(range(10), 0.0)


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03 .2: times 4, 3, 2, 1 is .04 .06 .06 .2."""
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04, 0.015]) == pytest.approx([0.04, 0.03]), "the second is not adjusted once the first is smaller"
    assert holm([]) == []


@given(_p_values, st.randoms())
def test_laws_of_holm(p_values: list[float], random: object) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * p) + 1e-15 for p, q in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [q for _, q in pairs] == sorted(adjusted), "the order stays"
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]
    assert adjusted[p_values.index(min(p_values))] == min(1.0, len(p_values) * min(p_values))


def only(row: dict[int, float | None], margin: float | None = 0.5, others: int = 0) -> Difference:
    """Return a row's difference from zeros; the other rows differ by chance."""
    noise = {f"noise {i}": {seed: (-1.0) ** seed for seed in ZEROS} for i in range(others)}
    return differences_from(ZEROS, {"row": row, **noise}, margin)[0]


def around(center: float, spread: float, seeds: int = 10) -> dict[int, float | None]:
    return {seed: center + spread * (-1) ** seed for seed in range(seeds)}


@pytest.mark.parametrize(
    ("row", "margin", "verdict"),
    [
        (around(2, 0.5), 0.5, Verdict.ABOVE),
        (around(-2, 0.5), 0.5, Verdict.BELOW),
        (around(0, 0.1), 0.5, Verdict.LEVEL),
        (around(0, 0.1), None, Verdict.NOT_TOLD_APART),
        (around(0, 3), 0.5, Verdict.NOT_TOLD_APART),
        (around(0.2, 0.1), 0.5, Verdict.ABOVE_WITHIN),
        (around(-0.2, 0.1), 0.5, Verdict.BELOW_WITHIN),
        (around(0.2, 0.1), None, Verdict.ABOVE),
        (around(2, 0.1, seeds=5), 0.5, Verdict.TOO_FEW_SEEDS),
        (around(0, 0.001, seeds=5), 0.5, Verdict.TOO_FEW_SEEDS),
        (around(2, 0.1, seeds=6), 0.5, Verdict.ABOVE),
        (around(2, 0.1) | {3: None}, 0.5, Verdict.UNKNOWN),
        ({}, 0.5, Verdict.UNKNOWN),
        ({99: 1.0}, 0.5, Verdict.UNKNOWN),
    ],
)
def test_words(row: dict[int, float | None], margin: float | None, verdict: Verdict) -> None:
    assert only(row, margin).verdict is verdict


def test_rows_pay_for_each_other() -> None:
    six = around(2, 0.1, seeds=6)
    assert only(six).verdict is Verdict.ABOVE
    with_another = only(six, others=1)
    assert (with_another.p, with_another.p_holm, with_another.least_p) == (0.03125, 0.0625, 0.0625)
    assert with_another.verdict is Verdict.TOO_FEW_SEEDS


def test_only_common_seeds_are_paired() -> None:
    difference = only({1: 1.0, 2: 2.0, 77: 50.0})
    assert (difference.seeds, difference.differences, difference.mean) == ((1, 2), (1.0, 2.0), 1.5)
    unknown = only({1: 1.0, 2: None})
    assert (unknown.seeds, unknown.differences, unknown.mean, unknown.p) == ((1, 2), (), None, None)


_rows = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.integers(-9, 9), min_size=7, max_size=7).map(lambda x: dict(enumerate(map(float, x)))),
    min_size=1,
)


@given(_rows, st.randoms())
def test_the_order_of_rows_changes_nothing(rows: dict[str, dict[int, float | None]], random: object) -> None:
    names = list(rows)
    random.shuffle(names)  # type: ignore[attr-defined]
    before = {x.row: x for x in differences_from(ZEROS, rows, 1.0)}
    after = {x.row: x for x in differences_from(ZEROS, {name: rows[name] for name in names}, 1.0)}
    assert before == after


@given(_rows, st.integers(-5, 5))
def test_what_all_rows_share_changes_nothing(rows: dict[str, dict[int, float | None]], shift: int) -> None:
    moved = {name: {seed: (x or 0.0) + shift for seed, x in row.items()} for name, row in rows.items()}
    same = differences_from({seed: float(shift) for seed in ZEROS}, moved, 1.0)
    assert same == differences_from(ZEROS, rows, 1.0)
