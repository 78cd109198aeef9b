"""Factor columns that hardly anybody will train start small.

With ``N_j`` the devices of a round that hold column ``j``, in expectation, and ``T`` the threshold (or the largest
``N`` of the layer, if that is less), training starts from ``σ_j ← min(1, N_j / T)² σ_j``; both factors' columns are
scaled by the root of that. Unlike ``tail_decay`` it happens once, before the first round, and nothing collapses later:
what holders learn stays.

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
        holders: ``(R,)`` by layer. Columns that nobody holds go with the fewest that somebody does: larger ones would
            come first at the next re-ordering, and be served untrained.
        threshold: ``T``; 0: nothing changes.
    """
    new = dict(state)
    for layer in factor_layers(state) if threshold else ():
        if layer in holders:
            held = holders[layer].clamp(min=float(holders[layer][holders[layer] > 0].min()))
            # On both factors: the singular values get its square.
            share = (held / min(threshold, float(held.max()))).clamp(max=1)
            new |= scaled_columns(state, layer, share)
    return new


def tail_start(threshold: float) -> ServerStep:
    """Return the step that starts columns of fewer than ``threshold`` holders small; 0: it does nothing."""
    return ServerStep(name="tail-start", start=lambda state, holders: start_tails(state, holders, threshold))


TAIL_START = StepRow(
    name="tail-start",
    make=tail_start,
    settings={"threshold": "server.tail-start"},
    summary="before the first round, the singular values of columns of few holders are made smaller",
    source="FedMaestro (experiments/README.md)",
)
