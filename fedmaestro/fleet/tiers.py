"""Fleets: tiers of devices, their budgets, and the largest nested size that fits each.

Units: bytes, kilobits per second, MACs per example (forward). Speed is relative to the reference device of
``clock.REFERENCE_MACS_PER_SECOND``.
"""

import itertools
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmaestro import rng
from fedmaestro.errors import UserError, check_name, unknown_name
from fedmaestro.fleet.cost import Cost

Link = TypeVar("Link")
"""One size in a chain of nested ones, in whatever form: a fraction, ranks, a position."""


class Tier(BaseModel):
    """A class of devices. A budget that is None does not bind; a tier's size is the largest that fits all of them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        allow_inf_nan=False,
    )

    name: str = Field(min_length=1)
    share: float = Field(gt=0, le=1)
    """Part of the fleet."""
    rank_fraction: float | None = Field(None, gt=0, le=1)
    """Ranks at most ``⌊fraction · R⌋`` (1 at least); width models get the MACs of those ranks as their budget."""
    macs_fraction: float | None = Field(None, gt=0, le=1)
    """Forward MACs at most this part of the full model's."""
    macs: int | None = Field(None, gt=0)
    """Forward MACs per example at most."""
    memory_bytes: int | None = Field(None, gt=0)
    """Peak training memory at most (parameters, gradients, optimiser state, activations of a batch)."""
    round_bytes: int | None = Field(None, gt=0)
    """Download plus upload of one round at most."""
    ram_bytes: int | None = Field(None, gt=0)
    """Memory of the device; a quarter of it (``TRAINING_SHARE_OF_RAM``) is one more memory budget."""
    speed: float = Field(1.0, gt=0)
    download_kbps: float = Field(4318.0, gt=0)
    upload_kbps: float = Field(3286.0, gt=0)
    availability: float = Field(1.0, gt=0, le=1)
    """Probability that a device of this tier can be reached in a round."""


TRAINING_SHARE_OF_RAM = 0.25
"""Our assumption: Android kills background work that holds much more; no source measures it for training."""

GB = 10**9

# Speed: percentiles of the inference latency of one ResNet over 978 phone entries (AI-Benchmark, as compiled by
# FLHetBench, CVPR 2024): p5 59 ms, p25 96, p50 172, p75 310, p95 572, relative to p5.
_P5, _P25, _P50, _P75, _P95 = 1.0, 59 / 96, 59 / 172, 59 / 310, 59 / 572

# Down/up links: percentiles 95, 50 and 5 of the WiFi traces of FLASH (WWW 2021), kb/s.
_FAST = {"download_kbps": 17333.0, "upload_kbps": 6635.0}
_MEDIAN = {"download_kbps": 4318.0, "upload_kbps": 3286.0}
_SLOW = {"download_kbps": 2370.0, "upload_kbps": 431.0}


@dataclass(frozen=True, kw_only=True)
class FleetPreset:
    """One row of ``FLEETS``."""

    tiers: tuple[Tier, ...]
    summary: str


