"""Tail energy and factor bias of the global model's factors."""

import itertools

import pytest
import torch
from torch import Tensor

from fedmaestro.rounds import spectrum
from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.strategies.base import Partial
from fedmaestro.submodel import State, cut

RULE = AGGREGATIONS["coverage-mean"]


def factors(spectrum_: list[float], out: int = 7, inner: int = 5, seed: int = 0) -> State:
    """A pair whose product has these singular values, in a random basis of its columns."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(spectrum_)
    q, p = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in (out, inner))
    mix = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    return {"a.u": q @ torch.diag(torch.tensor(spectrum_, dtype=torch.float64)) @ mix, "a.v": mix.inverse() @ p.T}


def test_tail_energy_is_that_of_the_singular_values_whatever_the_basis() -> None:
    state = factors([3.0, 2.0, 1.0])
    assert spectrum.tail_energy(state, {"a": 1}) == pytest.approx(5 / 14)
    assert spectrum.tail_energy(state, {"a": 2}) == pytest.approx(1 / 14)
    assert spectrum.tail_energy(state, {"a": 3}) == pytest.approx(0, abs=1e-12)


def test_tail_energy_is_a_mean_over_layers_with_energy() -> None:
    one, other = factors([1.0, 1.0]), factors([1.0, 0.0], seed=1)
    state = one | {"b.u": other["a.u"], "b.v": other["a.v"], "c.u": torch.zeros(3, 2), "c.v": torch.zeros(2, 3)}
    assert spectrum.tail_energy(state, {"a": 1, "b": 1, "c": 1}) == pytest.approx(0.25)
    assert spectrum.tail_energy({"fc.weight": torch.ones(3, 3)}, {}) is None


def test_probes_of_segments_add_up_to_the_product() -> None:
    state = factors([3.0, 2.0, 1.0, 0.5])
    parts = spectrum.probe(state, {"a": [0, 1, 3, 4]})["a"]
    whole = spectrum.probe(state, {"a": [0, 4]})["a"]
    torch.testing.assert_close(parts.sum(0), whole[0])
    smaller = spectrum.probe({"a.u": state["a.u"][:, :1], "a.v": state["a.v"][:1]}, {"a": [0, 1, 3, 4]})["a"]
    torch.testing.assert_close(smaller[0], parts[0])
    assert float(smaller[1:].abs().sum()) == 0


def bias_of(before: State, devices: list[State], weights: list[int], ends: dict[str, list[int]]) -> float | None:
    partial: Partial = RULE.init(before)
    sums: dict[str, Tensor] = {}
    for device, weight in zip(devices, weights, strict=True):
        partial = RULE.add(partial, device, weight)
        sums = {x: weight * m + sums.get(x, 0.0) for x, m in spectrum.probe(device, ends).items()}
    return spectrum.factor_bias(sums, partial, RULE.finish(partial, before), before, ends)


def dense_bias(before: State, devices: list[State], weights: list[int], ends: list[int]) -> float:
    """The definition, with whole matrices."""
    error = torch.zeros(7, 5, dtype=torch.float64)
    step = torch.zeros(7, 5, dtype=torch.float64)
    for start, end in itertools.pairwise(ends):
        held = [(d, n) for d, n in zip(devices, weights, strict=True) if d["a.u"].shape[1] >= end]
        if not held:
            continue
        total = sum(n for _, n in held)
        u = sum(n * d["a.u"][:, start:end] for d, n in held) / total
        v = sum(n * d["a.v"][start:end] for d, n in held) / total
        product = sum(n * d["a.u"][:, start:end] @ d["a.v"][start:end] for d, n in held) / total
        error += product - u @ v
        step += product - before["a.u"][:, start:end] @ before["a.v"][start:end]
    return float(error.norm() / step.norm())


def test_factor_bias_is_near_its_definition() -> None:
    before = factors([3.0, 2.0, 1.0, 0.5])
    generator = torch.Generator().manual_seed(5)
    devices = [
        {
            name: x + 1.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            for name, x in cut(before, shapes).items()
        }
        for shapes in [{"a.u": (7, r), "a.v": (r, 5)} for r in (1, 2, 2, 4)]
    ]
    weights = [10, 20, 5, 40]
    expected = dense_bias(before, devices, weights, [0, 1, 2, 4])
    found = bias_of(before, devices, weights, {"a": [0, 1, 2, 4]})
    assert expected > 0.05
    # Eight probes estimate a squared norm to about 1/√8 of its rank's share.
    assert found == pytest.approx(expected, rel=0.5)


def test_one_device_or_a_common_factor_has_no_bias() -> None:
    before = factors([3.0, 2.0, 1.0, 0.5])
    moved = {name: 1.1 * tensor for name, tensor in before.items()}
    assert bias_of(before, [moved], [3], {"a": [0, 4]}) == pytest.approx(0, abs=1e-12)
    other = {"a.u": before["a.u"] + 1.0, "a.v": moved["a.v"]}
    assert bias_of(before, [moved, other], [3, 4], {"a": [0, 4]}) == pytest.approx(0, abs=1e-12)
