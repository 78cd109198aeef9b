"""A run in which nothing was learnt is no success: not for the exit code, not in a table, not on a page."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import fedmaestro
from fedmaestro.config.base import parse_assignment
from fedmaestro.errors import UntrainedError
from fedmaestro.flower.client_app import app as honest
from fedmaestro.flower.run import Run
from fedmaestro.runs.folder import RunFolder

SMALL: dict[str, Any] = {"data.devices": 10, "train.devices-per-round": 4, "train.rounds": 3, "model.name": "mlp"}


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    words = [f"--set={key}={value}" for key, value in SMALL.items()]
    return subprocess.run(
        [sys.executable, "-m", "fedmaestro.cli", *arguments, *words, "--actors", "0"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("train.lr=1e300", "12 error"),
        ("train.lr=1e20", "12 not-finite"),
        ("train.weight-decay=1e30", "12 not-finite"),
        ("train.max-update-norm=1e-9", "12 too-large"),
        ("fleet.deadline-seconds=1e-9", "12 dropped"),
    ],
)
def test_nothing_trained_is_an_error(tmp_path: Path, setting: str, why: str) -> None:
    key, value = parse_assignment(setting)
    with pytest.raises(UntrainedError, match=rf"^no update counted in 3 rounds \({why}\)"):
        fedmaestro.run(overrides=SMALL | {key: value}, out=tmp_path / "run", actors=0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["updates"]["sampled"], summary["updates"]["trained"]) == (12, 0)
    tiers = [tier["updates"] for tier in summary["tiers"].values()]
    assert sum(tier["sampled"] for tier in tiers) == 12
    assert all(tier["sampled"] == tier["failed"] + tier["dropped"] for tier in tiers)


def test_the_exit_code_says_so(tmp_path: Path) -> None:
    done = command("run", "--set", "train.lr=1e20", "--out", str(tmp_path / "run"))
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.startswith("fedmaestro: no update counted in 3 rounds (12 not-finite)"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert " of " in done.stdout, "the closing table is shown, with the lost updates"


class Failing(ClientApp):
    """Fails at every training message, or at those of some rounds."""

    def __init__(self, rounds: range) -> None:
        super().__init__()
        self._rounds = rounds

    def __call__(self, message: Message, context: Context) -> Message:
        job: Any = message.content.config_records["job"]
        if message.metadata.message_type == "train" and job["round"] in self._rounds:
            raise RuntimeError("out of order")
        return honest(message, context)


def run(out: Path, failing: range, **settings: Any) -> Run:
    overrides = SMALL | settings
    return fedmaestro.run(overrides=overrides, out=out, actors=0, client_app=Failing(failing))


def test_a_run_without_updates_stops_early_and_says_why(tmp_path: Path) -> None:
    settings = {"train.rounds": 30, "train.max-idle-rounds": 4}
    with pytest.raises(UntrainedError, match=r"stopped after round 4: no update counted in 4 rounds in a row .*host"):
        run(tmp_path / "never", range(100), **settings)
    with pytest.raises(UntrainedError, match="stopped after round 6") as caught:
        run(tmp_path / "later", range(3, 100), **settings)
    later = Run(caught.value.path)
    assert [record.devices for record in later.rounds] == [0, 4, 4, 0, 0, 0, 0]
    assert later.rounds[-1].tiers, "what was reached is evaluated"
    assert later.summary["stopped"].startswith("stopped after round 6")
    assert "stopped after round 6" in RunFolder(later.path).log.read_text()
    # Idle rounds in between are no reason.
    whole = run(tmp_path / "between", range(3, 6), **{**settings, "train.rounds": 8})
    assert whole.summary["rounds"] == 8
    assert whole.summary["stopped"] is None
    assert whole.summary["failed_by"] == {"host": 12}


def test_idle_rounds_are_counted_across_a_resume(tmp_path: Path) -> None:
    with pytest.raises(UntrainedError):
        run(tmp_path / "run", range(100), **{"train.rounds": 9, "train.max-idle-rounds": 3})
    with pytest.raises(UntrainedError, match="stopped after round 4: no update counted in 4 rounds"):
        fedmaestro.run(out=tmp_path / "run", resume=True, actors=0, client_app=Failing(range(100)))


def test_tables_and_pages_say_how_many_updates_are_lost(tmp_path: Path) -> None:
    finished = run(tmp_path / "run", range(2, 3))
    page = (finished.path / "report.html").read_text()
    assert "Updates lost" in page
    tiers = finished.summary["tiers"]
    for tier in tiers.values():
        if tier["updates"]["sampled"]:
            counts = tier["updates"]
            assert f"{counts['failed'] + counts['dropped']} of {counts['sampled']}" in page


def test_a_comparison_with_such_a_cell_fails_and_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "cmp"
    rows = "nested,broken:nested+train.lr=1e20"
    done = command("compare", "--strategies", rows, "--seeds", "1", "--out", str(out))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "fedmaestro: broken, seed 0: no update counted in 3 rounds (12 not-finite)" in done.stderr
    table = (out / "table.md").read_text()
    assert "| 0 of 12" in table
    assert "12 of 12" in table
    results = json.loads((out / "results.json").read_text())
    assert results["strategies"][1]["failed_by"] == {"not-finite": 12}
    assert "12 not-finite" in (out / "report.html").read_text()
