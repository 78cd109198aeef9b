"""Server optimisers: two steps by hand, entries without contributors, damping, memory.

By hand, with ``x = 1``, ``β₁ = 0.9``, ``β₂ = 0.99``, ``τ = 0.001`` and pseudo-gradients ``Δ = 0.5``, then ``-0.25``::

    momentum, lr 0.5   m = 0.5;  x = 1 + 0.25;      m = 0.45 - 0.25 = 0.2;  x = 1.25 + 0.1 = 1.35
    adam, lr 0.1       m = 0.05; v = 0.0025;        x = 1 + 0.1·0.05/(0.05 + 0.001)
                       m = 0.045 - 0.025 = 0.02;    v = 0.99·0.0025 + 0.01·0.0625 = 0.0031;  x += 0.1·0.02/(√v + 0.001)
    yogi, lr 0.1       the same first step (v = 0 - 0.01·0.25·sign(0 - 0.25) = 0.0025)
                       v < Δ², so v = 0.0025 + 0.01·0.0625 = 0.003125;                       x += 0.1·0.02/(√v + 0.001)

With ``Δ = 0.01`` in the second step ``v > Δ²``: adam has ``v = 0.99·0.0025 + 0.01·0.0001 = 0.002476``, yogi
``v = 0.0025 - 0.01·0.0001 = 0.002499``, and both ``m = 0.045 + 0.001 = 0.046``.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from fedmaestro.errors import UserError
from fedmaestro.strategies.base import add_to_leading_block
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.server_optimizers import ServerOptimizer, optimize
from fedmaestro.strategies.server_step import Memory, Round
from fedmaestro.submodel import State

MOMENTUM = ServerOptimizer(name="momentum", lr=0.5)
ADAM = ServerOptimizer(name="adam", lr=0.1)
YOGI = ServerOptimizer(name="yogi", lr=0.1)
STATEFUL = [MOMENTUM, ADAM, YOGI]
NAMES = ["momentum", "adam", "yogi"]


def run(optimizer: ServerOptimizer, deltas: Sequence[float]) -> tuple[float, dict[str, float]]:
    """Return the value that starts at 1 and the memory, after one step for each pseudo-gradient."""
    state: State = {"x": torch.tensor([1.0], dtype=torch.float64)}
    memory: Memory = {}
    for delta in deltas:
        state, memory = optimizer.step(state, {"x": state["x"] + delta}, memory)
    return state["x"].item(), {slot: moments["x"].item() for slot, moments in memory.items()}


FIRST = 1 + 0.1 * 0.05 / 0.051  # 1.098039…


@pytest.mark.parametrize(
    ("optimizer", "deltas", "value", "memory"),
    [
        (MOMENTUM, [0.5], 1.25, {"momentum": 0.5}),
        (MOMENTUM, [0.5, -0.25], 1.35, {"momentum": 0.2}),
        (ADAM, [0.5], FIRST, {"momentum": 0.05, "second-moment": 0.0025}),
        (ADAM, [0.5, -0.25], 1.13332650, {"momentum": 0.02, "second-moment": 0.0031}),
        (ADAM, [0.5, 0.01], 1.18866279, {"momentum": 0.046, "second-moment": 0.002476}),
        (YOGI, [0.5], FIRST, {"momentum": 0.05, "second-moment": 0.0025}),
        (YOGI, [0.5, -0.25], 1.13318755, {"momentum": 0.02, "second-moment": 0.003125}),
        (YOGI, [0.5, 0.01], 1.18825298, {"momentum": 0.046, "second-moment": 0.002499}),
    ],
)
def test_steps_by_hand(optimizer: ServerOptimizer, deltas: list[float], value: float, memory: dict[str, float]) -> None:
    actual, kept = run(optimizer, deltas)
    assert actual == pytest.approx(value, abs=1e-8)
    assert kept == pytest.approx(memory, rel=1e-12)


def test_momentum_is_that_of_sgd() -> None:
    """On the gradient ``-Δ``."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    sgd = torch.optim.SGD([parameter], lr=0.5, momentum=0.9)
    state, memory = {"x": parameter.detach().clone()}, {}
    for k in range(5):
        delta = torch.tensor([0.1 * k - 0.3, 0.7 - k])
        parameter.grad = -delta
        sgd.step()
        state, memory = MOMENTUM.step(state, {"x": state["x"] + delta}, memory)
        torch.testing.assert_close(state["x"], parameter.detach())


# ---------------------------------------------------------------- who contributed


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def counts(shape: tuple[int, int], blocks: Mapping[tuple[int, int], int]) -> Tensor:
    total = torch.zeros(shape)
    for block, devices in blocks.items():
        add_to_leading_block(total, float(devices), block)
    return total


