"""Damaged run folders: what is resumed, loaded or reported is what was written, or one line says why not.

``FUZZ`` in the environment makes it longer (``make fuzz``).
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedmaestro
from fedmaestro.deploy.extract import Target
from fedmaestro.errors import UserError
from fedmaestro.report import write_report

MANY = int(os.environ.get("FUZZ", "1"))

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 10**15, 10**30, 0.5, 1e300, "", "x", "../../x", "1/0", "\x00", "x" * 1000),
    *([], {}, [1, 2], [[]], {"a": 1}, [10**9, 10**9], [-1], ["a"]),
)
SMALL = {
    "data.devices": 8,
    "train.devices-per-round": 4,
    "train.rounds": 4,
    "train.evaluate-every": 2,
    "model.name": "mlp",
    "data.device-test": 0.2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    return fedmaestro.run(overrides=SMALL, out=tmp_path_factory.mktemp("whole") / "run", actors=0).path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after round 2."""
    from fedmaestro.rounds.observer import Observer
    from fedmaestro.runs.records import RoundRecord

    class Stop(Observer):
        def on_round(self, record: RoundRecord) -> None:
            if record.round == 2:
                raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        fedmaestro.run(overrides=SMALL, out=out, actors=0, observers=[Stop()])
    return out


def lines_damaged(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif kind == 2:
        rng.shuffle(lines)
    elif kind == 3:
        lines = []
    elif kind == 4:
        record = json.loads(lines[at])
        record["round"] = rng.choice((-1, 0, 1, 2, 3, 7, 10**9))
        lines[at] = json.dumps(record) + "\n"
    elif kind == 5:
        lines[at] = damaged_json(json.loads(lines[at]), rng) + "\n"
    else:
        lines[at] = lines[at][: rng.randrange(len(lines[at]))]
    path.write_text("".join(lines))


def damaged_json(content: Any, rng: random.Random) -> str:
    """Return JSON with one value, somewhere in it, exchanged or taken away."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                visit(value)

    visit(content)
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(ODD)
    return json.dumps(content)


def bytes_damaged(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    at = rng.randrange(len(content))
    if kind == 0:
        content = content[:at]
    elif kind == 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content = bytearray()
    else:
        content[at:at] = bytes(rng.randrange(256) for _ in range(8))
    path.write_bytes(bytes(content))


def json_damaged(path: Path, rng: random.Random) -> None:
    path.write_text(damaged_json(json.loads(path.read_text()), rng))


DAMAGES: tuple[tuple[str, Callable[[Path, random.Random], None]], ...] = (
    ("rounds.jsonl", lines_damaged),
    ("rounds.jsonl", bytes_damaged),
    ("devices.jsonl", lines_damaged),
    ("config.toml", bytes_damaged),
    ("checkpoint/progress.json", json_damaged),
    ("checkpoint/progress.json", bytes_damaged),
    ("checkpoint/round-000002.safetensors", bytes_damaged),
    ("checkpoint/older.json", bytes_damaged),
)


def test_a_damaged_run_is_resumed_as_it_was_or_not_at_all(finished: Path, stopped: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    expected = json.loads((finished / "summary.json").read_text())
    resumed = 0
    for number in range(24 * MANY):
        folder = tmp_path / str(number)
        shutil.copytree(stopped, folder)
        name, damage = DAMAGES[number % len(DAMAGES)]
        damage(folder / name, rng)
        try:
            run = fedmaestro.run(out=folder, resume=True, actors=0)
        except UserError:
            # The checkpoint before the newest one is there too, and of it there is another.
            assert not name.startswith("checkpoint/") or number_of_format(folder) != 3, (name, number)
        else:
            resumed += 1
            assert run.summary["model_sha256"] == expected["model_sha256"], (name, number)
            assert run.summary["tiers"] == expected["tiers"], (name, number)
            assert [record.round for record in run.rounds] == [0, 1, 2, 3, 4], (name, number)
        shutil.rmtree(folder)
    assert resumed < 24 * MANY


def number_of_format(folder: Path) -> object:
    """Return the format that a damaged pointer says; 3 where it cannot be read."""
    try:
        return json.loads((folder / "checkpoint/progress.json").read_text()).get("format", 1)
    except (ValueError, AttributeError):
        return 3


def test_a_comparison_goes_on_over_a_damaged_cell_or_says_why_not(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    small = SMALL | {"train.rounds": 2}
    expected = fedmaestro.compare(None, ["fjord", "nested"], 1, overrides=small, out=whole, actors=0).results
    rng = random.Random(0)
    names = ["summary.json", "rounds.jsonl", "config.toml", "checkpoint/progress.json", "../../results.json"]
    for number in range(10 * MANY):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        name = names[number % len(names)]
        damages = [bytes_damaged]
        damages += [json_damaged] * 2 if name.endswith(".json") else [lines_damaged] if name.endswith(".jsonl") else []
        rng.choice(damages)(folder / "cells" / "nested-seed0" / name, rng)
        try:
            found = fedmaestro.compare(
                None, ["fjord", "nested"], 1, overrides=small, out=folder, actors=0, resume=True
            ).results
        except UserError:
            pass
        else:
            for row, before in zip(found["strategies"], expected["strategies"], strict=True):
                assert row == before, (name, number)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.json", "summary.json", "rounds.jsonl", "config.toml", "model.safetensors"])
def test_a_damaged_result_is_read_or_refused(finished: Path, tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    damages = [bytes_damaged]
    damages += [json_damaged] * 4 if name.endswith(".json") else []
    damages += [lines_damaged] * 2 if name.endswith(".jsonl") else []
    for number in range(10 * MANY):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        rng.choice(damages)(folder / name, rng)
        uses: tuple[Callable[[], object], ...] = (
            lambda folder=folder: fedmaestro.load_model(folder, "low"),
            lambda folder=folder: fedmaestro.extract(folder, Target(tier="low")),
            lambda folder=folder: write_report([folder], folder / "page.html"),
        )
        for use in uses:
            with contextlib.suppress(UserError):
                use()
        shutil.rmtree(folder)
