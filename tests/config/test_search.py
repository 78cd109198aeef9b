"""What a tuning searches: how it is declared, and how many trials that makes for every row."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.config.search import Choices, Range, Space, corners, grid, spaces_of
from fedmaestro.errors import UserError
from fedmaestro.flower.samplers import budget, check_sampler, points_of, sampler_of

KEYS = ("train.lr", "train.momentum", "server.lr")
NUMBERS = st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True)
SPACES = st.dictionaries(st.sampled_from(KEYS), NUMBERS.map(lambda x: Choices(values=tuple(x))), min_size=1)


def test_texts_and_objects_declare_the_same() -> None:
    texts = ["train.lr = 0.05, 0.1,0.2", "train.optimizer=sgd,adam", "wide: train.lr=1,2", "a+train.x=1:server.lr=1"]
    rows = ["nested", "wide", "a+train.x=1"]
    found = spaces_of(texts, rows)
    assert found["nested"] == {
        "train.lr": Choices(values=(0.05, 0.1, 0.2)),
        "train.optimizer": Choices(values=("sgd", "adam")),
    }
    assert found["wide"]["train.lr"] == Choices(values=(1, 2)), "in place of what all rows try"
    assert found["a+train.x=1"] == {**found["nested"], "server.lr": Choices(values=(1,))}
    objects: dict[str, Any] = {
        "train.lr": [0.05, 0.1, 0.2],
        "train.optimizer": "sgd,adam",
        "wide": {"train.lr": (1, 2)},
        "a+train.x=1": {"server.lr": [1]},
    }
    assert spaces_of(objects, rows) == found


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("0.01..1", Range(low=0.01, high=1)),
        ("log:1e-3..0.5", Range(low=0.001, high=0.5, log=True)),
        ("1..8", Range(low=1, high=8)),
        ("-1.5..-.5", Choices(values=("-1.5..-.5",))),
    ],
)
def test_ranges(text: str, dimension: Any) -> None:
    if isinstance(dimension, Choices):
        with pytest.raises(UserError, match="a range goes from a number to a number"):
            spaces_of([f"train.lr={text}"], ["a"])
        return
    assert spaces_of([f"train.lr={text}"], ["a"])["a"]["train.lr"] == dimension
    assert dimension.whole == (text == "1..8")


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (["train.lr"], "write KEY=VALUE"),
        (["train.lr="], "a value is empty"),
        (["train.lr=1,,2"], "a value is empty"),
        (["train.lr=1,1.0"], "1 is given twice"),
        (["train.lr=1", "train.lr=2"], "declared twice"),
        (["b:train.lr=1"], "there is no row 'b': rows are a"),
        (["train.lr=2..1"], "the first number must be below the second"),
        (["train.lr=log:0..1"], "above 0"),
        ([], "nothing is searched for row 'a'"),
        ({"train.lr": 0.1}, r"search 'train\.lr': give a list of values"),
    ],
)
def test_what_is_wrong_is_one_line(search: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        spaces_of(search, ["a"])
    assert "\n" not in str(caught.value)


@given(space=SPACES)
def test_a_grid_has_every_combination_once_and_its_corners_every_value(space: Space) -> None:
    points = grid(space)
    assert len(points) == math.prod(len(x.values) for x in space.values() if isinstance(x, Choices))
    assert len({tuple(point.items()) for point in points}) == len(points)
    for some in (points, corners(space)):
        assert all(point in points for point in some)
        for key, dimension in space.items():
            assert isinstance(dimension, Choices)
            assert {point[key] for point in some} == set(dimension.values)


@given(spaces=st.lists(SPACES, min_size=1, max_size=3), trials=st.none() | st.integers(1, 9), seed=st.integers(0, 9))
def test_every_row_gets_as_many_trials_of_its_own_grid_or_none_does(
    spaces: list[Space], trials: int | None, seed: int
) -> None:
    sizes = [len(grid(space)) for space in spaces]
    try:
        found = budget({str(i): space for i, space in enumerate(spaces)}, "grid", trials)
    except UserError:
        assert len(set(sizes)) > 1 if trials is None else trials > min(sizes)
        return
    assert found == (trials or sizes[0])
    for space in spaces:
        points = points_of(space, found, seed)
        assert len(points) == found
        assert points == [point for point in grid(space) if point in points], "in order, each once"
        assert points == points_of(space, found, seed)
        sampler = sampler_of(space, "grid", found, seed, higher_is_better=True)
        assert [sampler.ask() for _ in range(found)] == points


def test_numbers_at_an_end_are_edges_and_others_are_not() -> None:
    values = Choices(values=(0.2, 0.05, 0.1))
    assert [values.edge(x) for x in (0.05, 0.1, 0.2)] == ["smallest", None, "largest"]
    assert Choices(values=(0.1,)).edge(0.1) is None
    assert Choices(values=("sgd", "adam")).edge("sgd") is None
    assert Choices(values=(True, False)).edge(True) is None
    log = Range(low=0.01, high=1, log=True)
    assert [log.edge(x) for x in (0.01, 0.012, 0.1, 0.99)] == ["lowest", "lowest", None, "highest"]
    assert Range(low=0, high=100).edge(4) == "lowest"


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_optuna_asks_the_same_again_and_finds_the_good_side(higher_is_better: bool) -> None:
    pytest.importorskip("optuna")
    space: Space = {"train.lr": Range(low=1e-4, high=1.0, log=True), "train.optimizer": Choices(values=("sgd", "adam"))}
    check_sampler("optuna")
    with pytest.raises(UserError, match="how many trials"):
        budget({"a": space}, "optuna", None)
    trials = budget({"a": space}, "optuna", 30)

    def asked() -> list[dict[str, Any]]:
        sampler = sampler_of(space, "optuna", trials, 3, higher_is_better=higher_is_better)
        found = []
        for number in range(trials):
            found.append(sampler.ask())
            distance = abs(math.log10(found[-1]["train.lr"]) + 1)  # the best is 0.1
            sampler.tell(None if number == 2 else -distance if higher_is_better else distance)
        return found

    first = asked()
    assert first == asked()
    assert all(1e-4 <= point["train.lr"] <= 1 and point["train.optimizer"] in ("sgd", "adam") for point in first)
    late = [abs(math.log10(point["train.lr"]) + 1) for point in first[-10:]]
    assert sum(late) / 10 < 1, "uniform draws are 1.25 away on average"
