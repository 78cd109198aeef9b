r"""Differential privacy of devices: clipped updates, a fixed divisor, Gaussian noise, and what it all amounts to.

**Mechanism** (DP-FedAvg, McMahan et al., arXiv 1710.06963, with its fixed-denominator estimator, on nested blocks). In
a round every device takes part with probability ``q``, by itself. It sends ``x₀ + Δ_k`` with the whole update clipped,
``‖Δ_k‖₂ ≤ C``, whatever blocks it holds. For a block ``b`` of entries that the same sizes hold, with ``N_b`` devices in
the fleet that hold it, the server releases

    ``x₀ + (Σ_{k ∈ round, holds b} Δ_{k,b} + z C · N(0, I)) / W_b``,   ``W_b = q N_b``.

**Sensitivity.** Take all blocks as one vector: ``S = (Σ_k Δ_{k,b})_b``. A device that is added or removed changes ``S``
by its own ``Δ_k`` (zero where it holds nothing), so by ``C`` at most in the 2-norm; ``S`` plus noise of standard
deviation ``z C`` in each entry is the Gaussian mechanism of noise multiplier ``z``. The mean of block ``b`` has
sensitivity ``C / W_b`` and noise ``z C / W_b``: dividing by public numbers costs nothing, and neither does what the
server does with the result. Blocks of few devices, the tail of large tiers, therefore get more noise in each entry:
that is the price of their privacy. Every device weighs the same: example counts would be part of what is private, and
have no bound.

**Accounting.** Opacus' RDP accountant for the Poisson-subsampled Gaussian (Mironov et al., arXiv 1908.10530), which is
an upper bound; two fleets are neighbours if one has one device more. ``q`` is ``train.devices-per-round /
data.devices``; devices that cannot be reached, whose training fails, or that miss the virtual deadline do so by
themselves, so they take part less often, which costs nothing. (A host that fails takes whole cohorts with it: ε is that
of a run in which none did, which ``failed_by`` says.) The server sees to the clip norm itself (``rounds.admission``).

Departures from DP-FedAvg: one flat clip norm, not one per layer; noise also for blocks that no device of the round
holds, which has to be there: its absence would say so.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fedmaestro import rng
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UserError
from fedmaestro.fleet.plan import Plan
from fedmaestro.fleet.selection import SELECTIONS
from fedmaestro.rounds.method import Method
from fedmaestro.strategies.base import Partial, add_to_leading_block
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.submodel import Signature, State, leading_block

_NO_RESULT = {"out", "use", "data.dir", "data.file", "fleet.file", "train.cohort-size"}
"""Settings that name places, or change the speed only."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The mechanism of a run.

    Attributes:
        noise_multiplier: ``z``.
        clip_norm: ``C``.
        delta: of (ε, δ).
        rate: ``q``, the probability that a device takes part in a round, at most.
        seed: of the run.
        settings: a hash of the experiment's: two that differ must not have the same noise, or the difference of their
            models is without.
    """

    noise_multiplier: float
    clip_norm: float
    delta: float
    rate: float
    seed: int
    settings: str = ""

    def clipped(self, state: State, start: Mapping[str, Tensor]) -> State:
        """Return what a device sends: its update, scaled to ``clip_norm`` where it is longer."""
        moved = {name: x.double() - start[name].to(x).double() for name, x in state.items()}
        norm = float(torch.linalg.vector_norm(torch.stack([x.norm() for x in moved.values()])))
        # A little less, so that rounding to the tensors' type does not make it longer.
        if norm <= (limit := self.clip_norm * (1 - 1e-4)):
            return state
        factor = limit / norm
        return {name: (start[name].to(x).double() + factor * moved[name]).to(x) for name, x in state.items()}

    def released(
        self,
        partial: Partial[State],
        before: Mapping[str, Tensor],
        expected: State,
        server_round: int,
        owner: str | None = None,
    ) -> State:
        """Return the model after a round.

        Args:
            partial: sums of the clipped submodels, each of weight 1.
            before: what the round started from.
            expected: ``W`` of each entry (``expected_devices``); tensors that nobody sends are left out.
            server_round: from 1 on.
            owner: of the model, where tiers have models of their own: each has noise of its own.
        """
        generator = rng.generator(self.seed, f"privacy {self.settings} {owner or ''}", server_round)
        new: State = {}
        for name, old in before.items():
            if name not in expected:
                new[name] = old.clone()
                continue
            total = torch.zeros_like(old, dtype=torch.float64)
            for shapes, block in partial:
                if name in shapes:
                    add_to_leading_block(total, block.sums[name], shapes[name])
                    held = leading_block(old, shapes[name]).double()
                    add_to_leading_block(total, -block.devices * held, shapes[name])
            noise = torch.from_numpy(np.asarray(generator.standard_normal(tuple(old.shape))))
            moved = (total + self.noise_multiplier * self.clip_norm * noise) / expected[name].clamp(min=1e-300)
            new[name] = torch.where(expected[name] > 0, (old.double() + moved).to(old.dtype), old)
        return new

    def epsilon(self, rounds: int) -> float:
        """Return ε of so many rounds at ``delta``."""
        return _epsilon(self.noise_multiplier, self.rate, rounds, self.delta)


@lru_cache(maxsize=1024)
def _epsilon(noise_multiplier: float, rate: float, rounds: int, delta: float) -> float:
    if not rounds:
        return 0.0
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, rounds)]
    # Larger orders too, for runs that spend little.
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *(2.0**k for k in range(6, 13))]
    with warnings.catch_warnings():
        # That the best order is the first or the last one is fine: every order is a bound.
        warnings.simplefilter("ignore", UserWarning)
        return max(0.0, float(accountant.get_epsilon(delta, alphas=orders)))


def expected_devices(
    plan: Plan, devices_of: Mapping[int, int], rate: float, sizes: Mapping[int, Signature], like: Mapping[str, Tensor]
) -> State:
    """Return how many devices of a round hold each entry in expectation: ``W``, float64.

    Args:
        plan: the tiers.
        devices_of: devices of each tier, by its index in the fleet.
        rate: ``q``.
        sizes: what devices of each tier that trains this model send, by the tier's index.
        like: the model.
    """
    expected: State = {}
    for tier in plan.tiers:
        for name, shape in sizes.get(tier.index, ()):
            if name not in expected:
                expected[name] = torch.zeros_like(like[name], dtype=torch.float64)
            add_to_leading_block(expected[name], rate * devices_of[tier.index], shape)
    return expected


def find_privacy(config: ExperimentConfig, method: Method, devices: int) -> Privacy | None:
    """Return the mechanism of an experiment; None where there is none.

    Raises:
        UserError: settings that it does not go with.
    """
    asked = config.privacy
    if not asked.noise_multiplier:
        return None
    # Hosts come by here too, and need none of what it imports.
    if find_spec("opacus") is None:
        raise UserError(
            f"privacy.noise-multiplier={asked.noise_multiplier} needs the accountant of Opacus: "
            "pip install 'fedmaestro[privacy]', or leave it out"
        )
    for wrong, why in (
        (
            method.selection is not SELECTIONS["poisson"],
            "train.selection=poisson: accounting is for devices that take part independently",
        ),
        (
            config.train.reply_timeout_seconds is not None,
            "train.reply-timeout-seconds=none: who is late then depends on other devices",
        ),
        (config.ranks.shrink_threshold > 0, "ranks.shrink-threshold=0: it goes by how many devices took part"),
        (config.fleet.over_commit != 1, "fleet.over-commit=1: who is dropped then depends on other devices"),
        (
            method.aggregation.name != COVERAGE_MEAN.name,
            "train.aggregation=coverage-mean, which becomes the noisy mean",
        ),
        (method.correction != "none", "train.correction=none: control variates are not clipped"),
        (method.submodel.trains == "affordable", "train.submodel=separate: updates of several models add up"),
        (method.per_tier, "train.per-tier=none: an update would be released twice, to all tiers and to its own"),
        (method.norm == "static", "model.norm=group: static norms are set by training examples"),
        (method.settings.get("server.tail-decay"), "server.tail-decay=0: it goes by who took part"),
    ):
        if wrong:
            raise UserError(f"privacy.noise-multiplier={asked.noise_multiplier} needs {why} (strategy {method.name!r})")
    delta = 0.1 / devices if asked.delta is None else asked.delta
    return Privacy(
        noise_multiplier=asked.noise_multiplier,
        clip_norm=asked.clip_norm,
        delta=delta,
        rate=min(1.0, config.train.devices_per_round / devices),
        seed=config.seed,
        settings=hashlib.sha256(
            json.dumps({key: value for key, value in config.flat().items() if key not in _NO_RESULT}).encode()
        ).hexdigest(),
    )