@pytest.mark.parametrize("optimizer", [*STATEFUL, ServerOptimizer(name="none", damping=2.0)], ids=[*NAMES, "none"])
def test_entries_without_contributors_keep_value_and_moments_bit_for_bit(optimizer: ServerOptimizer) -> None:
    """Also when the aggregation hands over something else there; they take up again where they were."""
    state = {"u": random((4, 3), 0), "bias": random((4,), 1)}
    everyone = {"u": torch.full((4, 3), 2.0), "bias": torch.full((4,), 2.0)}
    state, memory = optimizer.step(state, {n: x + random(tuple(x.shape), 2) for n, x in state.items()}, {}, everyone)
    aggregated = {n: x + random(tuple(x.shape), 3) for n, x in state.items()}
    aggregated["u"][0, 2] = torch.nan
    some = {"u": counts((4, 3), {(4, 2): 1}), "bias": torch.zeros(4)}
    new, kept = optimizer.step(state, aggregated, memory, some)
    assert torch.equal(new["u"][:, 2], state["u"][:, 2])
    assert not torch.isclose(new["u"][:, :2], state["u"][:, :2], rtol=1e-6, atol=0).any()
    assert torch.equal(new["bias"], state["bias"])
    assert kept.keys() == memory.keys()
    for slot, moments in kept.items():
        assert torch.equal(moments["bias"], memory[slot]["bias"])
        assert torch.equal(moments["u"][:, 2], memory[slot]["u"][:, 2])
        assert not torch.equal(moments["u"][:, :2], memory[slot]["u"][:, :2])


# ---------------------------------------------------------------- damping


@pytest.mark.parametrize(("devices", "share"), [(2, 0.5), (6, 0.75), (1, 1 / 3), (1e12, 1.0)])
@pytest.mark.parametrize("name", ["none", *NAMES])
def test_damping_scales_the_step_and_not_the_moments(name: str, devices: float, share: float) -> None:
    """``N / (N + 2)`` of the step."""
    state, aggregated = {"x": random((3, 2), 0).double()}, {"x": random((3, 2), 1).double()}
    count = {"x": torch.full((3, 2), devices)}
    damped, kept = ServerOptimizer(name=name, damping=2.0).step(state, aggregated, {}, count)  # type: ignore[arg-type]
    free, expected = ServerOptimizer(name=name).step(state, aggregated, {}, count)  # type: ignore[arg-type]
    torch.testing.assert_close(damped["x"] - state["x"], share * (free["x"] - state["x"]), rtol=1e-6, atol=1e-9)
    assert kept.keys() == expected.keys()
    assert all(torch.equal(moments["x"], expected[slot]["x"]) for slot, moments in kept.items())


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("optimizer", STATEFUL, ids=NAMES)
def test_inputs_are_not_modified_and_types_are_kept(optimizer: ServerOptimizer) -> None:
    for dtype in (torch.float32, torch.float64):
        state, aggregated = {"x": random((3,), 0).to(dtype)}, {"x": random((3,), 1).to(dtype)}
        _, memory = optimizer.step(state, aggregated, {})
        inputs = (state, aggregated, memory, {"x": torch.tensor([0.0, 1.0, 2.0])})
        before = deepcopy(inputs)
        new, kept = optimizer.step(*inputs)
        for tensor in (new["x"], *(moments["x"] for moments in kept.values())):
            assert tensor.dtype == dtype
            tensor.zero_()
        for value, copy in zip((state, aggregated, *memory.values()), (*before[:2], *before[2].values()), strict=True):
            assert torch.equal(value["x"], copy["x"])


def test_a_step_takes_its_constants_from_the_settings_and_the_optimisers_own() -> None:
    state, aggregated = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    partial = COVERAGE_MEAN.add(COVERAGE_MEAN.init(state), aggregated, 1)
    this = Round(number=1, before=state, partial=partial, aggregation=COVERAGE_MEAN)
    for lr, expected in ((None, 0.03), (0.5, 0.5)):
        new, memory = optimize("adam", lr, 0.9, 0.0).apply(aggregated, {}, this)
        by_hand, moments = ServerOptimizer(name="adam", lr=expected).step(state, aggregated, {})
        assert torch.equal(new["x"], by_hand["x"])
        assert memory.keys() == moments.keys()
    with pytest.raises(UserError, match=r"server\.optimizer 'adm': did you mean 'adam'"):
        optimize("adm", None, 0.9, 0.0)
