"""What a comparison checks before anything starts."""

from pathlib import Path

import pytest

from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UserError
from fedmaestro.flower import compare as module
from fedmaestro.flower.compare import Variant, compare, parse_variant


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(*_: object, **__: object) -> None:
        raise AssertionError("started although the input is wrong")

    monkeypatch.setattr(module, "simulate", simulate)


def test_variants_have_labels_and_changed_switches() -> None:
    assert parse_variant(" nested ") == Variant(label="nested", strategy="nested", changes={})
    both = parse_variant("sd+adam:nested+server.optimizer=adam+server.lr=0.1")
    assert both == Variant(label="sd+adam", strategy="nested", changes={"server.optimizer": "adam", "server.lr": 0.1})
    assert parse_variant("nested+train.objective=own-prefix").label == "nested+train.objective=own-prefix"
    assert parse_variant("a b/c:nested").folder_name == "a-b-c-539138d5"


@pytest.mark.parametrize("text", ["", "nested+", "nested+train.lr", ":nested", "nested train", "x:", "a=b:nested"])
def test_malformed_variants_say_how_to_write_one(text: str) -> None:
    with pytest.raises(UserError, match="write NAME, or LABEL:NAME"):
        parse_variant(text)


@pytest.mark.parametrize("key", ["seed=1", "out=x", "data.alpha=1", "train.strategy=zero-pad", "fleet.preset=skewed"])
def test_what_a_comparison_shares_cannot_be_changed_for_one_strategy(key: str) -> None:
    with pytest.raises(UserError, match="give it with --set"):
        parse_variant(f"nested+{key}")


@pytest.mark.parametrize(
    ("strategies", "options", "message"),
    [
        (["nestd"], {}, "nestd.*nested"),
        (["nested", "nested"], {}, "'nested' is given twice"),
        (["nested"], {"seeds": 0}, "--seeds 0"),
        (["nested"], {"actors": -1}, "--actors -1"),
        (["nested"], {"resume": True}, "holds no comparison to resume"),
        (["nested+train.rouds=3"], {}, "train.rouds.*train.rounds"),
        (["nested+train.objective=best"], {}, "best"),
        (["nested", "zero-pad"], {"baseline": "zeropad"}, "unknown --baseline 'zeropad': did you mean 'zero-pad'"),
        (["nested", "few:nested+train.rounds=5"], {"last": 2}, "--last 2: more than the evaluated rounds of a run .1."),
        (["nested"], {"target": 0.9}, "--target 0.9: accuracy is in percent"),
        (["own:nested+train.submodel=width-rolling", "nested+train.aggregation=meen"], {}, "meen"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    strategies: list[str], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    with pytest.raises(UserError, match=message) as error:
        compare(None, strategies, out=out, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_bad_input_to_several_experiments_writes_nothing(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("seed = 1\n")
    bad.write_text("[train]\nrouds = 1\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "good.toml").write_text("seed = 2\n")
    out = tmp_path / "out"
    for experiments, message in (
        ([good, bad], "rouds"),
        ([good, tmp_path / "more" / "good.toml"], "two experiments are called 'good'"),
        ([], "there is no experiment"),
        ([ExperimentConfig(), ExperimentConfig()], "two experiments are called 'digits'.*by name"),
    ):
        with pytest.raises(UserError, match=message):
            compare(experiments, ["nested"], out=out)
        assert not out.exists()


@pytest.mark.parametrize("marker", ["compare.toml", "experiments.toml"])
def test_one_kind_of_comparison_is_not_resumed_as_the_other(tmp_path: Path, marker: str) -> None:
    (tmp_path / marker).write_text('experiments = ["a"]')
    with pytest.raises(UserError, match="already holds a comparison"):
        compare(None, ["nested"], out=tmp_path)
    with pytest.raises(UserError, match="already holds a comparison"):
        compare({"a": None, "b": None}, ["nested"], out=tmp_path)
    other, kind = ({"a": None, "b": None}, "of several") if marker == "compare.toml" else (None, "")
    with pytest.raises(UserError, match=f"holds no comparison {kind}"):
        compare(other, ["nested"], out=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [marker]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compare.toml").touch()
    with pytest.raises(UserError, match="already holds a comparison"):
        compare(None, ["nested"], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.toml"]
