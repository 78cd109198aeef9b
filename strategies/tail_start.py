"""Factor columns and channels that hardly anybody will train start small.

With ``N_j`` the devices of a round that hold column ``j``, in expectation, and ``T`` the threshold (or the largest
``N`` of the layer, if that is less), training starts from ``σ_j ← min(1, N_j / T)² σ_j``; both factors' columns are
scaled by the root of that. Unlike ``tail_decay`` it happens once, before the first round, and nothing collapses later:
what holders learn stays.

Where widths are cut too (``train.submodel = rank-and-width`` or ``width``), weights of an input channel that ``N_c``
devices of a round hold start from ``min(1, N_c / T)²`` times their value: a wider network then starts as nearly the
same function as the narrower one inside of it. What computes the channel keeps its scale, so that both have gradients.

Why: a random initial weight has most of its energy beyond the smallest tiers' ranks. Columns with many holders soon
replace theirs; where a round has one holder, or none, the random tail stays for a long time, and the large tiers carry
it on top of everything that the others have learnt. Small instead of zero, because a column pair that is zero in both
factors has no gradient, and re-ordering balances the factors (LoRA's start, one zero factor, would not survive it).

Source: FedMaestro (ablation in experiments/README.md). The square was compared with the first power and with zero.

Known limits: ``N`` (``fleet.holders``) counts whom a round samples, not whom over-commit or a deadline leaves out;
learned ranks read the energies of the columns (``fleet.learned``), so a small start would decide about them, and the
default row leaves it off there.
"""

from collections.abc import Mapping

from torch import Tensor

from fedmaestro.strategies.base import factor_layers, scaled_columns
from fedmaestro.strategies.server_step import Holders, ServerStep, StepRow
from fedmaestro.submodel import State


def start_tails(state: Mapping[str, Tensor], holders: Holders, threshold: float) -> State:
    """Return ``state`` with the columns of few holders scaled down.

    Args:
        state: the initial one, factors ``<layer>.u (O, R)`` and ``<layer>.v (R, I…)``. Layers that ``holders`` does not
            name are kept: those of separate models, all of whose columns their own devices hold.
        holders: ``(R,)`` by layer, ``(I,)`` by tensor (``fleet.holders``). What nobody holds goes with the fewest that
            somebody does: larger columns would come first at the next re-ordering, and be served untrained.
        threshold: ``T``; 0: nothing changes.
    """
    new = dict(state)
    layers = set(factor_layers(state))
    for name, counts in holders.items() if threshold else ():
        held = counts.clamp(min=float(counts[counts > 0].min()))
        share = (held / min(threshold, float(held.max()))).clamp(max=1)
        if name in layers:
            # On both factors: the singular values get its square.
            new |= scaled_columns(new, name, share)
        elif name in state:
            tensor = new[name]
            new[name] = (tensor * share.square().reshape(1, -1, *(1,) * (tensor.dim() - 2))).to(tensor.dtype)
    return new


def tail_start(threshold: float) -> ServerStep:
    """Return the step that starts columns of fewer than ``threshold`` holders small; 0: it does nothing."""
    return ServerStep(name="tail-start", start=lambda state, holders: start_tails(state, holders, threshold))


TAIL_START = StepRow(
    name="tail-start",
    make=tail_start,
    settings={"threshold": "server.tail-start"},
    summary="before the first round, columns and input channels of few holders are made smaller",
    source="FedMaestro (experiments/README.md)",
)
