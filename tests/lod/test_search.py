"""Greedy search over per-layer ranks."""

from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.lod.search import Ranks, Step, add_columns, greedy_path, levels

# ---------------------------------------------------------------- levels


@settings(max_examples=200)
@given(
    start=st.integers(0, 600),
    ceiling=st.none() | st.integers(1, 700),
    smallest=st.integers(0, 20),
    shrink=st.floats(0.05, 1.0),
)
def test_levels_fall_from_start_to_the_smallest(start: int, ceiling: int | None, smallest: int, shrink: float) -> None:
    if ceiling is not None:
        ceiling = max(ceiling, smallest)
    ladder = levels(start, ceiling=ceiling, smallest=smallest, shrink=shrink)
    assert ladder[0] == start
    assert all(type(rank) is int for rank in ladder)
    assert all(above > below for above, below in pairwise(ladder))
    assert ladder[-1] == min(start, smallest)
    if start <= smallest:
        assert ladder == [start]
    if ceiling is not None:
        assert all(rank <= ceiling for rank in ladder[1:])
    for above, below in pairwise(ladder[1:]):  # never a coarser step than asked for, but for rounding and the last
        assert below >= min(above - 1, round(shrink * above)) or below == smallest


def test_levels_of_golden_values() -> None:
    """round(0.85·9) = 8, round(0.85·8) = 7 (6.8), then round(5.95) = 6, 5 (5.1), 4 (4.25), 3 (3.4), 2, 1."""
    assert levels(10) == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert levels(100, ceiling=40, smallest=10, shrink=0.5) == [100, 40, 20, 10]
    assert levels(100, ceiling=40, smallest=12, shrink=0.5) == [100, 40, 20, 12]
    assert levels(3, smallest=0, shrink=0.5) == [3, 2, 1, 0]
    assert levels(5, smallest=5) == levels(5, smallest=8) == [5]
    assert levels(0, smallest=0) == levels(0) == [0]


# ---------------------------------------------------------------- greedy_path


class Toy:
    """Separable loss, convex in the saving of each layer: each level down costs more per unit saved.

    Attributes:
        ladders: ranks to try, by layer.
        evaluations: how often the loss was asked for.
    """

    def __init__(self, slopes: Mapping[str, list[tuple[int, int]]]) -> None:
        """``slopes``: for each step of a layer, from its first level on, cost saved and loss per cost (ascending)."""
        self.ladders = {name: list(range(len(steps), -1, -1)) for name, steps in slopes.items()}
        self.costs, self.losses = {}, {}
        for name, steps in slopes.items():
            cost, loss = sum(saved for saved, _ in steps), 0
            for i, rank in enumerate(self.ladders[name]):
                self.costs[name, rank], self.losses[name, rank] = cost, loss
                if i < len(steps):
                    cost, loss = cost - steps[i][0], loss + steps[i][0] * steps[i][1]
        self.evaluations = 0

    def cost_of(self, name: str, rank: int) -> float:
        return self.costs[name, rank]

    def loss_of(self, ranks: Ranks) -> float:
        assert ranks.keys() == self.ladders.keys()
        self.evaluations += 1
        return float(sum(self.losses[name, rank] for name, rank in ranks.items()))

    def path(self) -> list[Step]:
        return list(greedy_path(self.ladders, self.cost_of, self.loss_of))

    def brute_force(self) -> list[Ranks]:
        """Look at every layer at every step, in exact arithmetic."""
        ranks = {name: ladder[0] for name, ladder in self.ladders.items()}
        path = [ranks]
        while True:
            options = []
            for name, ladder in self.ladders.items():
                if (position := ladder.index(ranks[name]) + 1) < len(ladder):
                    lower = {**ranks, name: ladder[position]}
                    saved = self.costs[name, ranks[name]] - self.costs[name, lower[name]]
                    loss = self.losses[name, lower[name]] - self.losses[name, ranks[name]]
                    options.append((Fraction(loss, saved), name, lower))
            if not options:
                return path
            ranks = min(options, key=lambda option: option[:2])[2]
            path.append(ranks)


