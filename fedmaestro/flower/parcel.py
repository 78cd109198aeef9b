"""What messages name and do not carry, data and large objects, on its way to machines that do not have it.

A host opens the experiment itself, with the files of its machine or from that machine's cache. Where neither has what
a message names, the entry of the server's cache goes there. Nothing here knows how.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.data import cache, data_folder
from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import JOB
from fedmaestro.runs.code import LARGE, cached, stored
from fedmaestro.tasks.opening import is_here


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """An entry of a cache."""

    place: str
    """Relative to the cache folder."""
    files: cache.Packed

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def lacking(message: Message) -> list[str]:
    """Return the fingerprints of what a message names and this machine does not have."""
    job: dict[str, Any] = dict(message.content.config_records[JOB])
    data = ExperimentConfig.model_validate_json(job["experiment"]).data
    found = {job["data"]: is_here(data.name, data_folder(data.dir), job["data"])}
    if (code := job.get(LARGE)) is not None:
        found[code] = cache.read(cached(code), lambda entry: stored(entry, code)) is not None
    return [fingerprint for fingerprint, here in found.items() if not here]


def pack(fingerprint: str) -> Parcel | None:
    """Return what this machine's cache has of a fingerprint: data, or code; None: nothing."""

    def parcel(entry: Path) -> Parcel:
        return Parcel(place=str(entry.relative_to(cache.cache_root())), files=cache.pack(entry))

    data = cache.find(fingerprint, parcel)
    return data if data is not None else cache.read(cached(fingerprint), parcel)


def unpack(parcel: Parcel) -> None:
    """Put a parcel into this machine's cache; UserError if that cannot be written, or it would lie elsewhere."""
    place = Path(parcel.place)
    if place.is_absolute() or ".." in place.parts or any(Path(name).name != name for name in parcel.files):
        raise UserError(f"a parcel for {parcel.place!r} does not belong into the cache")
    cache.unpack(cache.cache_root() / place, parcel.files)
