r"""Coverage mean in which an entry counts only the devices that changed it.

For entry ``e`` and ``C_e``, the devices that hold it and whose entry differs from what they were sent in some bit:
``new_e = Σ_{k∈C_e} n_k x_{k,e} / Σ_{k∈C_e} n_k``; entries that nobody changed keep their value, bit for bit.

Source: FIARSE (Wu et al., NeurIPS 2024), whose release divides the sum of the updates of an entry by the number of
devices for which it is not zero: those whose mask holds it. Departure: weights are example counts, theirs are equal.

Known pathologies: those of ``masked_mean``, entry by entry. Anything that moves entries which a device does not train,
such as weight decay, makes its zeros votes; an entry whose gradient was zero in all of a device's steps is no vote.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedmaestro.strategies.base import SUMS, Aggregation, Parts
from fedmaestro.strategies.masked_mean import CHANGED_ROWS, ROWS, RowSums, changed_entries, finish


def _lift(submodel: Mapping[str, Tensor], weight: float, start: Mapping[str, Tensor] | None) -> RowSums:
    held = {
        name: changed_entries(x, None if start is None else start[name]).double() * weight
        for name, x in submodel.items()
    }
    return RowSums({name: x.double() * held[name] for name, x in submodel.items()}, held)


def _why_not(parts: Parts, weight: float, radius: float) -> str | None:
    for name, held in parts[ROWS].items():
        # A device has one example at least.
        if not bool(((held == 0) | ((held >= 1) & (held <= weight))).all()):
            return f"entries of {name!r} have another weight than devices could have given them"
        if bool((parts[SUMS][name].abs() > radius * held).any()):
            return f"entries of {name!r} are larger than devices could have made them"
    return None


ENTRY_MEAN = Aggregation(
    name="entry-mean",
    finish=finish,
    reduction=replace(CHANGED_ROWS, lift=_lift, why_not=_why_not),
    changed_rows=lambda block, name: block.sums.rows[name] > 0,
    forbids={
        "train.weight-decay": "moves the entries that a device does not train, and aggregation 'entry-mean' counts the "
        "devices that moved an entry: set it to 0, or use another strategy"
    },
    summary="each entry averaged over the devices that changed it, weighted by examples",
    source="FIARSE (NeurIPS 2024)",
)
