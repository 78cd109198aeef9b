"""Closed-form costs against measurements. ``O`` out, ``I`` in times kernel, ``r`` prefix."""

from fractions import Fraction
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro import lod
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import Cost, Trace, cost, trace
from fedmaestro.models import MODELS, example_inputs
from fedmaestro.models.architecture import FULL, Architecture, Form

INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (2, 5, 4),
    "lenet": (2, 17, 16),
    "cnn": (2, 9, 8),
    "conv": (2, 9, 8),
    "resnet18": (2, 8, 7),
    "vgg19": (2, 32, 33),
    "transformer": (4,),
    "transformer-small": (6,),
}
TEXT = ("transformer", "transformer-small")  # dense, they have one size
LARGE = ("resnet18", "vgg19", "transformer")
FRACTIONS = {name: [Fraction(1, 7)] if name in LARGE else [Fraction(1, 16), Fraction(2, 5), FULL] for name in MODELS}
CELLS: list[tuple[str, Form, Fraction]] = [
    *((name, "lod", fraction) for name in MODELS for fraction in FRACTIONS[name]),
    *((name, "dense", fraction) for name in MODELS if name not in TEXT for fraction in FRACTIONS[name]),
    *((name, "dense", FULL) for name in TEXT),
]
NET_SHAPE = (2, 7, 6)


@cache
def architecture(name: str, form: Form) -> Architecture:
    return Architecture(name=name, input_shape=INPUT_SHAPES[name], num_classes=7, form=form)


@cache
def traced(name: str, form: Form, width: Fraction = FULL) -> Trace:
    arch = Architecture(name=name, input_shape=INPUT_SHAPES[name], num_classes=7, form=form)
    return trace(arch.build(arch.size_at(width)), arch.input_shape)


def closed_form(arch: Architecture, fraction: Fraction, *, batch_size: int = 1, slots: bool = False) -> Cost:
    width = fraction if arch.form == "dense" else FULL
    ranks = arch.size_at(fraction).ranks or {}
    return cost(traced(arch.name, arch.form, width), ranks, batch_size=batch_size, slots=slots)


def counted_macs(model: nn.Module, *inputs: Tensor, backward: bool) -> int:
    """MACs of one example in linear and convolution layers, from PyTorch's counter: a MAC is two FLOPs."""
    with FlopCounterMode(display=False) as counter:
        loss = model(*inputs).sum()
        if backward:
            loss.backward()
    flops = counter.get_flop_counts()["Global"]
    between_activations = flops.pop(torch.ops.aten.bmm, 0)  # inside attention
    assert (between_activations > 0) == (len(inputs) == 2)
    macs, rest = divmod(sum(flops.values()), 2 * len(inputs[0]))
    assert rest == 0
    return macs


