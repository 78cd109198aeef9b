r"""Mean of the devices' products per rank segment, each over its own contributors, factored anew by a truncated SVD.

The ranks of all sizes cut a layer's columns into segments b. With ``C_b`` the devices that hold segment b::

    M_b = Σ_{k∈C_b} n_k U_k[:, b] V_k[b, :] / Σ_{k∈C_b} n_k,        W = Σ_b M_b

and ``new U, V`` is the best approximation of W of rank R, with ``√Σ`` on each side. A segment that nobody trained keeps
the global state's columns as its ``M_b``; tensors that are no factor pair are averaged over their holders
(``coverage_mean``). No weighting bias, no factor bias; every prefix of the result is the best of its rank.

Source: raFLoRA (arXiv 2602.13486). Departures: thin factors instead of dense products; the global columns stand in for
a segment without contributors.

Known pathologies: the SVD mixes columns across tier edges, so tiers other than the largest change their function in
every round, also without training (``block_product`` does not), and columns that nobody trained move; when the sum of
the segments has more than R large singular values, what is left over is lost.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedmaestro.strategies.base import (
    SUMS,
    WEIGHTED_SUMS,
    Aggregation,
    Block,
    Partial,
    Parts,
    Reduction,
    Sizes,
    factor_layers,
)
from fedmaestro.strategies.product_svd import has_pair, trained_pairs, weighted, with_coverage_mean
from fedmaestro.strategies.spectral import Pair, compress, is_wide, joined, refactored, why_no_products
from fedmaestro.submodel import Signature, State


@dataclass(frozen=True)
class Stack:
    """``Σ_k n_k U_k[:, first:last] V_k[first:last] = u @ v`` of devices of one size, for one layer.

    Attributes:
        first: column where the segment starts.
        last: column before which it ends.
        u: ``(O, K)``.
        v: ``(K, I…)``. Until it is mixed, ``K = devices · (last - first)``, device by device.
        mixed: compressed: columns belong to no device any more, so the segment cannot be split.
    """

    first: int
    last: int
    u: Tensor
    v: Tensor
    mixed: bool = False

    def split(self, edges: Sequence[int]) -> "list[Stack]":
        """Return the parts between those ``edges`` that lie inside the segment."""
        inside = [edge for edge in edges if self.first < edge < self.last]
        if not inside:
            return [self]
        if self.mixed:
            raise ValueError(
                f"columns {self.first} to {self.last} are already added up and cannot be split at {inside}: "
                "announce all sizes to Aggregation.init"
            )
        return [self._part(a, b) for a, b in pairwise([self.first, *inside, self.last])]

    def _part(self, first: int, last: int) -> "Stack":
        columns = slice(first - self.first, last - self.first)
        devices = len(self.v) // (self.last - self.first)
        u = self.u.reshape(len(self.u), devices, -1)[:, :, columns].flatten(1)
        v = self.v.reshape(devices, -1, *self.v.shape[1:])[:, columns].flatten(0, 1)
        return Stack(first, last, u, v)

    def plus(self, other: "Stack", *, compressible: bool) -> "Stack":
        """Return the stack of the devices of both."""
        u, v = joined((self.u, self.v), (other.u, other.v))
        if compressible and is_wide(u, v):
            return Stack(self.first, self.last, *compress(u, v), mixed=True)
        return Stack(self.first, self.last, u, v, mixed=self.mixed or other.mixed)


@dataclass(frozen=True)
class SegmentSums:
    """What the devices of one size amount to.

    Attributes:
        plain: ``Σ weight · tensor`` of what is no factor pair.
        stacks: of every layer with a pair, ascending; together they hold the size's columns.
    """

    plain: State
    stacks: Mapping[str, tuple[Stack, ...]]


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> SegmentSums:
    layers = factor_layers(submodel)
    pairs = {f"{layer}.{factor}" for layer in layers for factor in "uv"}
    stacks = {
        layer: (Stack(0, len(v), submodel[f"{layer}.u"].double() * weight, v.to(torch.float64, copy=True)),)
        for layer in layers
        if len(v := submodel[f"{layer}.v"])
    }
    return SegmentSums(WEIGHTED_SUMS.lift({n: x for n, x in submodel.items() if n not in pairs}, weight, start), stacks)


def _add(left: SegmentSums, right: SegmentSums, sizes: Sizes) -> SegmentSums:
    edges = _edges(left.stacks, sizes.known)
    stacks = {
        layer: tuple(
            mine.plus(other, compressible=sizes.complete)
            for mine, other in zip(
                _split(of_left, edges[layer]), _split(right.stacks[layer], edges[layer]), strict=True
            )
        )
        for layer, of_left in left.stacks.items()
    }
    return SegmentSums(WEIGHTED_SUMS.add(left.plain, right.plain, sizes), stacks)


STACKS = "stacks"


def _pack(sums: SegmentSums) -> Parts:
    """Return what a host sends: the columns of a layer's stacks side by side, and of each stack what it is."""
    packed, about = dict(sums.plain), {}
    for layer, stacks in sums.stacks.items():
        packed[f"{layer}.u"] = torch.cat([stack.u for stack in stacks], dim=1)
        packed[f"{layer}.v"] = torch.cat([stack.v for stack in stacks])
        about[layer] = torch.tensor([(x.first, x.last, len(x.v), x.mixed) for x in stacks])
    return {SUMS: packed, STACKS: about}


