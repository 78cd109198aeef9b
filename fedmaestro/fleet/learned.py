"""What the whole model keeps, and new ranks for every tier, from what training has made of its columns.

Pure functions on the global state, whose factors are ``<layer>.u (O, R)`` and ``<layer>.v (R, I…)``; the server runs
them after its optimiser and before the evaluation. Two steps, each optional:

1. *Cut.* Columns whose importance (``lod.importance``) is below a threshold go, as in Maestro's progressive shrinking
   (ICML 2024, section 3.3). Only a suffix of a layer can go, and never its first column: every tier needs rank 1
   everywhere. Departure for a federation: a column is not judged before enough device updates have trained it, because
   the last columns have few holders, and what hardly anybody has trained yet says nothing.
2. *Learned ranks.* One path of nested sizes leads from all columns down to one per layer (``lod.search.greedy_path``,
   after Maestro, section 4.4); each tier takes the largest size on it that fits its budgets, and single columns of the
   next larger tier that they still hold (``plan.affordable``: a rank fraction binds as MACs and bytes of its uniform
   ranks). So the tiers stay nested layer by layer.

The path's loss is ``-Σ_layers log(kept share)``, a share being that of the layer's energy ``Σ_b (‖u_b‖·‖v_b‖)²``, for
orthogonal columns of its squared Frobenius norm. Shares, because the scale of a layer means nothing: a norm layer or
the next layer undoes it, and initialisation gives wide layers more. Their product, because layers work in sequence:
small losses add up, but a layer that loses nearly everything cannot be made up for by the others. (The plain sum of
dropped shares left the smallest tier of the demo a single column in one layer.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmaestro.fleet.cost import Trace
from fedmaestro.fleet.plan import Plan, affordable, encode_ranks, replan
from fedmaestro.fleet.traces import trace_of
from fedmaestro.lod import kept_ranks
from fedmaestro.lod.search import Ranks, greedy_path
from fedmaestro.lod.suffix import Tail, factor_importance, factor_strengths, tail_of
from fedmaestro.models.architecture import Size
from fedmaestro.submodel import Shapes, State, cut, leading_block
from fedmaestro.threads import one_thread

Memories = Mapping[str, Mapping[str, State]]
"""What the server's steps keep: states by step and slot."""


@dataclass(frozen=True, kw_only=True)
class Rederivation:
    """When ranks change during a run, and by which rule."""

    every: int
    """Rounds from one time to the next."""
    threshold: float = 0.0
    """Columns of less importance are cut; 0: none."""
    min_updates: int = 0
    """Device updates that must have trained a column before it may be cut."""
    learned: bool = False
    """Whether the tiers' ranks are derived from the model; otherwise they stay uniform, as far as columns are left."""

    @property
    def active(self) -> bool:
        """Whether ranks can change at all."""
        return self.learned or self.threshold > 0

    def due(self, server_round: int, rounds: int) -> bool:
        """Return whether ranks change after this round; not after the last one, for what serves has to be trained."""
        return self.active and 0 < server_round < rounds and server_round % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Everything on the server whose size follows the ranks."""

    plan: Plan
    state: State
    memory: Memories
    """Of the server's steps: a tensor with the name and the shape of one of ``state`` follows it."""
    updates: State
    """How many device updates have trained each column: ``(R,)`` int64 by layer."""


def rederive(first: Plan, now: Ranked, rule: Rederivation) -> Ranked:
    """Cut the model, and give every tier new ranks.

    Args:
        first: the plan of the run's start: the budgets, and the uniform ranks.
        now: what the last round left.
        rule: which of the two steps, and how.

    Returns:
        The same at the new ranks; ``now.plan`` itself where these have not changed.
    """
    # In the model's order: a checkpoint gives its tensors back in any.
    counts = {layer: now.updates[layer] for layer in now.plan.full.size.ranks or {}}
    with one_thread():
        full = columns_to_keep(now.state, counts, rule)
        shapes = first.architecture.shapes(Size(ranks=full))
        state = {name: tensor.contiguous().clone() for name, tensor in cut(now.state, shapes).items()}
        plan = _planned(first, now.plan, state, full, rule)
    return Ranked(
        plan=now.plan if encode_ranks(plan) == encode_ranks(now.plan) else plan,
        state=state,
        memory=cut_memory(now.memory, now.state, shapes),
        updates={layer: counts[layer][:rank].clone() for layer, rank in full.items()},
    )


