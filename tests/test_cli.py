"""The command line: lists, and mistakes that cost one line on standard error, exit code 2 and nothing else."""

import logging
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
import ray
from commands import Command, entry_point, tree
from reports import make_results

from fedmaestro.clients import OBJECTIVES
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.data import DATASETS
from fedmaestro.fleet.tiers import FLEETS
from fedmaestro.models import MODELS
from fedmaestro.runs.folder import write_record
from fedmaestro.strategies import STRATEGIES

LISTS = {
    "strategies": list(STRATEGIES),
    "objectives": list(OBJECTIVES),
    "models": list(MODELS),
    "datasets": list(DATASETS),
    "fleets": list(FLEETS),
    "settings": list(ExperimentConfig().flat()),
}


@pytest.fixture
def fedmaestro(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Call the entry point in an empty working directory, where no simulation may start."""
    import fedmaestro.flower.run as shell

    def start(*_: object, **__: object) -> None:
        raise AssertionError("the simulation was started")

    monkeypatch.setattr(shell, "simulate", start)
    logger = logging.getLogger("fedmaestro")
    handlers = list(logger.handlers)
    yield entry_point(tmp_path, monkeypatch, capsys)
    logger.handlers[:] = handlers
    assert not ray.is_initialized()


# list, help


@pytest.mark.parametrize("kind", LISTS)
def test_list_prints_every_name(fedmaestro: Command, kind: str) -> None:
    result = fedmaestro("list", kind)
    assert (result.code, result.err) == (0, "")
    first_words = {line.split()[0] for line in result.out.splitlines() if line.strip() and not line.startswith(" ")}
    assert set(LISTS[kind]) <= first_words


def test_every_kind_of_list_is_documented(fedmaestro: Command) -> None:
    text = fedmaestro("list", "--help").out
    assert [kind for kind in LISTS if kind not in text] == []


@pytest.mark.parametrize("command", ["run", "report", "list"])
def test_help(fedmaestro: Command, command: str) -> None:
    assert command in fedmaestro("--help").out
    assert "Usage" in fedmaestro(command, "--help").out


# Mistakes


def check_refused(fedmaestro: Command, arguments: list[str | Path], said: list[str]) -> None:
    before = tree(Path.cwd().parent)
    commands.check_refused(fedmaestro(*arguments), said, before)


def test_unknown_list(fedmaestro: Command) -> None:
    check_refused(fedmaestro, ["list", "strategy"], ["'strategy'", "did you mean 'strategies'?", "models"])


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown setting": (["train.round=5"], ["train.round", "did you mean 'train.rounds'?"]),
    "no value": (["train.rounds"], ["'train.rounds'", "KEY=VALUE"]),
    "wrong type": (["train.rounds=many"], ["train.rounds", "'many'"]),
    "out of bounds": (["train.lr=-1"], ["train.lr", "-1"]),
    "unknown strategy": (["train.strategy=nestd"], ["train.strategy", "'nestd'", "did you mean 'nested'?"]),
    "unknown objective": (["train.objective=own"], ["train.objective", "'own'", "own-prefix", "default"]),
    "unknown model": (["model.name=lenet5"], ["model.name", "'lenet5'", "did you mean 'lenet'?"]),
    "unknown fleet": (["fleet.preset=phone"], ["fleet.preset", "'phone'", "did you mean 'phones'?"]),
    "unknown dataset": (["data.name=mnits"], ["'mnits'", "did you mean 'mnist'?"]),
    "missing fleet file": (["fleet.file=no.toml"], ["fleet.file", "no.toml"]),
    "too many devices per round": (
        ["data.devices=20", "train.devices-per-round=21"],
        ["train.devices-per-round=21", "data.devices=20"],
    ),
    "fewer devices than tiers": (["data.devices=2", "train.devices-per-round=1"], ["data.devices=2", "'"]),
    "negative seed": (["seed=-1"], ["seed", "-1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_run_with_a_wrong_setting(fedmaestro: Command, mistake: str) -> None:
    settings, said = MISTAKES[mistake]
    flags = [part for setting in settings for part in ("--set", setting)]
    check_refused(fedmaestro, ["run", "--out", "run", *flags], said)


# Known only once the data are there: these may fill the cache, and still write nothing else.
LATE_MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown layer": (["model.keep-dense=haed"], ["model.keep-dense", "'haed'", "did you mean 'head'?"]),
    "unknown partition": (["data.partition=random"], ["partition", "'random'", "iid"]),
    "more devices than examples": (
        ["data.devices=5000", "data.partition=iid"],
        ["data.devices", "5000"],
    ),
}


@pytest.mark.parametrize("mistake", LATE_MISTAKES)
def test_run_with_a_setting_that_does_not_fit_the_data(
    fedmaestro: Command, mistake: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("FEDMAESTRO_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))
    settings, said = LATE_MISTAKES[mistake]
    flags = [part for setting in settings for part in ("--set", setting)]
    check_refused(fedmaestro, ["run", "--out", "run", *flags], said)


@pytest.mark.parametrize("key", ["data.name", "data.partition"])
def test_unknown_names_are_told_with_their_key(fedmaestro: Command, key: str) -> None:
    assert f"unknown {key} 'nothing'" in fedmaestro("run", "--set", f"{key}=nothing").err


def test_missing_experiment(fedmaestro: Command) -> None:
    check_refused(fedmaestro, ["run", "nowhere.toml"], ["nowhere.toml", "No such file"])


def test_missing_data_folder(fedmaestro: Command) -> None:
    check_refused(fedmaestro, ["run", "--set", "data.name=mnist", "--data-dir", "nowhere"], ["nowhere", "mnist"])


def test_empty_data_folder(fedmaestro: Command) -> None:
    Path("data").mkdir()
    check_refused(fedmaestro, ["run", "--set", "data.name=mnist", "--data-dir", "data"], ["data", "mnist"])


@pytest.mark.parametrize("actors", ["-1"])
def test_fewer_than_no_actors(fedmaestro: Command, actors: str) -> None:
    check_refused(fedmaestro, ["run", "--actors", actors], [f"--actors {actors}"])


def test_folder_of_another_run(fedmaestro: Command) -> None:
    Path("old").mkdir()
    Path("old/config.toml").write_text(ExperimentConfig().to_toml(), encoding="utf-8")
    Path("old/rounds.jsonl").write_text("", encoding="utf-8")
    check_refused(fedmaestro, ["run", "--out", "old"], [str(Path("old").absolute()), "--resume", "--out"])


def test_resume_without_out(fedmaestro: Command) -> None:
    check_refused(fedmaestro, ["run", "--resume"], ["--resume", "--out"])


def test_resume_with_other_settings(fedmaestro: Command) -> None:
    rounds = ExperimentConfig().train.rounds
    Path("old").mkdir()
    Path("old/config.toml").write_text(ExperimentConfig().to_toml(), encoding="utf-8")
    check_refused(
        fedmaestro,
        ["run", "--resume", "--out", "old", "--set", f"train.rounds={rounds + 1}"],
        [f"train.rounds={rounds}", f"not {rounds + 1}"],
    )


def test_resume_where_the_configuration_is_damaged(fedmaestro: Command) -> None:
    Path("old").mkdir()
    Path("old/config.toml").write_text("[train\n", encoding="utf-8")
    check_refused(fedmaestro, ["run", "--resume", "--out", "old"], ["old/config.toml", "not valid TOML"])


def test_report_of_nothing(fedmaestro: Command) -> None:
    check_refused(fedmaestro, ["report", "nowhere"], ["nowhere"])


@pytest.mark.parametrize("arguments", [["run", "--out"], ["walk"], ["run", "--actors", "two"], ["list"]])
def test_wrong_usage(fedmaestro: Command, arguments: list[str]) -> None:
    before = tree(Path.cwd().parent)
    result = fedmaestro(*arguments)
    assert result.code == 2
    assert "Error" in result.err
    assert tree(Path.cwd().parent) == before


def test_report_of_a_comparison_is_written_into_its_folder(fedmaestro: Command, tmp_path: Path) -> None:
    write_record(tmp_path / "cmp" / "results.json", make_results(2))
    result = fedmaestro("report", tmp_path / "cmp")
    assert (result.code, result.out.split(), result.err) == (0, ["report:", str(tmp_path / "cmp" / "report.html")], "")
    assert (tmp_path / "cmp" / "table.tex").exists()
    result = fedmaestro("report", tmp_path / "cmp", "--out", "x.html")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "leave --out out" in result.err
    (tmp_path / "cmp" / "results.json").write_text("{}")
    result = fedmaestro("report", tmp_path / "cmp")
    assert (result.code, result.err.count("\n")) == (2, 1)