def random_inputs(input_shape: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
    if len(input_shape) == 1:
        return torch.randint(1, 7, (batch, *input_shape)), torch.randint(1, 7, (batch, *input_shape))
    return (torch.randn(batch, *input_shape),)


def kept_bytes(model: nn.Module, input_shape: tuple[int, ...], batch: int) -> int:
    """What autograd holds when the backward pass starts, less parameters: every storage once, all kept alive."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(*random_inputs(input_shape, batch)).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in own)


def activation_bytes(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Bytes per further example: a loss also keeps what does not grow with the batch."""
    growth, rest = divmod(kept_bytes(model, input_shape, 5) - kept_bytes(model, input_shape, 2), 3)
    assert rest == 0
    return growth


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize(("name", "form", "fraction"), CELLS)
def test_macs_are_those_that_pytorch_counts(name: str, form: Form, fraction: Fraction) -> None:
    arch = architecture(name, form)
    model = arch.build(arch.size_at(fraction))
    with torch.device("meta"):
        inputs = example_inputs(arch.input_shape, 3)
    expected = closed_form(arch, fraction)
    assert counted_macs(model, *inputs, backward=False) == expected.macs_per_example
    assert counted_macs(model, *inputs, backward=True) == expected.train_macs_per_example


@pytest.mark.parametrize(("name", "form", "fraction"), CELLS)
def test_parameters_traffic_and_memory_are_those_of_the_real_model(name: str, form: Form, fraction: Fraction) -> None:
    arch = architecture(name, form)
    model = zeroed(arch.materialize(arch.size_at(fraction)))
    numel = sum(parameter.numel() for parameter in model.parameters())
    actual = closed_form(arch, fraction, batch_size=6)
    assert actual.params == numel
    assert actual.download_bytes == actual.upload_bytes == 4 * sum(t.numel() for t in model.state_dict().values())
    assert actual.train_memory_bytes == 2 * 4 * numel + 6 * activation_bytes(model, arch.input_shape)


def test_momentum_adds_one_copy_of_the_parameters() -> None:
    arch = architecture("cnn", "lod")
    without, with_momentum = (closed_form(arch, Fraction(1, 3), slots=m) for m in (False, True))
    assert with_momentum.train_memory_bytes - without.train_memory_bytes == without.download_bytes
    assert with_momentum.train_macs_per_example == without.train_macs_per_example


# ---------------------------------------------------------------- any ranks, on a small net


@cache
def net() -> nn.Module:
    """LoD convolutions and linear layers with a dense one between them; the first layer sees the images."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 9, 2, dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(9 * 3 * 5, 11),
        nn.ReLU(),
        nn.Linear(11, 6),
    )
    return lod.factorize(dense, skip=["2"])


@cache
def net_trace() -> Trace:
    return trace(net(), NET_SHAPE)


MAX_RANKS = {"0": 5, "5": 11, "7": 6}
RANKS = st.fixed_dictionaries({name: st.integers(1, R) for name, R in MAX_RANKS.items()})


@settings(max_examples=25)
@given(ranks=RANKS)
def test_costs_at_any_ranks_are_measured_costs(ranks: dict[str, int]) -> None:
    model = lod.truncate(net(), ranks)
    expected = cost(net_trace(), ranks, batch_size=4, slots=True)
    images = torch.zeros(2, *NET_SHAPE)
    assert counted_macs(model, images, backward=False) == expected.macs_per_example
    assert counted_macs(model, images, backward=True) == expected.train_macs_per_example
    params = sum(parameter.numel() for parameter in model.parameters())
    assert expected.params == params
    assert expected.train_memory_bytes == 3 * 4 * params + 4 * activation_bytes(model, NET_SHAPE)


@settings(max_examples=50)
@given(ranks=RANKS, name=st.sampled_from(sorted(MAX_RANKS)), slots=st.booleans())
def test_every_figure_grows_with_every_rank(ranks: dict[str, int], name: str, slots: bool) -> None:
    smaller = {**ranks, name: ranks[name] - 1}
    low, high = (cost(net_trace(), r, batch_size=3, slots=slots) for r in (smaller, ranks))
    for figure in vars(low):
        assert getattr(low, figure) < getattr(high, figure)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"0": 1, "5": 1}, "no rank for LoD layer '7'"),
        ({**MAX_RANKS, "2": 1}, "unknown LoD layer '2': .*valid: 0, 5, 7"),  # a dense layer of the trace
        ({**MAX_RANKS, "5": 12}, "rank of layer '5' must be between 0 and 11, got 12"),
        ({**MAX_RANKS, "5": -1}, "rank of layer '5' must be between 0 and 11, got -1"),
        ({**MAX_RANKS, "5": 2.5}, "rank of layer '5' must be an integer, got 2.5"),
    ],
)
def test_wrong_ranks_are_refused(ranks: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost(net_trace(), ranks, batch_size=1)


def test_a_dense_trace_takes_no_ranks() -> None:
    with pytest.raises(UserError, match="unknown LoD layer 'fc1': valid: none"):
        cost(traced("mlp", "dense"), {"fc1": 1}, batch_size=1)
