"""Which part of the network devices train, and how often: facts of a strategy's row that need no tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SubmodelRule:
    """Which part of the network the devices of a tier train.

    Attributes:
        form: ``lod`` (rank prefixes) or ``dense`` (leading channels; a tier's width has the MACs of its ranks).
        trains: ``own``: every tier its own size; ``smallest``: all the smallest tier's, which also serves all;
            ``full``: all the whole model, budgets or not (oracle); ``capable``: only tiers that afford the whole model;
            ``affordable``: every tier its own size and, one after the other, all smaller ones (separate models only).
        separate: each size is a model of its own instead of the leading block of one (exclusive training).
        narrows: channels are cut together with ranks (``Architecture.narrows``): a tier's submodel has the leading
            channels of every layer, and of their factors the leading columns; LoD only.
        rank_power: how much ranks are cut with them (``Architecture.rank_power``).
        scales: what makes a dense model smaller (``models.architecture``): width, depth (early exits), both, width and
            residual blocks, or entries that are zero.
        exits: what a network with early exits puts out: the ensemble of its classifiers, or the last one.
        rolls: the window of leading channels moves on by one channel in every round (FedRolex); dense models only.
    """

    form: Literal["lod", "dense"] = "lod"
    trains: Literal["own", "smallest", "full", "capable", "affordable"] = "own"
    separate: bool = False
    narrows: bool = False
    rank_power: Fraction = Fraction(1)
    scales: Literal["width", "depth", "both", "blocks", "entries"] = "width"
    exits: Literal["none", "ensemble", "last"] = "none"
    rolls: bool = False

    def __post_init__(self) -> None:
        if self.rolls and self.form != "dense":
            raise ValueError("only dense models have channels that could roll")
        if self.trains == "affordable" and not self.separate:
            raise ValueError("only separate models can be trained one after the other by one device")
        if self.narrows and self.form != "lod":
            raise ValueError("only LoD models have ranks that could be cut together with channels")
        if self.scales != "width" and self.form != "dense":
            raise ValueError(f"only dense models are made smaller by {self.scales}")
        if (self.exits != "none") != (self.scales in ("depth", "both")):
            raise ValueError("a network has a depth if it has early exits")

    def describe(self) -> str:
        """Return the rule in a few words: ``width, own, rolling``."""
        marks = [word for word, flag in (("separate", self.separate), ("rolling", self.rolls)) if flag]
        cuts = {"both": "width and depth", "blocks": "width and blocks"}.get(self.scales, self.scales)
        what = "rank and width" if self.narrows else "rank" if self.form == "lod" else cuts
        return ", ".join([what, self.trains, *marks])


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a local objective runs the nested levels of a device (its own submodel, then all smaller ones).

    Attributes:
        expected: passes (forward and backward) per step at each level, own first, for a number of levels.
        together: whether the own level and a smaller one keep their activations at the same time.
    """

    expected: Callable[[int], Sequence[float]]
    together: bool = False


OWN_PASS = Passes(expected=lambda levels: [1.0] + [0.0] * (levels - 1))
"""One pass of the own submodel per step."""
