"""Fleets: tiers of devices, and which device belongs to which.

Units: bytes, kilobits per second, MACs per example (forward). Speed is relative to the reference device of
``clock.REFERENCE_MACS_PER_SECOND``.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedmaestro import rng
from fedmaestro.config.base import kebab
from fedmaestro.errors import UserError, check_name, reason_of, shown, unknown_name
from fedmaestro.places import read_file


class Tier(BaseModel):
    """A class of devices. A budget that is None does not bind; a tier's size is the largest that fits all of them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=kebab,
        validate_by_name=True,
        allow_inf_nan=False,
    )

    name: str = Field(min_length=1, max_length=60)
    """Printable characters."""
    share: float = Field(gt=0, le=1)
    """Part of the fleet."""
    rank_fraction: float | None = Field(None, gt=0, le=1)
    """Ranks at most ``⌊fraction · R⌋`` (1 at least); width models get the MACs of those ranks as their budget."""
    width: float | None = Field(None, gt=0, le=1)
    """Channels at most this part of the whole network's; rank models get the MACs of that width as their budget, or the
    smallest ranks where these cost more."""
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

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable() or name != name.strip():
            raise ValueError("a name has printable characters, and no space at its ends")
        return name


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
    "uniform": FleetPreset(
        summary="one tier that affords the whole network: plain federated learning",
        tiers=(Tier(name="device", share=1.0, **_MEDIAN),),
    ),
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
    "five-widths": FleetPreset(
        summary="equal shares; channels 1, 1/2, 1/4, 1/8, 1/16 (HeteroFL's levels a to e)",
        tiers=tuple(
            Tier(name=name, share=0.2, width=2.0**-i, speed=speed, **link)
            for i, (name, speed, link) in enumerate(
                zip("abcde", (_P5, _P25, _P50, _P75, _P95), (_FAST, _FAST, _MEDIAN, _MEDIAN, _SLOW), strict=True)
            )
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


def load_tiers(preset: str, file: str | None = None) -> tuple[Tier, ...]:
    """Return the tiers of a preset, or of a TOML file with one ``[tiers.NAME]`` table each.

    Raises:
        UserError: an unknown preset, an unreadable file, unknown keys, shares that do not sum to 1.
    """
    if file is None:
        check_name("fleet.preset", preset, FLEETS)
        return FLEETS[preset].tiers
    return _tiers_of(_read_tables(file), file)


def own_fleet(name: str, tiers: Any, summary: str) -> FleetPreset:
    """Return the row of a fleet of user code: ``Tier`` records, or tables of settings by the tiers' names."""
    where = f"fleet {name!r}"
    if isinstance(tiers, Mapping):
        return FleetPreset(tiers=_tiers_of(tiers, where), summary=summary)
    tiers = tuple(tiers) if isinstance(tiers, list | tuple) else ()
    if not tiers or not all(isinstance(tier, Tier) for tier in tiers):
        raise UserError(f"{where}: give tables by the tiers' names, or a list of fedmaestro.fleet.tiers.Tier")
    _check_shares(tiers, where)
    return FleetPreset(tiers=tiers, summary=summary)


def _tiers_of(tables: Mapping[str, Any], where: str) -> tuple[Tier, ...]:
    tiers = tuple(_parse_tier(where, name, table) for name, table in tables.items())
    _check_shares(tiers, where)
    return tiers


def _check_shares(tiers: Sequence[Tier], where: str) -> None:
    names = [tier.name for tier in tiers]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: the tier {repeated[0]!r} comes twice: name each once")
    total = sum(tier.share for tier in tiers)
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError(f"{where}: the shares of the tiers sum to {total:g}, they must sum to 1")


def _read_tables(file: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(read_file(file).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"fleet.file: cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
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
        raise UserError(f"{file}: tiers.{name} = {shown(table)}: write a table [tiers.{name}]")
    if "name" in table:
        raise UserError(f"{file}: tiers.{name}.name: the table's own name is the tier's, remove this key")
    try:
        return Tier.model_validate({"name": name, **{kebab(key): x for key, x in table.items()}}, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: tiers.{name}.{key}: {reason_of(first)}, got {shown(first['input'])}") from None


TRIES = 10_000
"""Numbers of devices that are tried for a better hint."""


def assign_tiers(tiers: Sequence[Tier], num_devices: int, seed: int) -> npt.NDArray[np.int64]:
    """Return each device's tier index ``(devices,)``: counts by largest remainder of the shares, order by ``seed``.

    Raises:
        UserError: a tier that would get no device.
    """
    counts = _counts(tiers, num_devices)
    if 0 in counts:
        empty = tiers[counts.index(0)]
        # With so many, the smallest share is a device of its own; fewer may do, but are not searched for for ever.
        enough = math.ceil(1 / min(tier.share for tier in tiers))
        tries = range(num_devices + 1, min(enough, num_devices + TRIES))
        needed = next((n for n in tries if 0 not in _counts(tiers, n)), enough)
        raise UserError(
            f"data.devices={num_devices} leaves no device for tier {empty.name!r} "
            f"(share {empty.share:g}): use at least {needed} devices or another fleet"
        )
    return rng.generator(seed, "tiers").permutation(np.repeat(np.arange(len(tiers)), counts))


def _counts(tiers: Sequence[Tier], num_devices: int) -> list[int]:
    """Return the devices of each tier by largest remainder."""
    exact_counts = [tier.share * num_devices for tier in tiers]
    counts = [math.floor(x + 1e-9) for x in exact_counts]
    by_remainder = sorted(range(len(tiers)), key=lambda i: counts[i] - exact_counts[i])
    for i in by_remainder[: num_devices - sum(counts)]:
        counts[i] += 1
    return counts
