"""Where the output goes: few letters, closed pipes, log files, programs. No run is lost for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = (
    *("--set", "data.devices=8", "--set", "train.devices-per-round=4", "--set", "train.rounds=2"),
    *("--set", "model.name=mlp", "--actors", "0"),
)
FLEET = """
[tiers."big [/red]"]
share = 0.5
rank-fraction = 1.0
[tiers."small [bold]x"]
share = 0.5
rank-fraction = 0.25
"""


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "fedmaestro.cli", *arguments],
        capture_output=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp932", marks=pytest.mark.slow)])
def test_letters_that_an_encoding_lacks_are_replaced(tmp_path: Path, encoding: str) -> None:
    done = command("run", *SMALL, "--out", str(tmp_path / "run"), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert b"model_sha256" in done.stdout
    done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ["latin-1", "gbk"])
def test_every_list_can_be_read(encoding: str) -> None:
    for kind in ("settings", "strategies"):
        assert command("list", kind, PYTHONIOENCODING=encoding).returncode == 0


def test_a_run_outlives_its_reader(tmp_path: Path) -> None:
    for number, more in enumerate(([], ["--log-format", "json"])):
        out = tmp_path / str(number)
        words = ["run", *SMALL, "--out", str(out), *more]
        pipeline = f"{sys.executable} -m fedmaestro.cli {' '.join(words)} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        assert len(done.stdout.splitlines()) == 1
        assert json.loads((out / "summary.json").read_text())["rounds"] == 2


def test_names_are_no_markup_and_lines_of_a_log_are_whole(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    done = command(
        "run", *SMALL, "--set", f"fleet.file={fleet}", "--out", str(tmp_path / ("long-" * 30)), COLUMNS="300"
    )
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "big [/red]" in text
    assert "small [bold]x" in text
    assert f"results: {tmp_path / ('long-' * 30)} (" in text


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    run, cmp = tmp_path / "run", tmp_path / "cmp"
    done = command("run", *SMALL, "--set", "train.lr=1e20", "--out", str(run), "--log-format", "json")
    assert done.returncode == 3
    events = [json.loads(line) for line in done.stdout.splitlines()]
    names = [event["event"] for event in events]
    assert [name for name in names if name != "log"] == ["start", "round", "round", "round", "finish"]
    assert any("failed: device" in event["message"] for event in events if event["event"] == "log")
    assert events[-1]["failed_by"] == {"not-finite": 8}
    assert [event["round"] for event in events if event["event"] == "round"] == [0, 1, 2]
    done = command(
        "compare", "--strategies", "nested", "--seeds", "1", *SMALL, "--out", str(cmp), "--log-format", "json"
    )
    names = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert names == ["cells", "cell", "start", "round", "round", "round", "finish", "cells"]
    words = ("train", "--set", "train.epochs=1", "--out", str(tmp_path / "train"), "--log-format", "json")
    names = [json.loads(line)["event"] for line in command(*words).stdout.splitlines()]
    assert names[0] == "start"
    assert names[-1] == "finish"
    assert names.count("epoch") == 2
