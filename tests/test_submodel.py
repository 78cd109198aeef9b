import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmaestro.submodel import cut, leading_block, load, num_elements, shapes_of

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


@settings(max_examples=50)
@given(full=SHAPES, data=st.data())
def test_a_leading_block_holds_the_entries_of_low_index(full: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.arange(torch.Size(full).numel()).reshape(full)
    shape = tuple(data.draw(st.integers(0, n)) for n in full)
    block = leading_block(tensor, shape)
    assert block.shape == shape
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist() if shape else [[]]:
        assert block[tuple(index)] == tensor[tuple(index)]


def test_a_leading_block_is_a_view() -> None:
    full = torch.zeros(4, 3)
    leading_block(full, (2, 1)).fill_(1.0)
    assert torch.equal(full, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (4,), (4, 3, 1), ()])
def test_blocks_that_do_not_lead_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not lead"):
        leading_block(torch.zeros(4, 3), shape)


def test_cutting_a_cut_is_cutting_once() -> None:
    state = {"u": torch.randn(7, 4), "v": torch.randn(4, 2, 3, 5), "bias": torch.randn(7)}
    middle = {"u": (7, 3), "v": (3, 2, 3, 5), "bias": (7,)}
    small = {"u": (7, 1), "v": (1, 2, 3, 5), "bias": (7,)}
    twice = cut(cut(state, middle), small)
    for name, tensor in cut(state, small).items():
        assert torch.equal(tensor, twice[name])
        assert twice[name].data_ptr() == state[name].data_ptr()


def test_shapes_and_their_scalars() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    shapes = shapes_of(model)
    assert shapes == shapes_of(model.state_dict())
    assert shapes["0.weight"] == (5, 3)
    assert shapes["1.num_batches_tracked"] == ()
    assert num_elements(shapes) == 15 + 5 + 4 * 5 + 1


def test_load_copies_in_place_and_keeps_the_memory_format() -> None:
    model = nn.Conv2d(3, 5, (2, 3)).to(memory_format=torch.channels_last)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    pointer = model.weight.data_ptr()
    load(model, state)
    assert model.weight.data_ptr() == pointer
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.requires_grad
    assert torch.equal(model.weight, state["weight"])
    state["weight"].zero_()
    assert model.weight.any()


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias", "scale"), ("weight", "scale")])
def test_load_refuses_other_names(names: tuple[str, ...]) -> None:
    model = nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "scale": torch.zeros(1)}
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"differ in .*(bias|scale)"):
        load(model, {name: state[name] for name in names})
    assert torch.equal(model.weight, before)


def test_load_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="shapes"):
        load(nn.Linear(2, 3), {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})
