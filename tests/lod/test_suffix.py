"""Group lasso, importance, strengths. Shapes: ``O`` out, ``I`` in, ``R`` columns held, ``r`` prefix, ``b`` column."""
# ruff: noqa: E741 (O, I, R are the shape letters)

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro import lod

SIZES = st.integers(1, 7)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def models(draw: st.DrawFn) -> nn.ModuleDict:
    """Up to three layers of any shape (``R`` may exceed both sides), some of them cut, some at a prefix."""
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    for i in range(draw(st.integers(1, 3))):
        O, I, R, seed = draw(SIZES), draw(SIZES), draw(SIZES), draw(st.integers(0, 999))
        kernel = draw(st.sampled_from([(), (3, 2), (1, 1)]))
        kind = lod.LoDConv2d if kernel else lod.LoDLinear
        model[f"layer{i}"] = kind(normal(seed, O, R), normal(seed + 1, R, I, *kernel), normal(seed + 2, O))
    names = sorted(lod.layers(model))
    cut = {name: draw(st.integers(0, lod.max_ranks(model)[name])) for name in names if draw(st.booleans())}
    model = lod.truncate(model, cut)
    lod.set_ranks(model, {name: draw(st.integers(0, lod.max_ranks(model)[name])) for name in names})
    return model


def columns(model: nn.Module) -> Iterator[tuple[lod.LoDLayer, int]]:
    for layer in lod.layers(model).values():
        yield from ((layer, b) for b in range(layer.u.shape[1]))


def naive(model: nn.Module) -> Tensor:
    """The formula as it stands in the paper, one norm after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, b in columns(model):
        total = total + layer.u[:, b:].square().sum().sqrt() + layer.v[b:].square().sum().sqrt()
    return total


def gradients(penalty: Tensor, model: nn.Module) -> dict[str, Tensor]:
    factors = {name: p for name, p in model.named_parameters() if name.endswith(("u", "v"))}
    # The double loop does not visit a layer of rank 0.
    found = torch.autograd.grad(penalty, list(factors.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(factors, found, strict=True))


def assert_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------- group lasso


def test_golden_values() -> None:
    """Columns of U of norm 3 and 4, rows of V of norm 12 and 5, so suffix norms (5, 4) and (13, 5)."""
    layer = lod.LoDLinear(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 12.0], [5.0, 0.0]]), None)
    assert lod.group_lasso(layer).item() == 5 + 4 + 13 + 5
    assert lod.importance(layer)[""].tolist() == [5 * 13, 4 * 5]
    assert lod.column_strengths(layer)[""].tolist() == [3 * 12, 4 * 5]


def test_golden_gradient() -> None:
    """d‖x‖/dx = x/‖x‖, once per suffix that holds the entry: column 0 is in one suffix, column 1 in both."""
    layer = lod.LoDLinear(torch.tensor([[3.0, 4.0]]), torch.tensor([[12.0], [5.0]]), None)
    lod.group_lasso(layer).backward()
    assert layer.u.grad is not None
    assert layer.v.grad is not None
    torch.testing.assert_close(layer.u.grad, torch.tensor([[3 / 5, 4 / 5 + 1]]))
    torch.testing.assert_close(layer.v.grad, torch.tensor([[12 / 13], [5 / 13 + 1]]))


@settings(max_examples=60)
@given(model=models())
def test_group_lasso_is_the_double_loop_over_suffixes_whatever_the_prefix(model: nn.Module) -> None:
    assert_close(lod.group_lasso(model).double(), naive(model))


@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 2, 2, 3, 2)])  # O, R, I…
def test_the_gradient_is_the_central_difference(shape: tuple[int, ...]) -> None:
    O, R, *inner = shape
    kind = lod.LoDConv2d if len(inner) > 1 else lod.LoDLinear
    layer = kind(normal(0, O, R), normal(1, R, *inner), None)
    h = 1e-6
    for name, gradient in gradients(lod.group_lasso(layer), layer).items():
        flat = layer.get_parameter(name).detach().view(-1)
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + h
            above = lod.group_lasso(layer).item()
            flat[i] = value - h
            below = lod.group_lasso(layer).item()
            flat[i] = value
            assert (above - below) / (2 * h) == pytest.approx(gradient.view(-1)[i].item(), rel=1e-6, abs=1e-8)


def zeroed(what: str) -> nn.Sequential:
    """Two layers, the first one with exact zeros."""
    first = lod.LoDConv2d(normal(0, 5, 4), normal(1, 4, 2, 3, 2), normal(2, 5))
    with torch.no_grad():
        if what in ("layer", "u"):
            first.u.zero_()
        if what in ("layer", "v"):
            first.v.zero_()
        if what == "tail":
            first.u[:, 2:] = 0
            first.v[2:] = 0
        if what == "head":  # a zero column inside a suffix that is not zero
            first.u[:, :2] = 0
            first.v[:2] = 0
    return nn.Sequential(first, lod.LoDLinear(normal(3, 3, 2), normal(4, 2, 6), None))


@pytest.mark.parametrize("what", ["layer", "u", "v", "tail", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_exact_zeros_are_finite_and_zero_there(what: str, dtype: torch.dtype) -> None:
    model = zeroed(what).to(dtype)
    penalty = lod.group_lasso(model)
    found = gradients(penalty, model)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert not gradient[model.get_parameter(name) == 0].any(), name
    torch.testing.assert_close(penalty.double(), naive(model.double()), rtol=1e-6, atol=0.0)
    assert found["1.u"].all()
    if what == "tail":  # what is left has the gradient of a layer without the tail
        cut = lod.truncate(model, {"0": 2})
        shorter = gradients(naive(cut), cut)
        leading = {"u": found["0.u"][:, :2], "v": found["0.v"][:2]}
        # Suffixes of the zero tail add nothing.
        for name, gradient in leading.items():
            torch.testing.assert_close(gradient.double(), shorter[f"0.{name}"], rtol=1e-5, atol=1e-6)


def test_the_penalty_covers_the_tail_of_a_prefix() -> None:
    layer = lod.LoDLinear(normal(0, 4, 3), normal(1, 3, 4), None)
    full = lod.group_lasso(layer)
    layer.rank = 1
    assert torch.equal(lod.group_lasso(layer), full)
    assert gradients(lod.group_lasso(layer), layer)["u"][:, 2].any()


# ---------------------------------------------------------------- importance and strengths


@settings(max_examples=60)
@given(model=models(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_importance_is_the_formula_and_never_increases(model: nn.Module, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    found = lod.importance(model)
    assert found.keys() == lod.layers(model).keys()
    for name, layer in lod.layers(model).items():
        expected = [(layer.u[:, b:].norm() * layer.v[b:].norm()).item() for b in range(layer.max_rank)]
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)
        assert not (found[name].diff() > 0).any()
        assert not found[name].requires_grad
