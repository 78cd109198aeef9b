"""Settings: errors that name key and value, lossless round trips, and pyproject.toml's copy of the schema."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmaestro.config.base import Value, describe, flatten, parse_assignment, read
from fedmaestro.config.experiment import ExperimentConfig, load_config
from fedmaestro.config.training import TrainingConfig
from fedmaestro.errors import UserError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))
DEFAULTS = ExperimentConfig().flat()


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def given_settings(**settings: Any) -> ExperimentConfig:
    return read(ExperimentConfig, None, settings, "my.toml")


# Errors


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.round", "train.rounds"),
        ("train.local_epochs", "train.local-epochs"),
        ("fleet.presets", "fleet.preset"),
        ("sed", "seed"),
        ("rounds", "train.rounds"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"unknown setting '{key}' in my\.toml: did you mean '{nearest}'\? valid: "):
        given_settings(**{key: 1})


def test_hopeless_key_lists_the_valid_ones() -> None:
    with pytest.raises(UserError) as error:
        given_settings(zzzzzzzz=1)
    assert "did you mean" not in str(error.value)
    assert all(key in str(error.value) for key in DEFAULTS)


@pytest.mark.parametrize(("old", "new"), ExperimentConfig.renamed.items())
def test_a_setting_that_was_renamed_says_its_new_name(old: str, new: str) -> None:
    assert new in DEFAULTS
    with pytest.raises(UserError, match=rf"setting '{old}' in my\.toml has another name now: {new}"):
        given_settings(**{old: 1})


@pytest.mark.parametrize("wrong", ["train", "train.rounds.x", "seed.x", "server.optimizer.x"])
def test_a_table_is_not_a_setting_and_a_setting_no_table(wrong: str) -> None:
    with pytest.raises(UserError, match="unknown setting"):
        given_settings(**{wrong: 1})


WRONG: list[tuple[str, Any]] = [
    *(("train.rounds", value) for value in ("5", 5.0, True, 0, -1, [5])),
    *(("seed", value) for value in (True, -1, 2**32)),
    *(("train.lr", value) for value in ("0.1", True, 0.0, float("nan"), float("inf"))),
    ("train.momentum", 1.0),
    ("train.weight-decay", float("nan")),
    ("train.lr-final-factor", 1.5),
    ("train.logit-adjustment", -0.5),
    ("server.damping", -1.0),
    ("server.tail-decay", 1.5),
    ("server.tail-start", -0.5),
    ("server.lr", 0.0),
    *(("server.reorder-every", value) for value in (0, -1, "sometimes", 1.5, True)),
    ("fleet.over-commit", 0.9),
    ("fleet.deadline-seconds", 0.0),
    ("train.reply-timeout-seconds", float("inf")),
    ("data.alpha", 0),
    *(("data.name", value) for value in (5, False)),
    ("model.norm", "batch"),
    ("out", 5),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_value_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        given_settings(**{key: value})
    message = str(error.value)
    assert f"setting {key} = {value!r} in my.toml: " in message
    assert "\n" not in message


def test_the_word_for_unset_is_among_what_a_value_could_be() -> None:
    with pytest.raises(UserError, match=r"greater than or equal to 1, or input should be 'never', or 'default'$"):
        given_settings(**{"server.reorder-every": 0})
    with pytest.raises(UserError, match=r"greater than 0, or 'none'$"):
        given_settings(**{"fleet.deadline-seconds": -1.0})


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 2**32 - 1), ("train.lr", 1), ("train.momentum", 0), ("train.lr-final-factor", 1), ("train.clip-norm", 0)],
)
def test_bounds_are_inclusive_and_whole_numbers_are_numbers(key: str, value: float) -> None:
    assert given_settings(**{key: value}).flat()[key] == value


@pytest.mark.parametrize("content", [b"[train\nrounds = 5", b"seed = 1\nseed = 2", b"# caf\xe9\nseed = 1"])
def test_invalid_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"my\.toml is not valid TOML: ") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(UserError, match=rf"cannot read the experiment {path}: "):
            load_config(path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load_config(path).seed == 3


def test_an_error_says_where_the_setting_came_from(experiment: Callable[[str], Path]) -> None:
    path = experiment("[train]\nround = 5")
    with pytest.raises(UserError, match=rf"'train\.round' in {path}: did you mean 'train\.rounds'\?"):
        load_config(path)
    path = experiment("[train]\nrounds = 2024-01-01")
    with pytest.raises(UserError, match=rf"setting train\.rounds = .* in {path}"):
        load_config(path, {"seed": 3})
    with pytest.raises(UserError, match="setting seed = -1 in the overrides"):
        load_config(experiment("seed = 1"), {"seed": -1})


def test_configurations_are_frozen() -> None:
    config = ExperimentConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.rounds = 1  # type: ignore[misc]


# Forms


def test_unset_is_none_in_python_and_a_word_in_text(experiment: Callable[[str], Path]) -> None:
    path = experiment('[server]\nlr = "default"\n[fleet]\ndeadline-seconds = "none"\nfile = ""')
    config = load_config(path, {"server.momentum": "default", "server.tail-decay": None})
    assert config == ExperimentConfig()
    assert (config.server.lr, config.fleet.deadline_seconds, config.fleet.file, config.out) == (None,) * 4
    assert (DEFAULTS["server.lr"], DEFAULTS["fleet.deadline-seconds"], DEFAULTS["fleet.file"]) == (
        "default",
        "none",
        "",
    )


def test_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hosts may run in another working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    config = load_config(None, {"data.dir": "data", "out": "~/x"})
    assert (config.data.dir, config.out) == (str(tmp_path / "data"), "/somebody/x")


INTEGERS = st.integers(20, 10**9)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=100)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "out": st.just("/x/y"),
        "data.name": TEXTS,
        "data.alpha": st.floats(0, exclude_min=True, allow_infinity=False),
        "model.keep-dense": TEXTS,
        "fleet.over-commit": st.floats(1, 10),
        "fleet.deadline-seconds": st.just("none") | st.floats(0, exclude_min=True, allow_infinity=False),
        "train.rounds": INTEGERS,
        "train.objective": TEXTS,
        "train.lr": st.floats(0, exclude_min=True, allow_infinity=False),
        "server.lr": st.just("default") | st.floats(0, exclude_min=True, allow_infinity=False),
        "server.reorder-every": st.sampled_from(["default", "never"]) | INTEGERS,
    },
)


@given(flat=CONFIGS)
def test_every_form_gives_the_configuration_back(
    tmp_path_factory: pytest.TempPathFactory, flat: dict[str, Value]
) -> None:
    config = given_settings(**flat)
    assert config.flat() == {**DEFAULTS, **flat}
    assert given_settings(**config.flat()) == config
    assert ExperimentConfig.model_validate_json(config.model_dump_json(by_alias=True)) == config
    assert config.changed({}) == config
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path) == config


def test_overrides_lie_over_the_file(experiment: Callable[[str], Path]) -> None:
    path = experiment("seed = 7\n[train]\nrounds = 60\nlr = 1\n[data]\nalpha = 0.1")
    config = load_config(path, {"train.rounds": 15, "data.dir": "/x"})
    changed = {"seed": 7, "train.rounds": 15, "train.lr": 1.0, "data.alpha": 0.1, "data.dir": "/x"}
    assert config.flat() == {**DEFAULTS, **changed}
    assert load_config() == ExperimentConfig()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (" train.rounds = 5 ", ("train.rounds", 5)),
        ("train.lr=1e-3", ("train.lr", 0.001)),
        ("train.strategy=zero-pad", ("train.strategy", "zero-pad")),
        ("train.strategy='zero-pad'", ("train.strategy", "zero-pad")),
        ("model.keep-dense=first-conv head", ("model.keep-dense", "first-conv head")),
        ("data.name='5'", ("data.name", "5")),
        ("out=a=b", ("out", "a=b")),
        ("out=", ("out", "")),
        ("x=true", ("x", True)),
        ("out=runs/a#1", ("out", "runs/a#1")),
    ],
)
def test_assignment(text: str, parsed: tuple[str, Value]) -> None:
    key, value = parse_assignment(text)
    assert (key, value) == parsed
    assert type(value) is type(parsed[1])


@pytest.mark.parametrize("text", ["train.rounds", "", "x=[1, 2]", "x={a = 1}", "x=2024-01-01"])
def test_assignment_errors_repeat_the_text(text: str) -> None:
    with pytest.raises(UserError, match="--set") as error:
        parse_assignment(text)
    assert repr(text) in str(error.value)


# Documentation, Flower's run config, experiments


@pytest.mark.parametrize("schema", [ExperimentConfig, TrainingConfig])
def test_every_setting_is_described(schema: type[ExperimentConfig]) -> None:
    settings = describe(schema)
    assert {setting.key: setting.default for setting in settings} == schema().flat()
    assert [setting.key for setting in settings if len(setting.meaning) < 7] == []


def test_flower_run_config_is_the_schema() -> None:
    """A key that Flower does not declare could not be overridden with ``flwr run --run-config``."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = flatten(pyproject["tool"]["flwr"]["app"]["config"])
    assert declared.pop("resume") is False, "no setting: an option of the command line"
    # What Flower fills in counts as given: 20 devices would then be asked of data that say the number themselves.
    assert declared.pop("data.devices") == "default"
    shown = {key: value for key, value in DEFAULTS.items() if key != "data.devices"}
    assert declared == shown
    assert {key: type(value) for key, value in declared.items()} == {k: type(v) for k, v in shown.items()}
    assert given_settings(**declared) == ExperimentConfig()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_uses_declared_settings(path: Path) -> None:
    written = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    config = read(TrainingConfig if "train.epochs" in written else ExperimentConfig, path)
    resolved = config.flat()
    if "use" in written:
        written["use"] = str(path.parent / str(written["use"]))  # relative to the experiment's file
    assert {key: resolved.get(key) for key in written} == written
    assert config.get("out") is None, "an experiment must not say where its results go"
    assert config.get("data.dir") is None, "nor where somebody's data lie"
