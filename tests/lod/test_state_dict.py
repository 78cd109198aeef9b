"""Ranks in state dicts: a prefix survives every way of saving that knows tensors and integers."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError

State = dict[str, Any]
FULL = {"0": 5, "block.v": 4}


def network(seed: int = 0) -> nn.Sequential:
    """A convolution ``R = 5`` and, in a block, a linear layer ``R = 4`` that is called ``v`` as a factor is."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten())
    dense.add_module("block", nn.ModuleDict({"v": nn.Linear(45, 4)}))
    return lod.factorize(dense)  # type: ignore[return-value]


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in lod.layers(model).items()}


def through_torch(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # type: ignore[no-any-return]


def through_safetensors(state: State) -> State:
    return load(save({name: tensor.contiguous() for name, tensor in state.items()}))


def through_json(state: State) -> State:
    """Numbers and lists; whoever reads it makes tensors of the lists, a rank is a number already."""
    text = json.dumps({name: tensor.tolist() for name, tensor in state.items()})
    return {n: torch.tensor(v) if isinstance(v, list) else v for n, v in json.loads(text).items()}


def as_tensors(state: State) -> State:
    """JSON, where the reader makes a tensor of everything."""
    return {name: torch.as_tensor(value) for name, value in through_json(state).items()}


WAYS: dict[str, Callable[[State], State]] = {
    "copied": dict,
    "torch": through_torch,
    "safetensors": through_safetensors,
    "json": through_json,
    "json tensors": as_tensors,
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12)
@given(first=st.integers(0, 5), second=st.integers(0, 4))
def test_ranks_survive_saving_and_loading(way: str, first: int, second: int) -> None:
    source, target = network(), network(1)
    lod.set_ranks(source, {"0": first, "block.v": second})
    lod.set_ranks(target, {"0": 3, "block.v": 1})  # whatever it was at
    state = WAYS[way](source.state_dict())
    if way.startswith("json"):
        state["1.num_batches_tracked"] = torch.as_tensor(state["1.num_batches_tracked"])
    result = target.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert ranks_of(target) == {"0": first, "block.v": second}
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_only_prefixes_below_the_full_rank_are_in_the_state() -> None:
    model = network()
    assert not [name for name in model.state_dict() if name.endswith("rank")]
    lod.set_ranks(model, {"block.v": 2})
    added = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("rank")}
    assert list(added) == ["block.v.rank"]
    assert (added["block.v.rank"].dtype, added["block.v.rank"].shape, int(added["block.v.rank"])) == (
        torch.int64,
        torch.Size([]),
        2,
    )
    lod.set_ranks(model, FULL)
    assert not [name for name in model.state_dict() if name.endswith("rank")]


def test_a_state_without_ranks_means_full_rank() -> None:
    model = network()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lod.set_ranks(model, {"0": 1, "block.v": 0})
    model.load_state_dict(plain)
    assert ranks_of(model) == FULL


def test_strict_loading_still_finds_what_does_not_belong() -> None:
    model = network()
    lod.set_ranks(model, {"0": 2})
    good = model.state_dict()
    for name in ("0.rnak", "1.rank", "rank", "block.rank", "0.rank.more"):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            network().load_state_dict(good | {name: torch.tensor(1)})
    without = {name: tensor for name, tensor in good.items() if name != "0.u"}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.u"):
        network().load_state_dict(without)
    result = network().load_state_dict(without | {"1.rank": torch.tensor(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.u"], ["1.rank"])


@pytest.mark.parametrize("rank", [6, -1, 10**12])
@pytest.mark.parametrize("strict", [True, False])
def test_a_rank_out_of_bounds_is_refused(rank: int, strict: bool) -> None:
    model = network()
    with pytest.raises(UserError, match=f"between 0 and 5, got {rank}"):
        model.load_state_dict(model.state_dict() | {"0.rank": torch.tensor(rank)}, strict=strict)


@pytest.mark.parametrize("rank", [torch.tensor(2.5), 2.5, torch.tensor(True), torch.tensor([1, 2])])
def test_a_rank_that_is_no_integer_is_refused(rank: object) -> None:
    model = network()
    with pytest.raises(UserError, match="must be an integer"):
        model.load_state_dict(model.state_dict() | {"0.rank": rank})


def test_ranks_go_along_with_copies_and_reach_the_function() -> None:
    images = torch.randn(3, 2, 5, 5)

    def run(model: nn.Module) -> Tensor:
        return model.get_submodule("0")(images)  # type: ignore[no-any-return]

    source, target = network(), network(1)
    lod.set_ranks(source, {"0": 2})
    assert not torch.equal(run(source), run(network()))
    target.load_state_dict(source.state_dict())
    assert torch.equal(run(target), run(source))
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(run(target), run(source))


def test_a_prefix_state_does_not_fit_a_model_of_other_shapes() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="size mismatch"):
        lod.truncate(network(), {"0": 2}).load_state_dict(model.state_dict())
