"""What all trackers share: when they are told what, the names of figures, and that they never end a run."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedmaestro.errors import UserError
from fedmaestro.places import absolute
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import DeviceRecord, RoundRecord, Summary

log = logging.getLogger("fedmaestro")

_ROUND = (
    *("train_loss", "devices", "failed", "dropped", "download_bytes", "upload_bytes"),
    *("virtual_seconds", "wall_seconds", "tail_energy", "factor_bias"),
)


def scalars(record: RoundRecord, devices: DeviceRecord | None = None) -> dict[str, float]:
    """Return the figures of a round by name; what is unknown is left out.

    ``tier/TIER/METRIC`` and ``tier/TIER/loss``; ``tier/TIER/device_test/mean`` (``std``, ``worst_decile``);
    ``round/train_loss``, ``round/download_bytes``, …; with ``devices``, ``device/NUMBER/train_loss`` and
    ``device/NUMBER/test/METRIC``.
    """
    found: dict[str, float | None] = {f"round/{key}": getattr(record, key) for key in _ROUND}
    for tier, values in record.tiers.items():
        found |= {f"tier/{tier}/{name}": value for name, value in values.items()}
    for tier, values in record.device_test.items():
        found |= {f"tier/{tier}/device_test/{name}": value for name, value in values.items() if name != "devices"}
    if devices is not None:
        found |= {f"device/{device}/train_loss": loss for device, loss in devices.loss.items()}
        for device, tested in devices.test.items():
            found |= {f"device/{device}/test/{name}": value for name, value in tested.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


class Tracker(ComparisonObserver):
    """Writes a run, or in a comparison every cell as a run of its own, to some store.

    A tracker that fails (a full disk, a server that is gone) is left out for the rest of the run with a warning: what
    it would have written is in the run folder too. Of a resumed run it is told the rounds so far first.

    Args:
        path: where to write; None: below the run folder.
        devices: also write the figures of single devices.
    """

    name = ""
    package = ""
    """What must be installed; empty: nothing."""

    def __init__(self, path: str | Path | None = None, *, devices: bool = False) -> None:
        if self.package and find_spec(self.package) is None:
            raise UserError(
                f"tracker {self.name!r} needs the package {self.package!r}: pip install 'fedmaestro[{self.name}]'"
            )
        self.path, self.devices = None if path is None else absolute(path), devices
        self.label = ""
        self._pending: DeviceRecord | None = None
        self._broken = False

    def open(self, env: Environment, folder: RunFolder, resumed: bool) -> None:
        """Start, or go on with, the tracker's run."""

    def write(self, number: int, figures: dict[str, float]) -> None:
        """Write the figures of round ``number``."""

    def close(self, folder: RunFolder, summary: Summary | None) -> None:
        """End the tracker's run; ``summary`` is None where the run did not get that far."""

    def on_cell(self, label: str, seed: int) -> None:
        self.label = f"{label}-seed{seed}"

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:
        self._broken, self._pending = False, None
        self._guarded(lambda: self.open(env, folder, first_round > 0))

    def on_devices(self, record: DeviceRecord) -> None:
        self._pending = record

    def on_round(self, record: RoundRecord) -> None:
        devices = self._pending if self.devices and self._pending and self._pending.round == record.round else None
        self._guarded(lambda: self.write(record.round, scalars(record, devices)))

    def on_finish(self, folder: RunFolder, summary: Summary) -> None:
        self._guarded(lambda: self.close(folder, summary))

    def _guarded(self, what: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            what()
        except Exception as error:
            self._broken = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            log.warning("tracker %s is left out from here on: %s", self.name, reason)

    def place(self, folder: RunFolder, default: str) -> Path:
        """Return where to write: ``path`` (in a comparison, the cell's folder in it), or in the run folder."""
        if self.path is None:
            return folder.path / default
        return self.path / self.label if self.label else self.path
