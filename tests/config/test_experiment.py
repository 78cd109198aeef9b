"""The one schema: errors that name key and value, lossless round trips, and pyproject.toml's copy of it."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmaestro.config.experiment import (
    ExperimentConfig,
    Value,
    describe_settings,
    flatten,
    from_flat,
    load,
    load_config,
    parse_assignment,
)
from fedmaestro.config.training import TrainingConfig
from fedmaestro.errors import UserError

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))
DEFAULTS = ExperimentConfig().flat()


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


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
        from_flat({key: 1}, "my.toml")


def test_hopeless_key_lists_the_valid_ones() -> None:
    with pytest.raises(UserError) as error:
        from_flat({"zzzzzzzz": 1})
    assert "did you mean" not in str(error.value)
    assert all(key in str(error.value) for key in DEFAULTS)


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_table_is_not_a_setting_and_a_setting_no_table(key: str) -> None:
    for wrong in (key.split(".")[0] if "." in key else f"{key}.x", f"{key}.x"):
        with pytest.raises(UserError, match="unknown setting"):
            from_flat({wrong: 1})


WRONG: list[tuple[str, Any]] = [
    ("train.rounds", "5"),
    ("train.rounds", 5.0),
    ("train.rounds", True),
    ("train.rounds", 0),
    ("train.rounds", -1),
    ("train.rounds", [5]),
    ("seed", True),
    ("seed", -1),
    ("seed", 2**32),
    ("train.lr", "0.1"),
    ("train.lr", True),
    ("train.lr", 0.0),
    ("train.lr", float("nan")),
    ("train.lr", float("inf")),
    ("train.momentum", 1.0),
    ("train.momentum", -0.1),
    ("train.weight-decay", float("nan")),
    ("train.lr-final-factor", 1.5),
    ("server.damping", -0.5),
    ("server.tail-decay", -0.5),
    ("server.tail-decay", 1.5),
    ("server.tail-start", -0.5),
    ("train.logit-adjustment", -0.5),
    ("train.logit-adjustment", -2.0),
    ("fleet.over-commit", 0.9),
    ("fleet.deadline-seconds", float("inf")),
    ("data.alpha", 0),
    ("data.name", 5),
    ("data.name", False),
    ("out", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_value_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        from_flat({key: value}, "my.toml")
    message = str(error.value)
    assert f"setting {key} = {value!r} in my.toml: " in message
    assert "\n" not in message


NUMBERS = [key for key, value in DEFAULTS.items() if isinstance(value, int | float) and not isinstance(value, bool)]


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_a_boolean_or_not_finite(key: str) -> None:
    for value in (True, False, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(UserError, match=f"setting {key} = "):
            from_flat({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("train.rounds", 1),
        ("train.lr", 1),
        ("train.momentum", 0),
        ("train.lr-final-factor", 1),
        ("fleet.over-commit", 1),
        ("fleet.over-commit", 10.0),
        ("fleet.deadline-seconds", 0),
        ("train.cohort-size", 1),
    ],
)
def test_bounds_are_inclusive_and_whole_numbers_are_numbers(key: str, value: float) -> None:
    assert from_flat({key: value}).flat()[key] == value


def test_missing_experiment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the experiment .*nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")


def test_a_folder_is_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the experiment .*directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b"[train\nrounds = 5", b"seed = ", b"seed = 1\nseed = 2", b"# caf\xe9\nseed = 1"])
def test_invalid_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"my\.toml is not valid TOML: ") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_error_in_a_file_names_the_file(experiment: Callable[[str], Path]) -> None:
    path = experiment("[train]\nround = 5")
    with pytest.raises(UserError, match=rf"'train\.round' in {path}: did you mean 'train\.rounds'\?"):
        load_config(path)
    path = experiment("[train]\nrounds = 2024-01-01")
    with pytest.raises(UserError, match=rf"setting train\.rounds = .* in {path}"):
        load_config(path)


def test_error_in_the_overrides_says_so(experiment: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"'train\.round' in the overrides"):
        load_config(experiment("seed = 1"), {"train.round": 5})
    with pytest.raises(UserError, match="setting seed = -1 in the overrides"):
        load_config(None, {"seed": -1})


def test_configurations_are_frozen() -> None:
    config = ExperimentConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.rounds = 1  # type: ignore[misc]


# Round trips

INTEGERS = st.integers(1, 10**9)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "out": st.text(),
        "data.name": st.text(),
        "data.devices": INTEGERS,
        "data.alpha": st.floats(0, exclude_min=True, allow_infinity=False),
        "data.min-examples": INTEGERS,
        "model.keep-dense": st.text(),
        "fleet.over-commit": st.floats(1, 10),
        "fleet.deadline-seconds": st.floats(0, allow_infinity=False),
        "train.rounds": INTEGERS,
        "train.objective": st.text(),
        "train.lr": st.floats(0, exclude_min=True, allow_infinity=False),
        "train.momentum": st.floats(0, 1, exclude_max=True),
    },
)


@given(CONFIGS)
def test_flat_form_round_trip(flat: dict[str, Value]) -> None:
    config = from_flat(flat)
    assert config.flat() == {**DEFAULTS, **flat}
    assert from_flat(config.flat()) == config
    assert from_flat(json.loads(config.to_json())) == config


@given(flat=CONFIGS)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, flat: dict[str, Value]) -> None:
    config = from_flat(flat)
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path) == config
    assert flatten(tomllib.loads(config.to_toml())) == config.flat()


def test_equal_configurations_have_equal_json() -> None:
    """Hosts cache their environment under it."""
    a = from_flat({"seed": 3, "train.rounds": 4}).to_json()
    assert a == from_flat({"train.rounds": 4, "seed": 3}).to_json()
    assert a != from_flat({"seed": 3}).to_json()


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": "x"}}, "f": {}}) == {"a": 1, "b.c": 2, "b.d.e": "x"}


# Files, overrides, assignments


def test_nothing_given_is_the_demo() -> None:
    assert load_config(None) == ExperimentConfig() == from_flat({})


def test_overrides_lie_over_the_file(experiment: Callable[[str], Path]) -> None:
    path = experiment("seed = 7\n[train]\nrounds = 60\nlr = 1\n[data]\nalpha = 0.1")
    config = load_config(path, {"train.rounds": 5, "data.dir": "x"})
    changed = {"seed": 7, "train.rounds": 5, "train.lr": 1.0, "data.alpha": 0.1, "data.dir": "x"}
    assert config.flat() == {**DEFAULTS, **changed}


def test_an_override_does_not_hide_an_error_of_the_file(experiment: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"my\.toml"):
        load_config(experiment("[train]\nrounds = 0"), {"train.rounds": 5})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("train.rounds=5", ("train.rounds", 5)),
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


def test_every_setting_is_described() -> None:
    rows = describe_settings()
    assert {key: default for key, default, _ in rows} == DEFAULTS
    assert [key for key, _, _ in rows] == list(DEFAULTS)
    assert [key for key, _, text in rows if len(text) < 10] == []


def test_flower_run_config_is_the_schema() -> None:
    """A key that Flower does not declare could not be overridden with ``flwr run --run-config``."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = flatten(pyproject["tool"]["flwr"]["app"]["config"])
    assert declared == DEFAULTS
    assert {key: type(value) for key, value in declared.items()} == {k: type(v) for k, v in DEFAULTS.items()}
    assert from_flat(declared) == ExperimentConfig()


def test_there_are_experiments() -> None:
    assert EXPERIMENTS


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_uses_declared_settings(path: Path) -> None:
    written = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    config = load(TrainingConfig if "train.epochs" in written else ExperimentConfig, path)
    resolved = flatten(config.model_dump(by_alias=True))
    assert {key: resolved.get(key) for key in written} == written
    assert not config.out, "an experiment must not say where its results go"
    assert not config.data.dir, "nor where somebody's data lie"