def _planned(first: Plan, last: Plan, state: State, full: Ranks, rule: Rederivation) -> Plan:
    if rule.learned:
        losses, prices = losses_of(state, full), prices_of(full, trace_of(first.architecture))
        chain = [Size(ranks=ranks) for ranks in rank_path(losses, prices)]

        def worth(layer: str, rank: int) -> float:
            return (losses[layer][rank] - losses[layer][rank + 1]) / prices[layer]

        plan = replan(first, Size(ranks=full), affordable(first, chain, worth))
        if any(tier.trains is not None for tier in plan.tiers):
            return plan
        # Where only tiers that afford the whole model train, the activations of a smaller tier may now be too many.
        first = last
    sizes = [first.by_index(i).serves.size.ranks or {} for i in range(len(first.tiers))]
    clipped = [Size(ranks={layer: min(rank, full[layer]) for layer, rank in ranks.items()}) for ranks in sizes]
    return replan(first, Size(ranks=full), clipped)


def columns_to_keep(state: Mapping[str, Tensor], updates: Mapping[str, Tensor], rule: Rederivation) -> Ranks:
    """Return the rank of every layer (those of ``updates``) after the cut: 1 at least."""
    scores = {x: factor_importance(state[f"{x}.u"].double(), state[f"{x}.v"].double()) for x in updates}
    kept = kept_ranks(scores, rule.threshold)
    return {x: max(kept[x], _last(counts < rule.min_updates), 1) for x, counts in updates.items()}


def _last(flags: Tensor) -> int:
    """Return the length of the shortest prefix that holds every true flag."""
    return int(flags.nonzero().max()) + 1 if bool(flags.any()) else 0


def rank_path(losses: Mapping[str, list[float]], prices: Mapping[str, float]) -> list[Ranks]:
    """Return nested ranks, ascending from one column in every layer to all of them, in steps of one column.

    From the top down, each step drops the column that costs the least for what it saves.

    Args:
        losses: by layer, for every rank ``0 … R`` (``losses_of``).
        prices: of a column, by layer (``prices_of``).
    """
    steps = greedy_path(
        {x: range(len(of_rank) - 1, 0, -1) for x, of_rank in losses.items()},
        lambda x, rank: rank * prices[x],
        lambda ranks: sum(losses[x][rank] for x, rank in ranks.items()),
    )
    return [step.ranks for step in steps][::-1]


def prices_of(full: Ranks, traced: Trace) -> dict[str, float]:
    """Return what one column of each layer costs: its share of all columns' MACs plus that of their parameters.

    Both, for both bind (``fleet.without_fraction``): on a path by MACs alone, the layers that are dear in MACs would
    be down to one column before the others give up what is dear in bytes.
    """
    layers = [x for x in traced.layers if x.name in full]
    params = {x.name: x.inner + x.out for x in layers}
    macs = dict.fromkeys(full, 0)
    for x in layers:
        macs[x.name] += x.macs(1)
    all_macs, all_params = (sum(rank * of[x] for x, rank in full.items()) for of in (macs, params))
    return {x: macs[x] / all_macs + params[x] / all_params for x in full}


def losses_of(state: Mapping[str, Tensor], full: Ranks) -> dict[str, list[float]]:
    """Return ``-log(share of the layer's energy that the prefix keeps)`` for every layer and rank ``0 … R``."""

    def losses(strengths: Tensor) -> list[float]:
        kept = strengths.square().cumsum(0).clamp(min=1e-300)
        return [math.inf, *(kept[-1] / kept).log().tolist()]

    return {x: losses(factor_strengths(state[f"{x}.u"].double(), state[f"{x}.v"].double())) for x in full}


def cut_memory(memory: Memories, state: Mapping[str, Tensor], shapes: Shapes) -> Memories:
    """Cut every tensor of a memory that has the name and the shape of one of ``state``, to ``shapes``."""

    def follow(name: str, tensor: Tensor) -> Tensor:
        if name not in state or tensor.shape != state[name].shape:
            return tensor
        return leading_block(tensor, shapes[name]).clone()

    return {
        step: {slot: {name: follow(name, tensor) for name, tensor in kept.items()} for slot, kept in slots.items()}
        for step, slots in memory.items()
    }


def no_updates(plan: Plan) -> State:
    """Return the counts of a new model: no column has been trained."""
    return {layer: torch.zeros(rank, dtype=torch.int64) for layer, rank in (plan.full.size.ranks or {}).items()}


def count_updates(updates: Mapping[str, Tensor], ranks: Mapping[str, int], devices: int) -> State:
    """Add the updates of ``devices`` that trained the prefixes ``ranks``."""
    counted = {layer: counts.clone() for layer, counts in updates.items()}
    for layer, rank in ranks.items():
        counted[layer][:rank] += devices
    return counted


def tails(state: Mapping[str, Tensor], ranks: Mapping[str, int]) -> list[Tail]:
    """Return for every layer what the prefix ``ranks`` of the whole model lacks, for the devices' group lasso."""
    with one_thread():
        return [tail_of(state[f"{layer}.u"], state[f"{layer}.v"], rank) for layer, rank in ranks.items()]