FLEETS: dict[str, FleetPreset] = {
    "five-tiers": FleetPreset(
        summary="equal shares; ranks 1, 1/2, 1/4, 1/8, 1/16 (HeteroFL's levels, applied to ranks)",
        tiers=(
            Tier(name="flagship", share=0.2, rank_fraction=1, speed=_P5, **_FAST),
            Tier(name="high", share=0.2, rank_fraction=1 / 2, speed=_P25, **_FAST),
            Tier(name="mid", share=0.2, rank_fraction=1 / 4, speed=_P50, **_MEDIAN),
            Tier(name="low", share=0.2, rank_fraction=1 / 8, speed=_P75, **_MEDIAN),
            Tier(name="minimal", share=0.2, rank_fraction=1 / 16, speed=_P95, **_SLOW),
        ),
    ),
    # Relative speeds 1, 0.42, 0.2, 0.1 with 8, 6, 4, 1 GB: measured latencies and RAM modes (FLHetBench,
    # AI-Benchmark). Ranks in proportion to speed: the part of a step that ranks govern takes all tiers the same time.
    "phones": FleetPreset(
        summary="measured phones: speed and ranks 1, 0.42, 0.2, 0.1; RAM 8, 6, 4, 1 GB; WiFi traces",
        tiers=(
            Tier(name="flagship", share=0.2, rank_fraction=1, speed=1, ram_bytes=8 * GB, **_FAST),
            Tier(name="mid", share=0.3, rank_fraction=0.42, speed=0.42, ram_bytes=6 * GB, **_MEDIAN),
            Tier(name="low", share=0.3, rank_fraction=0.2, speed=0.2, ram_bytes=4 * GB, **_MEDIAN),
            Tier(name="legacy", share=0.2, rank_fraction=0.1, speed=0.1, ram_bytes=1 * GB, **_SLOW),
        ),
    ),
    "skewed": FleetPreset(
        summary="5/10/25/60 % of the devices at ranks 1, 1/2, 1/4, 1/8 (FedLASE's shares: few capable devices)",
        tiers=(
            Tier(name="flagship", share=0.05, rank_fraction=1, speed=_P5, **_FAST),
            Tier(name="high", share=0.10, rank_fraction=1 / 2, speed=_P25, **_FAST),
            Tier(name="mid", share=0.25, rank_fraction=1 / 4, speed=_P50, **_MEDIAN),
            Tier(name="low", share=0.60, rank_fraction=1 / 8, speed=_P75, **_MEDIAN),
        ),
    ),
}


def load_tiers(preset: str, file: str = "") -> tuple[Tier, ...]:
    """Return the tiers of a preset, or of a TOML file with one ``[tiers.NAME]`` table each.

    Raises:
        UserError: an unknown preset, an unreadable file, unknown keys, shares that do not sum to 1.
    """
    if not file:
        check_name("fleet.preset", preset, FLEETS)
        return FLEETS[preset].tiers
    tables = _read_tables(file)
    tiers = tuple(_parse_tier(file, name, table) for name, table in tables.items())
    total = sum(tier.share for tier in tiers)
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError(f"{file}: the shares of the tiers sum to {total:g}, they must sum to 1")
    return tiers


def _read_tables(file: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"fleet.file: cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"fleet.file: {file} is not valid TOML: {error}") from None
    for key in content:
        if key != "tiers":
            raise unknown_name("table", key, ["tiers"], f" in {file}")
    tables = content.get("tiers")
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"fleet.file: {file} has no tier: write a table [tiers.NAME] for each")
    return tables


