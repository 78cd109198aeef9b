"""Devices that mean harm: who they are, and what they send instead of what they have learnt.

An attacker trains as every device does; then its update ``Δ = x − x₀`` is changed, or its labels were before. It knows
the model that it was sent, and its own data; colluding ones share a random number too. What they send is a submodel of
their tier, within the bound on updates: to the server, nothing is wrong with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmaestro import rng
from fedmaestro.errors import UserError, check_name
from fedmaestro.submodel import State

ALL_TIERS = "all"


@dataclass(frozen=True, kw_only=True)
class Attacking:
    """What an attack may draw from.

    Attributes:
        strength: ``fleet.attack-strength``, or the attack's own.
        own: of the device, in this round.
        shared: makes a generator that all attackers of the round have alike.
    """

    strength: float
    own: np.random.Generator
    shared: Callable[[], np.random.Generator]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One row of ``ATTACKS``."""

    name: str
    update: Callable[[State, Attacking], State] | None = None
    """``Δ -> what is sent instead``, float64, same names and shapes; None: the update stays."""
    labels: Callable[[Tensor, int], Tensor] | None = None
    """``(classes (B,), how many) -> (B,)``; None: they stay."""
    strength: float = 1.0
    """Where the experiment says none."""
    summary: str
    source: str


def _sign_flip(update: State, this: Attacking) -> State:
    return {name: -this.strength * x for name, x in update.items()}


def _scale(update: State, this: Attacking) -> State:
    return {name: this.strength * x for name, x in update.items()}


def _length(state: Mapping[str, Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([x.double().norm() for x in state.values()])))


def _noise(update: State, this: Attacking) -> State:
    """Add noise whose expected length is ``strength`` times that of the update."""
    std = this.strength * _length(update) / max(1, sum(x.numel() for x in update.values())) ** 0.5
    return {name: x + std * torch.from_numpy(this.own.standard_normal(tuple(x.shape))) for name, x in update.items()}


def _collude(update: State, this: Attacking) -> State:
    """Send ``strength`` times the update's length in one random direction, the same for all attackers of the round.

    Of the direction, every device takes the block that it holds: attackers of different tiers agree on what they share.
    """
    generator = this.shared()
    direction = {name: _nested_normal(tuple(x.shape), generator) for name, x in update.items()}
    factor = this.strength * _length(update) / max(_length(direction), 1e-300)
    return {name: factor * x for name, x in direction.items()}


def _nested_normal(shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Return normal numbers ``(*shape)`` that are the leading block of those of any larger shape."""
    total = torch.zeros(shape, dtype=torch.float64)
    # One number for each index of each axis: sums of them are normal, and blocks of each other.
    for axis, line in enumerate(generator.spawn(len(shape) or 1)):
        size = shape[axis] if shape else 1
        total += torch.from_numpy(line.standard_normal(size)).reshape(
            [-1 if i == axis else 1 for i, _ in enumerate(shape)]
        )
    return total


def _label_flip(labels: Tensor, classes: int) -> Tensor:
    return classes - 1 - labels


ATTACKS: dict[str, Attack] = {
    row.name: row
    for row in (
        Attack(
            name="sign-flip",
            update=_sign_flip,
            summary="the update times −strength (1)",
            source="sign-flipping (Li et al., 1811.03761)",
        ),
        Attack(
            name="label-flip",
            labels=_label_flip,
            summary="trained on class K − 1 − y instead of y (classification)",
            source="Tolpegin et al. (2007.08432)",
        ),
        Attack(
            name="noise",
            update=_noise,
            strength=10.0,
            summary="Gaussian noise is added, strength (10) times as long as the update",
            source="Gaussian attack (Blanchard et al., NeurIPS 2017)",
        ),
        Attack(
            name="scale",
            update=_scale,
            strength=10.0,
            summary="the update times strength (10)",
            source="model replacement (Bagdasaryan et al., 1807.00459)",
        ),
        Attack(
            name="collude",
            update=_collude,
            strength=2.0,
            summary="all attackers of a round send strength (2) times their update's length in one random direction",
            source="identical updates, against rules that trust neighbours (multi-krum)",
        ),
    )
}
"""What attackers do."""


@dataclass(frozen=True, kw_only=True)
class Attackers:
    """The attackers of a fleet.

    Attributes:
        attack: what they do.
        strength: of it.
        devices: their numbers.
        seed: of the experiment.
    """

    attack: Attack
    strength: float
    devices: frozenset[int]
    seed: int

    def sent(self, device: int, server_round: int, state: State, start: Mapping[str, Tensor]) -> State:
        """Return what a device sends instead of ``state``; itself where it is honest."""
        if device not in self.devices or self.attack.update is None:
            return state

        this = Attacking(
            strength=self.strength,
            own=rng.generator(self.seed, "attack", server_round, device),
            shared=lambda: rng.generator(self.seed, "collusion", server_round),
        )
        begun = {name: start[name].cpu().double() for name in state}
        changed = self.attack.update({name: x.cpu().double() - begun[name] for name, x in state.items()}, this)
        return {name: (begun[name] + changed[name]).to(x) for name, x in state.items()}

    def labels(self, device: int, labels: Tensor, classes: int) -> Tensor:
        """Return the labels that a device trains on."""
        if device not in self.devices or self.attack.labels is None:
            return labels
        return self.attack.labels(labels, classes)


def find_attackers(
    name: str, share: float, tiers: str, strength: float | None, *, tier_of: np.ndarray, names: list[str], seed: int
) -> Attackers | None:
    """Return the attackers of a fleet; None where there is no attack.

    Args:
        name: a key of ``ATTACKS``, or ``none``.
        share: of the devices of each tier that has attackers, rounded.
        tiers: names of these tiers, separated by commas, or ``all``.
        strength: of the attack; None: its own.
        tier_of: ``(devices,)``, position in ``names`` of each device's tier.
        names: of the fleet's tiers.
        seed: of the experiment.

    Raises:
        UserError: an unknown name, or nobody attacks.
    """
    if name == "none":
        return None
    check_name("fleet.attack", name, ["none", *ATTACKS])
    chosen = names if tiers == ALL_TIERS else [tier.strip() for tier in tiers.split(",")]
    for tier in chosen:
        check_name("fleet.attack-tiers", tier, [ALL_TIERS, *names])
    if strength is not None and ATTACKS[name].update is None:
        raise UserError(f"fleet.attack-strength={strength:g} has no effect: {name} changes labels: leave it out")
    devices: list[int] = []
    for index, tier in enumerate(names):
        if tier in chosen:
            own = np.nonzero(tier_of == index)[0]
            count = int(share * len(own) + 0.5)
            devices += rng.generator(seed, "attackers", index).permutation(own)[:count].tolist()
    if not devices:
        raise UserError(
            f"fleet.attackers={share:g} of the devices of {tiers if tiers != ALL_TIERS else 'each tier'} is nobody: "
            "raise it, or simulate more devices"
        )
    attack = ATTACKS[name]
    return Attackers(
        attack=attack,
        strength=attack.strength if strength is None else strength,
        devices=frozenset(devices),
        seed=seed,
    )
