"""Whatever somebody writes into a configuration, or behind ``--set``: one line that says what is wrong, or a run.

``FUZZ`` in the environment makes it longer (``make fuzz``).
"""

import os
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmaestro.cli import main
from fedmaestro.config.base import describe, kebab, parse_assignment, read
from fedmaestro.config.experiment import ExperimentConfig, load_config
from fedmaestro.errors import LINE, UserError, one_line
from fedmaestro.fleet.tiers import Tier, assign_tiers, load_tiers, own_fleet
from fedmaestro.flower.run import prepare

MANY = int(os.environ.get("FUZZ", "1"))

ODD: tuple[Any, ...] = (
    *(
        "",
        " ",
        "\x00",
        "a\x00b",
        "\ud800",
        "ü",
        "[/red]",
        "../../x",
        "/dev/zero",
        "/proc/self/mem",
        "~nosuchuser/x",
        "none",
    ),
    *("x" * 300, "x" * 100_000, "/" * 5000, "\n", "a\nb", "default", "auto", "never", "1", "true", "1e400", "nan"),
    *(0, -1, 1, 2, 3, 10**9, 10**9 + 1, 10**18, 10**30, -(10**30), 2**31, 2**63, 2**64),
    *(0.0, -0.0, -1.0, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), True, False, None),
    *([], [1], {}, {"a": 1}, [[[1]]], {"name": {"name": 1}}),
)
TEXTS = (
    "[" * 5000,
    "9" * 5000,
    "1" + "0" * 5000 + ".5",
    "{a=" * 2000,
    '"' + "x" * 10_000,
    "1979-05-27",
    "07:32:00",
    "0x" + "f" * 3000,
    "'''a'''",
    "\\ud800",
)


def experiments(count: int) -> Iterator[dict[str, Any]]:
    rng, keys = random.Random(0), [setting.key for setting in describe(ExperimentConfig)]
    for _ in range(count):
        yield {rng.choice(keys): rng.choice(ODD) for _ in range(rng.choice((1, 1, 2, 3)))}


def check_line(error: UserError, about: object) -> None:
    assert len(one_line(error)) <= LINE, about
    assert "Traceback" not in str(error), about


def test_any_settings_are_read_or_refused_on_one_line() -> None:
    for settings in experiments(3000 * MANY):
        try:
            read(ExperimentConfig, None, settings)
        except UserError as error:
            check_line(error, settings)


def test_any_experiment_is_opened_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the data, the fleet and the model: all that is done before a run starts."""
    monkeypatch.chdir(tmp_path)
    for settings in experiments(150 * MANY):
        try:
            config = load_config(None, {"data.name": "digits", **settings})
            if config.data.name != "digits" or (config.data.devices or 0) > 10**5 or config.use:
                continue
            prepare(config, "fuzz")
        except UserError as error:
            check_line(error, settings)
        assert not list(tmp_path.iterdir()), settings


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_behind_set(text: str) -> None:
    try:
        key, value = parse_assignment(f"train.rounds={text}")
        load_config(None, {key: value})
    except UserError as error:
        check_line(error, text)


def test_any_bytes_as_a_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    file = tmp_path / "x.toml"
    good = (ExperimentConfig().to_toml(), "[tiers.a]\nshare = 0.5\nrank-fraction = 1.0\n[tiers.b]\nshare = 0.5\n")
    for _ in range(300 * MANY):
        content = bytearray(rng.choice(good).encode())
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(content) or 1)
            kind = rng.randrange(4)
            if kind == 0 and content:
                content[at] = rng.randrange(256)
            elif kind == 1:
                del content[at : at + rng.randint(1, 40)]
            elif kind == 2:
                content[at:at] = rng.choice(string.printable).encode() * rng.choice((1, 2, 5000))
            else:
                content[at:at] = content[at : at + rng.randint(1, 60)]
        file.write_bytes(bytes(content))
        for opened in (lambda: load_config(file), lambda: assign_tiers(load_tiers("", str(file)), 20, 0)):
            try:
                opened()
            except UserError as error:
                check_line(error, bytes(content))


def test_any_fleet() -> None:
    """Tables of tiers with odd names and numbers: a fleet whose devices all have a tier, or one line."""
    rng = random.Random(0)
    keys = [kebab(name) for name in Tier.model_fields if name != "name"] + ["nosuch", "", "name"]
    names = ["a", "b", "c d", "", "x" * 61, "../x", "é", "a\x00", " a", "[/red]"]
    good = 0
    for _ in range(700 * MANY):
        count = rng.randint(1, 4)
        tables: dict[str, Any] = {}
        for name in rng.sample(names[:3], count) if count < 4 and rng.random() < 0.8 else rng.sample(names, count):
            table: Any = {"share": 1 / count, "rank-fraction": 0.5}
            for _ in range(rng.choice((0, 0, 1, 2))):
                table[rng.choice(keys)] = rng.choice(ODD)
            tables[name] = table if rng.random() < 0.95 else rng.choice(ODD)
        try:
            tiers = own_fleet("fuzzed", tables, "").tiers
            tier_of = assign_tiers(tiers, 20, 0)
        except UserError as error:
            check_line(error, tables)
        else:
            good += 1
            assert sorted({*tier_of.tolist()}) == list(range(len(tiers))), tables
    assert good > 50 * MANY


def test_files_that_would_keep_a_reader_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    large = tmp_path / "large.toml"
    with large.open("wb") as file:
        file.truncate(2**40)
    for path in (fifo, Path("/dev/zero"), tmp_path, large, Path("/proc/self/mem"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot read"):
            load_config(path)
        with pytest.raises(UserError, match="cannot read"):
            load_tiers("", str(path))


def test_a_tiny_share_is_refused_at_once() -> None:
    tiers = load_tiers("five-tiers")
    shares = [1 - 4e-9, *[1e-9] * 4]
    tiny = [tier.model_copy(update={"share": share}) for tier, share in zip(tiers, shares, strict=True)]
    with pytest.raises(UserError, match="use at least 10"):
        assign_tiers(tiny, 20, 0)


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "a\x1b[31m", "x" * 61, "\u202e"])
def test_names_of_tiers_can_be_printed(tmp_path: Path, name: str) -> None:
    fleet = tmp_path / "fleet.toml"
    escaped = "".join(f"\\U{ord(x):08x}" for x in name)
    fleet.write_text(f'[tiers."{escaped}"]\nshare = 1.0\nrank-fraction = 1.0\n')
    with pytest.raises(UserError, match="name"):
        load_tiers("", str(fleet))


def test_the_command_line_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    # What an operating system hands over.
    odd = [x for x in ODD if isinstance(x, str) and "\x00" not in x and x != "\ud800"]
    for _ in range(60 * MANY):
        words = [f"--set={rng.choice(('data.name', 'out', 'fleet.file', 'use', 'seed', 'x'))}={rng.choice(odd)}"]
        words += [f"--out={rng.choice(odd)}"] if rng.random() < 0.3 else []
        words += ["--set=data.name=nothing", "--actors", "0"]
        monkeypatch.setattr("sys.argv", ["fedmaestro", "run", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert stopped.value.code == 2, (words, printed)
        assert len(printed.err.splitlines()) == 1, (words, printed.err)
        assert len(printed.err) <= LINE + len("fedmaestro: \n"), words