def _unpack(parts: Parts, size: Signature) -> SegmentSums:  # noqa: ARG001
    sent, stacks = dict(parts[SUMS]), {}
    for layer, about in parts.get(STACKS, {}).items():
        rows = about.tolist()
        widths = [width for _, _, width, _ in rows]
        us = torch.split(sent.pop(f"{layer}.u"), widths, dim=1)
        vs = torch.split(sent.pop(f"{layer}.v"), widths)
        stacks[layer] = tuple(
            Stack(first, last, u, v, bool(mixed)) for (first, last, _, mixed), u, v in zip(rows, us, vs, strict=True)
        )
    return SegmentSums(sent, stacks)


SEGMENT_STACKS: Reduction[SegmentSums] = Reduction(
    lift=_lift,
    add=_add,
    pack=_pack,
    unpack=_unpack,
    why_not=lambda parts, weight, radius: why_no_products(parts[SUMS], weight, radius),
)
"""The devices' columns of a segment, U weighted, device by device.

They are split where another size ends. Once all sizes are known, those of ``2 · min(O, I)`` columns and more are mixed:
the same product in at most ``min(O, I)`` columns.
"""


def _edges(layers: Iterable[str], sizes: Iterable[Signature]) -> dict[str, list[int]]:
    """Return the ranks that the sizes have, ascending, for every layer."""
    shapes_of_sizes = [dict(size) for size in sizes]
    ranks = {x: {shapes[f"{x}.v"][0] for shapes in shapes_of_sizes if has_pair(x, shapes)} for x in layers}
    return {layer: sorted(found) for layer, found in ranks.items()}


def _split(stacks: Iterable[Stack], edges: Sequence[int]) -> list[Stack]:
    return [part for stack in stacks for part in stack.split(edges)]


@dataclass(frozen=True)
class Segment:
    """``M_b = u @ v`` of columns ``first … last - 1``, with ``u (O, K)``, ``v (K, I…)`` in float64."""

    first: int
    last: int
    u: Tensor
    v: Tensor
    trained: bool
    """False: nobody did, ``u`` and ``v`` are the global state's."""


def segments(layer: str, partial: Partial[SegmentSums], global_state: Mapping[str, Tensor]) -> Iterator[Segment]:
    """Yield the segments of a layer, ascending; together they hold its R columns."""
    old_u, old_v = global_state[f"{layer}.u"], global_state[f"{layer}.v"]
    stacks = [(block.weight, x) for _, block in partial for x in block.sums.stacks.get(layer, ())]
    edges = sorted({0, len(old_v), *_edges([layer], partial.sizes.known)[layer], *(stack.last for _, stack in stacks)})
    contributors: dict[int, list[tuple[float, Stack]]] = {}
    for weight, stack in stacks:
        for part in stack.split(edges):
            contributors.setdefault(part.first, []).append((weight, part))
    for first, last in pairwise(edges):
        if first in contributors:
            yield Segment(first, last, *_mean_product(contributors[first]), trained=True)
        else:
            yield Segment(first, last, old_u[:, first:last].double(), old_v[first:last].double(), trained=False)


def _mean_product(weighted: Sequence[tuple[float, Stack]]) -> Pair:
    weight = sum(weight for weight, _ in weighted)
    return torch.cat([stack.u for _, stack in weighted], dim=1) / weight, torch.cat([stack.v for _, stack in weighted])


def finish(partial: Partial[SegmentSums], global_state: Mapping[str, Tensor]) -> State:
    """Return the truncated SVD of every layer's sum of segments; a layer whose pair nobody sent keeps its bits."""
    partial = weighted(partial)
    new: State = {}
    for layer in trained_pairs(partial, global_state):
        parts = list(segments(layer, partial, global_state))
        u, v = torch.cat([part.u for part in parts], dim=1), torch.cat([part.v for part in parts])
        new |= refactored(global_state, layer, u, v)
    return with_coverage_mean(new, plain(partial), global_state)


def plain(partial: Partial[SegmentSums]) -> Partial[State]:
    """Return the partial result of the tensors that are no factor pair."""
    blocks = {size: Block(x.sums.plain, x.weight, x.devices) for size, x in partial.blocks.items()}
    return Partial(blocks, partial.sizes)


PARTITIONED_PRODUCT = Aggregation(
    name="partitioned-product",
    finish=finish,
    reduction=SEGMENT_STACKS,
    mixes=True,
    rebases=True,
    whole_factors=True,
    summary="products averaged per rank segment over the devices that hold it, then cut to full rank by SVD",
    source="raFLoRA (2602.13486)",
)
