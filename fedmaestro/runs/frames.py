"""Runs as pandas tables, for notebooks and further statistics."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmaestro.report.facts import RunFacts
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.reader import read_run

if TYPE_CHECKING:
    import pandas as pd


def rounds_frame(path: Path) -> "pd.DataFrame":
    """Return a row for every evaluated round and tier of a run.

    Columns: ``strategy``, ``seed``, ``dataset``, ``model``, ``round``, ``tier``, every metric and ``loss``; of the
    whole run until then ``bytes`` (received and sent by all devices) and ``virtual_seconds``; and where devices
    have tests of their own, ``device_test_mean``, ``device_test_std`` and ``device_test_worst_decile``.
    """
    import pandas as pd

    run = read_run(path)
    facts = {key: value for key, value in RunFacts(run).headline.items() if key != "objective"}
    facts["seed"] = int(facts["seed"]) if facts["seed"].isdecimal() else facts["seed"]  # type: ignore[assignment]
    rows: list[dict[str, Any]] = []
    sent, clock = 0, 0.0
    for record in run.rounds:
        sent += record.download_bytes + record.upload_bytes
        clock += record.virtual_seconds
        for tier, values in record.tiers.items():
            own = {f"device_test_{key}": x for key, x in record.device_test.get(tier, {}).items() if key != "devices"}
            now = {"round": record.round, "tier": tier, **values, "bytes": sent, "virtual_seconds": clock, **own}
            rows.append({**facts, **now})
    return pd.DataFrame(rows)


def devices_frame(path: Path) -> "pd.DataFrame":
    """Return a row for every round and device that trained or was tested in it.

    Columns: ``round``, ``device``, ``train_loss`` (NaN where it did not train) and ``test_METRIC`` of its own test
    examples (NaN where it was not tested).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for record in RunFolder(path).read_devices():
        for device in sorted({*record.loss, *record.test}, key=int):
            tested = {f"test_{name}": value for name, value in record.test.get(device, {}).items()}
            row = {"round": record.round, "device": int(device), "train_loss": record.loss.get(device), **tested}
            rows.append(row)
    return pd.DataFrame(rows)