def _parse_tier(file: str, name: str, table: Any) -> Tier:
    if not isinstance(table, dict):
        raise UserError(f"{file}: tiers.{name} = {table!r}: write a table [tiers.{name}]")
    if "name" in table:
        raise UserError(f"{file}: tiers.{name}.name: the table's own name is the tier's, remove this key")
    try:
        return Tier.model_validate({"name": name, **table}, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: tiers.{name}.{key}: {first['msg'].lower()}, got {first['input']!r}") from None


def assign_tiers(tiers: Sequence[Tier], num_devices: int, seed: int) -> tuple[int, ...]:
    """Return the tier index of every device: counts by largest remainder of the shares, order by ``seed``.

    Raises:
        UserError: a tier that would get no device.
    """
    counts = _counts(tiers, num_devices)
    if 0 in counts:
        empty = tiers[counts.index(0)]
        needed = next(n for n in itertools.count(num_devices + 1) if 0 not in _counts(tiers, n))
        raise UserError(
            f"data.devices={num_devices} leaves no device for tier {empty.name!r} "
            f"(share {empty.share:g}): use at least {needed} devices or another fleet"
        )
    indices = [i for i, count in enumerate(counts) for _ in range(count)]
    return tuple(int(i) for i in rng.generator(seed, "tiers").permutation(indices))


def _counts(tiers: Sequence[Tier], num_devices: int) -> list[int]:
    """Return the devices of each tier by largest remainder."""
    exact_counts = [tier.share * num_devices for tier in tiers]
    counts = [math.floor(x + 1e-9) for x in exact_counts]
    by_remainder = sorted(range(len(tiers)), key=lambda i: counts[i] - exact_counts[i])
    for i in by_remainder[: num_devices - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One bound on one figure of a ``Cost``."""

    name: str
    limit: int
    unit: str
    of: Callable[[Cost], int]

    def excess(self, cost: Cost) -> str:
        """Return '' when ``cost`` fits, else by how much it does not."""
        used = self.of(cost)
        if used <= self.limit:
            return ""
        ratio = f" (×{used / self.limit:.2f})" if self.limit else ""
        return f"{self.name} {self.limit:,} {self.unit}, needed {used:,}{ratio}"


def budgets(tier: Tier, full: Cost) -> list[Budget]:
    """Return the budgets that bind ``tier``; ``full`` is the cost of the whole model, for relative ones."""
    bounds = [
        ("macs-fraction", _times(tier.macs_fraction, full.macs_per_example), "MACs", _macs),
        ("macs", tier.macs, "MACs", _macs),
        ("memory-bytes", tier.memory_bytes, "bytes", _memory),
        ("ram-bytes", _times(TRAINING_SHARE_OF_RAM, tier.ram_bytes), "bytes (a quarter of the RAM)", _memory),
        ("round-bytes", tier.round_bytes, "bytes", _traffic),
    ]
    return [Budget(name=name, limit=limit, unit=unit, of=of) for name, limit, unit, of in bounds if limit is not None]


def within_ranks(tier: Tier, fractions: Sequence[Fraction]) -> Sequence[Fraction]:
    """Return those of ``fractions`` (ascending) that the tier's rank fraction allows: the smallest one in any case."""
    cap = Fraction(1) if tier.rank_fraction is None else exact(tier.rank_fraction)
    return [f for f in fractions if f <= cap] or fractions[:1]


def fit(tier: Tier, chain: Sequence[Link], cost_at: Callable[[Link], Cost], full: Cost) -> Link:
    """Return the largest of a ``chain`` of nested sizes (ascending) whose cost fits every budget of ``tier``.

    Costs grow along the chain, so this is a binary search; being one chain, the sizes of all tiers are nested. The rank
    fraction is no budget: ``within_ranks`` shortens a chain of fractions by it, ``without_fraction`` replaces it.

    Raises:
        UserError: even the smallest size (rank 1 everywhere) does not fit: which budgets, and by how much.
    """
    limits = budgets(tier, full)
    if excess := [text for budget in limits if (text := budget.excess(cost_at(chain[0])))]:
        raise UserError(
            f"tier {tier.name!r} cannot afford the smallest submodel: {'; '.join(excess)}: "
            "raise the budget, or choose a smaller model or batch size"
        )
    low, high = 0, len(chain) - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = not any(budget.excess(cost_at(chain[middle])) for budget in limits)
        low, high = (middle, high) if fits else (low, middle - 1)
    return chain[low]


def exact(fraction: float) -> Fraction:
    """Return the fraction that a decimal in a configuration means: 0.0625 is 1/16, 0.333333 is 1/3."""
    return Fraction(fraction).limit_denominator(10_000)


def with_macs_budget(tier: Tier, macs: int) -> Tier:
    """Return ``tier`` for a width-scaled model: the MACs of its ranks take the place of the rank fraction."""
    limit = macs if tier.macs is None else min(macs, tier.macs)
    return tier.model_copy(update={"rank_fraction": None, "macs_fraction": None, "macs": limit})


def without_fraction(tier: Tier, uniform: Cost) -> Tier:
    """Return ``tier`` for other ranks than uniform ones: what these cost takes the place of the rank fraction.

    MACs and traffic both: layers that share weights over many positions are dear in MACs, others in bytes, so ranks of
    equal MACs can differ several times in bytes.
    """
    if tier.rank_fraction is None:
        return tier
    limits = {"macs": _macs(uniform), "round_bytes": _traffic(uniform)}
    given = {"macs": tier.macs, "round_bytes": tier.round_bytes}
    lowest = {key: min(limit, given[key] or limit) for key, limit in limits.items()}
    return tier.model_copy(update={"rank_fraction": None, **lowest})


def _times(factor: float | None, value: int | None) -> int | None:
    return None if factor is None or value is None else math.floor(factor * value)


def _macs(cost: Cost) -> int:
    return cost.macs_per_example


def _memory(cost: Cost) -> int:
    return cost.train_memory_bytes


def _traffic(cost: Cost) -> int:
    return cost.download_bytes + cost.upload_bytes
