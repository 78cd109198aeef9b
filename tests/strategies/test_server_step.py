"""A chain of server steps, and the memory that its links keep."""

import torch

from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.server_step import ChainMemory, Memory, Round, ServerStep, run_chain
from fedmaestro.strategies.tables import SERVER_STEPS, chain_of
from fedmaestro.submodel import State


def state_of(value: float) -> State:
    return {"a.u": torch.full((3, 2), value), "a.v": torch.full((2, 4), value), "a.bias": torch.full((3,), value)}


def a_round(number: int, before: State) -> Round:
    partial = COVERAGE_MEAN.add(COVERAGE_MEAN.init(before), before, 1)
    return Round(number=number, before=before, partial=partial, aggregation=COVERAGE_MEAN)


def average(state: State, memory: Memory, _: Round) -> tuple[State, Memory]:
    """Half of an exponential average, half of the model."""
    mixed = {name: 0.5 * memory["mean"][name] + 0.5 * tensor for name, tensor in state.items()}
    return mixed, {"mean": mixed}


EMA = ServerStep(name="ema", init=lambda state: {"mean": dict(state)}, apply=average)
DOUBLE = ServerStep(
    name="double", apply=lambda s, memory, _: ({name: 2 * tensor for name, tensor in s.items()}, memory)
)


def test_links_come_in_their_order_and_each_has_a_memory_of_its_own() -> None:
    memory: ChainMemory = {}
    state = state_of(0.0)
    values = []
    for number in (1, 2):
        state, memory = run_chain((DOUBLE, EMA), state_of(1.0), memory, a_round(number, state_of(0.0)))
        values.append(float(state["a.bias"][0]))
    assert values == [1.0, 1.5], "0.5 · 0 + 0.5 · 2, then 0.5 · 1 + 0.5 · 2: the memory starts from the round's model"
    assert list(memory) == ["ema"], "what keeps nothing has no memory"
    (state, _) = run_chain((EMA, DOUBLE), state_of(1.0), {}, a_round(1, state_of(0.0)))
    assert float(state["a.bias"][0]) == 1.0


def test_a_new_basis_leaves_no_memory_of_factors() -> None:
    turn = ServerStep(name="turn", rebases=lambda number: number == 2)
    memory: ChainMemory = {}
    for number, names in ((1, {"a.u", "a.v", "a.bias"}), (2, {"a.bias"})):
        _, memory = run_chain((EMA, turn), state_of(1.0), memory, a_round(number, state_of(0.0)))
        assert memory["ema"]["mean"].keys() == names


def test_a_plain_chain_takes_the_aggregate_as_it_is() -> None:
    from fedmaestro.strategies.rows import PLAIN

    chain = chain_of(PLAIN.get)
    assert [step.name for step in chain] == list(SERVER_STEPS)
    state = state_of(1.0)
    new, memory = run_chain(chain, state, {}, a_round(1, state_of(0.0)))
    assert all(torch.equal(new[name], tensor) for name, tensor in state.items())
    assert memory == {}
    started = state
    for step in chain:
        started = step.start(started, {"a": torch.tensor([5.0, 1.0])})
    assert all(torch.equal(started[name], tensor) for name, tensor in state.items())
