"""Dense → LoD → cut → dense. Shapes: ``O`` out, ``I`` in, ``R`` full rank, ``r`` prefix, ``k×l`` kernel."""
# ruff: noqa: E741, N803 (O, I, R, k, l are the shape letters)

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError

CONVS = [
    {"kernel_size": (3, 2)},
    {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": (3, 3), "padding": 1, "bias": False},
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (2, 1), "dilation": (3, 2), "bias": False},
]
CHANNELS = [(2, 7), (7, 2), (9, 4)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def network() -> nn.Sequential:
    """Non-square everywhere: conv ``R = min(5, 3·3·2)``, linear ``R = 4``."""
    return nn.Sequential(
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 3 * 7, 4)
    ).double()


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---------------------------------------------------------------- factorize


@pytest.mark.parametrize(("O", "I"), [(3, 8), (8, 3), (1, 6), (6, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_factorised_linear_layer_computes_the_same(O: int, I: int, bias: bool) -> None:
    dense = nn.Linear(I, O, bias=bias).double()
    layer = lod.factorize(dense)
    assert isinstance(layer, lod.LoDLinear)
    assert (layer.u.shape, layer.v.shape, layer.rank) == ((O, min(O, I)), (min(O, I), I), min(O, I))
    assert (layer.bias is None) is not bias
    x = torch.randn(2, 3, I).double()
    close(layer(x), dense(x))


@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize(("I", "O"), CHANNELS)
def test_a_factorised_convolution_computes_the_same(I: int, O: int, options: dict[str, object]) -> None:
    dense = nn.Conv2d(I, O, **options).double()  # type: ignore[arg-type]
    layer = lod.factorize(dense)
    assert isinstance(layer, lod.LoDConv2d)
    k, l = dense.kernel_size
    R = min(O, I * k * l)
    assert (layer.u.shape, layer.v.shape) == ((O, R), (R, I, k, l))
    x = torch.randn(2, I, 11, 10).double()
    close(layer(x), dense(x))


def test_factors_are_balanced() -> None:
    dense = network()
    for name, layer in lod.layers(lod.factorize(dense)).items():
        weight = dense.get_submodule(name).weight.detach().flatten(1).numpy()
        root = np.sqrt(np.linalg.svd(weight, compute_uv=False))
        np.testing.assert_allclose(layer.u.detach().norm(dim=0), root, rtol=1e-12)
        np.testing.assert_allclose(layer.v.detach().flatten(1).norm(dim=1), root, rtol=1e-12)


@settings(max_examples=20)
@given(O=st.integers(1, 12), I=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_prefix_is_the_best_approximation_of_its_rank(O: int, I: int, seed: int) -> None:
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, v = lod.balanced_svd(weight)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    for r in range(min(O, I) + 1):  # Eckart and Young: the error is the tail of the spectrum
        error = float((weight - u[:, :r] @ v[:r]).norm())
        assert error == pytest.approx(float(np.sqrt((sigma[r:] ** 2).sum())), rel=1e-9, abs=1e-12)


def test_factorize_does_not_change_the_dense_model() -> None:
    dense = network()
    before = copy.deepcopy(dense.state_dict())
    with torch.no_grad():
        for parameter in lod.factorize(dense).parameters():
            parameter.add_(1.0)
    assert all(isinstance(dense[i], kind) for i, kind in ((0, nn.Conv2d), (3, nn.Linear)))
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_skipped_layers_stay_dense() -> None:
    model = lod.factorize(network(), skip=["3"])
    assert list(lod.layers(model)) == ["0"]
    assert isinstance(model.get_submodule("3"), nn.Linear)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"groups": 2}, "groups=2"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"),
    ],
)
def test_unsupported_convolutions_are_refused_unless_skipped(options: dict[str, object], shown: str) -> None:
    model = nn.ModuleDict({"stem": nn.Conv2d(4, 6, 3, **options)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"'stem' cannot be factorised.*{shown}"):
        lod.factorize(model)
    assert not lod.layers(lod.factorize(model, skip=["stem"]))


class Tied(nn.Module):
    """Two linear layers and an embedding with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.encoder, self.head = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.encoder.weight = self.head.weight = self.table.weight


def test_tied_weights_are_refused_unless_skipped() -> None:
    model = Tied()
    with pytest.raises(UserError, match=r"'table' and 'encoder' share a parameter.*add 'encoder' to skip"):
        lod.factorize(model)
    with pytest.raises(UserError, match=r"'table' and 'head' share a parameter.*add 'head' to skip"):
        lod.factorize(model, skip=["encoder"])
    kept = lod.factorize(model, skip=["encoder", "head"])
    assert kept.get_submodule("encoder").weight is kept.get_submodule("head").weight
    pair = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    pair["head"].weight = pair["encoder"].weight
    with pytest.raises(UserError, match=r"'encoder' and 'head' share .*add 'encoder' and 'head' to skip"):
        lod.factorize(pair)


@pytest.mark.parametrize(("weight", "bias"), [(False, True), (True, False), (False, False)])
def test_frozen_parameters_stay_frozen(weight: bool, bias: bool) -> None:
    dense = network()
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(weight if name.endswith("weight") else bias)
    model = lod.factorize(dense)
    lod.set_ranks(model, {"0": 1, "3": 4})
    recomposed = lod.recompose(model)
    assert isinstance(recomposed.get_submodule("3"), nn.Linear)
    assert isinstance(recomposed.get_submodule("0"), lod.LoDConv2d)
    for other in (model, lod.truncate(model, {"0": 2, "3": 1}), recomposed):
        for name, parameter in other.named_parameters():
            assert parameter.requires_grad == (bias if name.endswith("bias") else weight), name


# ---------------------------------------------------------------- truncate


@settings(max_examples=15)
@given(ranks=st.fixed_dictionaries({"0": st.integers(0, 5), "3": st.integers(0, 4)}))
def test_a_cut_model_computes_what_the_prefix_does_and_keeps_no_tail(ranks: dict[str, int]) -> None:
    model = lod.factorize(network())
    small = lod.truncate(model, ranks)
    lod.set_ranks(model, ranks)
    close(small(IMAGES), model(IMAGES))
    assert lod.max_ranks(small) == ranks
    for name, layer in lod.layers(small).items():
        assert layer.rank == ranks[name]
        for whole in (layer.u, layer.v):
            assert whole.untyped_storage().nbytes() == whole.numel() * 8


def test_truncate_leaves_the_original_alone() -> None:
    model = lod.factorize(network())
    lod.set_ranks(model, {"3": 3})
    before = copy.deepcopy(model.state_dict())
    small = lod.truncate(model, {"0": 2, "3": 1})
    assert small(IMAGES).sum().backward() is None
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: layer.rank for name, layer in lod.layers(model).items()} == {"0": 5, "3": 3}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_cut_model_cannot_be_grown() -> None:
    small = lod.truncate(lod.factorize(network()), {"0": 2})
    with pytest.raises(UserError, match="between 0 and 2"):
        lod.truncate(small, {"0": 3})
    with pytest.raises(UserError, match="unknown LoD layer"):
        lod.truncate(small, {"1": 1})


# ---------------------------------------------------------------- recompose


@settings(max_examples=25)
@given(r0=st.integers(0, 5), r3=st.integers(0, 4))
def test_recompose_keeps_the_function_and_never_grows(r0: int, r3: int) -> None:
    model = lod.factorize(network())
    lod.set_ranks(model, {"0": r0, "3": r3})
    small = lod.truncate(model, {"0": r0, "3": r3})
    recomposed = lod.recompose(model)
    close(recomposed(IMAGES), model(IMAGES))
    assert sum(p.numel() for p in recomposed.parameters()) <= sum(p.numel() for p in small.parameters())
    is_dense = {name: not isinstance(recomposed.get_submodule(name), lod.LoDLayer) for name in ("0", "3")}
    O, inner = 5, 3 * 3 * 2
    assert is_dense["0"] == (r0 * (O + inner) >= O * inner)  # R* = 90 / 23, so from rank 4 on
    assert is_dense["3"] == (r3 * (4 + 105) >= 4 * 105)


@settings(max_examples=25)
@given(O=st.integers(1, 10), I=st.integers(1, 10), data=st.data())
def test_dense_exactly_from_break_even_on(O: int, I: int, data: st.DataObject) -> None:
    assume(O != I)
    model = lod.factorize(nn.Linear(I, O).double())
    r = data.draw(st.integers(0, min(O, I)), label="r")
    lod.set_ranks(model, {"": r})
    recomposed = lod.recompose(model)
    assert isinstance(recomposed, nn.Linear) == (r * (O + I) >= O * I)


def test_a_recomposed_convolution_keeps_its_geometry() -> None:
    dense = nn.Conv2d(2, 7, (2, 3), stride=(1, 3), padding=(2, 1), dilation=(3, 2)).double()
    recomposed = lod.recompose(lod.factorize(dense))
    assert isinstance(recomposed, nn.Conv2d)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(recomposed, name) == getattr(dense, name)
    close(recomposed.weight, dense.weight)


# ---------------------------------------------------------------- the root itself
