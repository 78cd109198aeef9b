"""Submodels: leading blocks of tensors of the global state, of all of them or of some.

A submodel is ``{name: full[name][:n_0, :n_1, …]}``, so its names and shapes alone say what it covers. LoD prefixes
(``U (O, r)``, ``V (r, I)``) and width-scaled dense models (leading channels) have all tensors; networks that leave out
blocks lack those of the blocks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Signature = tuple[tuple[str, Shape], ...]
"""Names and shapes of a submodel, in order: what it covers, and the key of its size."""


def leading_block(full: Tensor, shape: Shape | torch.Size) -> Tensor:
    """Return the view ``full[:shape[0], :shape[1], …]``.

    Raises:
        ValueError: another number of dimensions, or a block that is larger than ``full``.
    """
    if len(shape) != full.dim() or any(n > m for n, m in zip(shape, full.shape, strict=True)):
        raise ValueError(f"a block of shape {tuple(shape)} does not lead a tensor of shape {tuple(full.shape)}")
    return full[tuple(slice(n) for n in shape)]


def cut(state: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> State:
    """Return the submodel of ``state`` with these shapes, as views."""
    return {name: leading_block(state[name], shape) for name, shape in shapes.items()}


def state_of(model: nn.Module) -> State:
    """Return the tensors of a module's state; a parameter that several modules share is in it once."""
    state: State = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def shapes_of(source: nn.Module | Mapping[str, Tensor]) -> Shapes:
    """Return the shape of every tensor of a module's state or of a state."""
    state = state_of(source) if isinstance(source, nn.Module) else source
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def signature(shapes: Mapping[str, Shape]) -> Signature:
    """Return the key of the size that has these shapes."""
    return tuple((name, tuple(shape)) for name, shape in shapes.items())


def num_elements(shapes: Mapping[str, Shape]) -> int:
    """Return the number of scalars that these shapes hold."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@torch.no_grad()
def load(model: nn.Module | State, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the tensors of ``model`` in place (a resident model keeps its buffers and layout).

    Args:
        model: the module, or what ``state_of`` says of it.
        state: what it is to hold.

    Raises:
        ValueError: other names or shapes; nothing is copied then.
    """
    own = state_of(model) if isinstance(model, nn.Module) else model
    if own.keys() != state.keys():
        raise ValueError(f"state and model differ in {sorted(own.keys() ^ state.keys())}")
    if wrong := [name for name, tensor in own.items() if tensor.shape != state[name].shape]:
        raise ValueError(f"state and model differ in the shapes of {wrong}")
    for name, tensor in own.items():
        tensor.copy_(state[name])