@st.composite
def toys(draw: st.DrawFn) -> Toy:
    """Slopes differ from each other, so that there is one right path."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    distinct = draw(st.permutations(range(1, sum(lengths) + 1)))
    slopes, used = {}, 0
    for i, length in enumerate(lengths):
        ascending = sorted(distinct[used : used + length])
        slopes[f"layer{i}"] = [(draw(st.integers(1, 50)), slope) for slope in ascending]
        used += length
    return Toy(slopes)


@settings(max_examples=150)
@given(toy=toys())
def test_on_a_separable_convex_loss_it_is_the_brute_force_greedy(toy: Toy) -> None:
    found = toy.path()
    assert [step.ranks for step in found] == toy.brute_force()
    assert [step.loss for step in found] == [toy.loss_of(step.ranks) for step in found]


@settings(max_examples=60)
@given(toy=toys(), data=st.data())
def test_a_path_is_nested_from_the_first_levels_to_the_last_whatever_the_loss(toy: Toy, data: st.DataObject) -> None:
    noise = {name: data.draw(st.floats(-3, 3), label=name) for name in toy.ladders}

    def loss_of(ranks: Ranks) -> float:
        return sum(noise[name] * rank for name, rank in ranks.items()) + len(set(ranks.values()))

    path = list(greedy_path(toy.ladders, toy.cost_of, loss_of))
    assert path[0].ranks == {name: ladder[0] for name, ladder in toy.ladders.items()}
    assert path[-1].ranks == {name: ladder[-1] for name, ladder in toy.ladders.items()}
    assert len(path) == 1 + sum(len(ladder) - 1 for ladder in toy.ladders.values())
    for step in path:
        assert step.loss == loss_of(step.ranks)
    for before, after in pairwise(path):
        changed = [name for name in toy.ladders if before.ranks[name] != after.ranks[name]]
        assert len(changed) == 1
        ladder = toy.ladders[changed[0]]
        assert ladder.index(after.ranks[changed[0]]) == ladder.index(before.ranks[changed[0]]) + 1


def test_a_step_that_saves_nothing_divides_by_no_zero() -> None:
    path = greedy_path({"a": [2, 1, 0]}, lambda name, rank: 5.0, lambda ranks: 2.0 - ranks["a"])
    assert [step.ranks["a"] for step in path] == [2, 1, 0]


def test_it_is_lazy_and_a_budget_stops_it() -> None:
    """One evaluation to start, one per layer, then only what is asked for."""
    toy = Toy({f"layer{i}": [(10, i + 1), (10, i + 100)] for i in range(20)})
    path = greedy_path(toy.ladders, toy.cost_of, toy.loss_of)
    next(path)
    assert toy.evaluations == 1
    next(path)
    assert toy.evaluations == 21
    assert len(list(path)) == 39
    # Less than the 20 per step that a search of every layer takes (820 in all); two or three per step.
    assert toy.evaluations <= 1 + 20 + 3 * 40


def test_a_model_of_one_level_is_its_own_path() -> None:
    assert list(greedy_path({"a": [3]}, lambda name, rank: 1.0, lambda ranks: 0.5)) == [Step(ranks={"a": 3}, loss=0.5)]
    assert list(greedy_path({}, lambda name, rank: 1.0, lambda ranks: 0.5)) == [Step(ranks={}, loss=0.5)]


# ---------------------------------------------------------------- single columns


@given(
    limits=st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1),
    prices=st.fixed_dictionaries({layer: st.integers(1, 9) for layer in "abcd"}),
    budget=st.integers(0, 120),
)
def test_columns_are_added_until_no_layer_affords_another(
    limits: dict[str, tuple[int, int]], prices: dict[str, int], budget: int
) -> None:
    ranks = {layer: start for layer, (start, _) in limits.items()}
    most = {layer: start + room for layer, (start, room) in limits.items()}

    def fits(more: Ranks) -> bool:
        return sum(prices[layer] * rank for layer, rank in more.items()) <= budget

    grown = add_columns(ranks, most, lambda layer, rank: -rank, fits)
    assert all(ranks[layer] <= grown[layer] <= most[layer] for layer in ranks)
    assert grown == ranks or fits(grown)
    assert not any(fits({**grown, layer: rank + 1}) for layer, rank in grown.items() if rank < most[layer])


def test_the_column_of_the_highest_worth_is_added_first() -> None:
    worth = {"a": [9.0, 5.0, 1.0], "b": [9.0, 4.0, 3.0]}
    columns = [
        add_columns(
            {"a": 1, "b": 1}, {"a": 3, "b": 3}, lambda x, rank: worth[x][rank], lambda r, n=n: sum(r.values()) <= n
        )
        for n in range(2, 7)
    ]
    assert columns == [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 2}, {"a": 2, "b": 3}, {"a": 3, "b": 3}]
