"""LoD layers at rank prefixes. Shapes: ``O`` out, ``I`` in, ``R`` full rank, ``r`` prefix, ``k×l`` kernel."""
# ruff: noqa: E741, N803 (O, I, R, k, l are the shape letters)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro import lod
from fedmaestro.errors import UserError

GEOMETRIES = [
    {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
    {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 1)},
    {"stride": (1, 2), "padding": (0, 3), "dilation": (2, 1)},
    {"stride": (3, 1), "padding": (2, 2), "dilation": (1, 3)},
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lod_linear(O: int, I: int, R: int, *, bias: bool = True, seed: int = 0) -> lod.LoDLinear:
    return lod.LoDLinear(normal(seed, O, R), normal(seed + 1, R, I), normal(seed + 2, O) if bias else None)


def lod_conv(geometry: dict[str, tuple[int, int]], *, bias: bool = True) -> lod.LoDConv2d:
    O, I, k, l, R = 7, 3, 3, 2, 5
    return lod.LoDConv2d(normal(1, O, R), normal(2, R, I, k, l), normal(3, O) if bias else None, **geometry)


def conv_at(layer: lod.LoDConv2d, r: int, x: Tensor) -> Tensor:
    """The prefix as one dense convolution: its kernel is ``U[:, :r] · V[:r]``."""
    kernel = (layer.u[:, :r] @ layer.v[:r].flatten(1)).reshape(layer.u.shape[0], *layer.v.shape[1:])
    return F.conv2d(x, kernel, layer.bias, layer.stride, layer.padding, layer.dilation)


@settings(max_examples=30)
@given(O=st.integers(1, 9), I=st.integers(1, 9), bias=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_a_linear_prefix_is_the_product_of_the_leading_factors(
    O: int, I: int, bias: bool, seed: int, data: st.DataObject
) -> None:
    R = data.draw(st.integers(1, 9), label="R")
    layer = lod_linear(O, I, R, bias=bias, seed=seed)
    x = normal(seed + 3, *data.draw(st.sampled_from([(I,), (4, I), (2, 3, I)]), label="x"))
    for r in range(R + 1):
        layer.rank = r
        product = layer.u[:, :r] @ layer.v[:r]
        expected = x @ product.T + (layer.bias if bias else 0.0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_conv_prefix_is_the_convolution_with_the_product_kernel(
    geometry: dict[str, tuple[int, int]], bias: bool
) -> None:
    layer = lod_conv(geometry, bias=bias)
    x = normal(9, 2, 3, 11, 9)
    for r in range(layer.max_rank + 1):
        layer.rank = r
        torch.testing.assert_close(layer(x), conv_at(layer, r, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
def test_rank_0_of_a_conv_is_exactly_the_bias_in_the_right_shape(
    geometry: dict[str, tuple[int, int]], bias: bool
) -> None:
    layer = lod_conv(geometry, bias=bias)
    x = normal(9, 2, 3, 12, 10)
    shape = layer(x).shape
    layer.rank = 0
    expected = layer.bias[:, None, None].expand(shape) if layer.bias is not None else torch.zeros(shape).double()
    assert torch.equal(layer(x), expected)


def test_rank_0_still_trains_the_bias() -> None:
    layer = lod_linear(5, 3, 3)
    layer.rank = 0
    layer(normal(1, 4, 3)).sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((5,), 4.0).double())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_of_a_prefix_leave_the_tails_gradient_exactly_zero(kind: str) -> None:
    layer = lod_linear(7, 4, 4) if kind == "linear" else lod_conv(GEOMETRIES[1])
    x = normal(5, 3, 4) if kind == "linear" else normal(5, 2, 3, 8, 8)
    layer.rank = 2
    layer(x).square().sum().backward()
    assert layer.u.grad is not None
    assert layer.v.grad is not None
    assert not layer.u.grad[:, 2:].any()
    assert not layer.v.grad[2:].any()
    assert layer.u.grad[:, :2].all()
    assert layer.v.grad[:2].all()


def test_a_linear_prefix_does_the_work_of_the_prefix_only() -> None:
    B, O, I, R = 3, 11, 7, 7
    layer = lod_linear(O, I, R)
    for r in range(1, R + 1):
        layer.rank = r
        with FlopCounterMode(display=False) as counter:
            layer(normal(0, B, I))
        assert counter.get_total_flops() == 2 * B * r * (I + O)


def test_a_conv_prefix_does_the_work_of_the_prefix_only() -> None:
    layer = lod_conv({"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)})
    x = normal(0, 2, 3, 9, 8)
    positions = layer(x)[0, 0].numel()
    for r in range(1, layer.max_rank + 1):
        layer.rank = r
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 2 * positions * r * (3 * 3 * 2 + 7)


@pytest.mark.parametrize("rank", [2.0, 1.5, True, False, np.bool_(True), np.float64(2), "2", None])
def test_ranks_that_are_no_integers_are_refused(rank: object) -> None:
    layer = lod_linear(5, 4, 4)
    with pytest.raises(UserError, match="must be an integer"):
        layer.rank = rank  # type: ignore[assignment]
    assert layer.rank == 4


@pytest.mark.parametrize("rank", [-1, 5, 10**9])
def test_ranks_out_of_bounds_are_refused(rank: int) -> None:
    layer = lod_linear(5, 4, 4)
    with pytest.raises(UserError, match=f"between 0 and 4, got {rank}"):
        layer.rank = rank
    assert layer.rank == 4


def two_layers() -> nn.Module:
    return lod.factorize(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)))


def test_set_ranks_leaves_layers_that_are_not_named() -> None:
    model = two_layers()
    lod.set_ranks(model, {"0": 3})
    lod.set_ranks(model, {"2": 0})
    assert {name: layer.rank for name, layer in lod.layers(model).items()} == {"0": 3, "2": 0}


@pytest.mark.parametrize("wrong", [{"2": 5}, {"2": 1.0}, {"2": True}, {"2": -1}, {"nine": 1}])
def test_set_ranks_sets_nothing_on_an_error(wrong: dict[str, int]) -> None:
    model = two_layers()
    with pytest.raises(UserError):
        lod.set_ranks(model, {"0": 3, **wrong})
    assert {name: layer.rank for name, layer in lod.layers(model).items()} == {"0": 6, "2": 4}


def test_an_unknown_layer_is_named_with_its_nearest_neighbour() -> None:
    model = lod.factorize(nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 5)}))
    with pytest.raises(UserError, match=r"unknown LoD layer 'encodr': did you mean 'encoder'.*valid: encoder, head"):
        lod.set_ranks(model, {"encodr": 1})
