r"""Coverage mean in which a row counts only the devices that changed it.

For row ``i`` (index of dimension 0) of a tensor and ``C_i``, the devices that hold it and whose row differs from what
they were sent in some bit: ``new_i = Σ_{k∈C_i} n_k x_{k,i} / Σ_{k∈C_i} n_k``; rows that nobody changed keep their
value. A tensor without dimensions is one row.

Source: HeteroFL (arXiv 2010.01264), which averages a row of the classifier over the devices that have its label, and
masks the loss so that the others do not move it. Departures: what has moved is read off the tensors, so the server
need not know labels, and the same holds for every tensor (rows of a V factor are its columns' partners); weights are
example counts.

Known pathologies: anything that moves all rows makes this the plain coverage mean (weight decay is taken back from rows
that had no gradient, ``rounds.training.UntrainedRows``); so does a loss that is not masked, whose softmax pushes every
row. A device whose round left a row as it was by chance is no vote for that value. Without ``start`` (it was not passed
to ``Aggregation.add``) all rows count.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmaestro.strategies.base import (
    SUMS,
    WEIGHTED_SUMS,
    Aggregation,
    Partial,
    Parts,
    Reduction,
    Sizes,
    add_to_leading_block,
    as_column,
)
from fedmaestro.submodel import State

ROWS = "rows"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class RowSums:
    """``Σ weight · tensor`` over what has changed, and of each tensor ``Σ weight``: ``(rows,)``, or of each entry."""

    sums: State
    rows: State


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> RowSums:
    rows = {
        name: changed_rows(tensor, None if start is None else start[name]).double() * weight
        for name, tensor in submodel.items()
    }
    sums = {name: tensor.double() * as_column(rows[name], tensor.dim()) for name, tensor in submodel.items()}
    return RowSums(sums, rows)


def changed_rows(tensor: Tensor, start: Tensor | None) -> Tensor:
    """Return, of shape ``tensor.shape[:1]``, which rows differ from ``start`` in some bit; all if that is None."""
    if start is None:
        return torch.ones(tensor.shape[:1], dtype=torch.bool)
    differs = changed_entries(tensor, start)
    return differs.flatten(1).any(1) if tensor.dim() > 1 else differs


def changed_entries(tensor: Tensor, start: Tensor | None) -> Tensor:
    """Return, of the tensor's shape, which entries differ from ``start`` in some bit; all if that is None."""
    if start is None:
        return torch.ones(tensor.shape, dtype=torch.bool)
    bits = _BITS[tensor.element_size()]
    return tensor.view(bits) != start.view(bits)


def _add(left: RowSums, right: RowSums, sizes: Sizes) -> RowSums:
    return RowSums(WEIGHTED_SUMS.add(left.sums, right.sums, sizes), WEIGHTED_SUMS.add(left.rows, right.rows, sizes))


def _why_not(parts: Parts, weight: float, radius: float) -> str | None:
    for name, rows in parts[ROWS].items():
        sums = parts[SUMS][name]
        # A device has one example at least.
        if not bool(((rows == 0) | ((rows >= 1) & (rows <= weight))).all()):
            return f"rows of {name!r} have another weight than devices could have given them"
        longest = torch.linalg.vector_norm(sums.flatten(1), dim=1) if sums.dim() > 1 else sums.abs()
        if bool((longest > radius * rows).any()):
            return f"rows of {name!r} are longer than devices could have made them"
    return None


CHANGED_ROWS: Reduction[RowSums] = Reduction(
    lift=_lift,
    add=_add,
    pack=lambda x: {SUMS: x.sums, ROWS: x.rows},
    unpack=lambda parts, _: RowSums(dict(parts[SUMS]), dict(parts[ROWS])),
    why_not=_why_not,
)


def finish(partial: Partial[RowSums], global_state: Mapping[str, Tensor]) -> State:
    """Divide the sum of each row, or entry, by the weight of the devices that changed it."""
    return {name: _mean(name, partial, old) for name, old in global_state.items()}


def _mean(name: str, partial: Partial[RowSums], old: Tensor) -> Tensor:
    total = torch.zeros_like(old, dtype=torch.float64)
    weight = torch.zeros_like(total)
    for shapes, block in partial:
        if name in shapes:
            add_to_leading_block(total, block.sums.sums[name], shapes[name])
            add_to_leading_block(weight, as_column(block.sums.rows[name], old.dim()), shapes[name])
    return torch.where(weight > 0, (total / weight.clamp(min=1e-300)).to(old.dtype), old)


MASKED_MEAN = Aggregation(
    name="masked-mean",
    finish=finish,
    reduction=CHANGED_ROWS,
    changed_rows=lambda block, name: block.sums.rows[name] > 0,
    summary="each row averaged over the devices that changed it, weighted by examples",
    source="HeteroFL (2010.01264), classifier rows of own labels only, for every tensor",
)
