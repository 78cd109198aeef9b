"""Tuning in this process: equal budgets, the choice, what is read, what a comparison does with the outcome."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedmaestro
from fedmaestro import extend
from fedmaestro.config.base import read
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UntrainedError, UserError
from fedmaestro.flower import tune as module
from fedmaestro.flower.tune import Tuning, tune
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import ACCURACY, MetricFacts, Trial
from fedmaestro.runs.tuned import best_of, read_tuned

SMALL = {"train.rounds": 2, "train.evaluate-every": 1, "train.local-epochs": 1}
RMSE = MetricFacts(name="rmse", higher_is_better=False, percent=False)
VALUES = st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0])


def tuned(out: Path, strategies: list[str], search: Any, *args: Any, **options: Any) -> Tuning:
    """Tune with one process and little work."""
    overrides = {**SMALL, **options.pop("overrides", {})}
    return tune(None, strategies, search, *args, overrides=overrides, out=out, actors=0, **options)


def timeless(content: Any) -> Any:
    """Leave out what depends on the machine."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key != "wall_seconds"}
    return [timeless(value) for value in content] if isinstance(content, list) else content


@given(values=st.lists(VALUES, max_size=8), metric=st.sampled_from([ACCURACY, RMSE]))
def test_the_best_trial_is_the_first_of_the_best(values: list[float | None], metric: MetricFacts) -> None:
    trials = [Trial(number=i, settings={"train.lr": i}, value=value) for i, value in enumerate(values, 1)]
    best = best_of(trials, metric)
    known = [value for value in values if value is not None]
    if best is None:
        assert known == []
        return
    assert best.value == (max(known) if metric.higher_is_better else min(known))
    assert best.number == values.index(best.value) + 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """Two rows, of which one has a grid of twice the size, with two seeds."""
    search = {"train.lr": [0.05, 0.2], "own": {"server.tail-start": [0, 4]}}
    out = tmp_path_factory.mktemp("tune") / "tuned"
    return tuned(out, ["nested", "own:fedmaestro"], search, [10, 11], trials=2)


def test_every_row_gets_as_many_runs_and_the_best_mean_is_chosen(finished: Tuning) -> None:
    results = finished.results
    assert (results["complete"], results["trials"], results["seeds"]) == (True, 2, [10, 11])
    for row in results["rows"]:
        assert len(row["trials"]) == 2
        assert (row["cost"]["runs"], row["cost"]["updates"]) == (4, 4 * 2 * 10)
        assert list(row["searched"]) == ["train.lr", *(["server.tail-start"] if row["name"] == "own" else [])]
        for trial in row["trials"]:
            cells = [finished.path / "cells" / f"{row['name']}-trial{trial['number']}-seed{seed}" for seed in (10, 11)]
            last = [RunFolder(cell).read_rounds()[-1] for cell in cells]
            means = [np.mean([tier["accuracy"] for tier in record.tiers.values()]) for record in last]  # type: ignore[arg-type]
            assert trial["values"] == pytest.approx(means)
            assert trial["value"] == pytest.approx(np.mean(means))
            assert {json.loads((cell / "summary.json").read_text())["split"] for cell in cells} == {"validation"}
        best = max(row["trials"], key=lambda trial: trial["value"])
        assert (row["chosen"], row["trial"], row["value"]) == (best["settings"], best["number"], best["value"])
        assert finished.chosen(row["name"]) == best["settings"]
    text = (finished.path / "tuning.md").read_text()
    assert "the test set was not read" in text
    assert "train.lr = 0.2 is the largest value that was declared" in text
    assert "tail-start = 0 is" not in text, "nothing is below 0"


def test_a_finished_tuning_is_resumed_without_a_run(finished: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(*_: object, **__: object) -> None:
        raise AssertionError("hosts were started")

    monkeypatch.setattr(module, "simulate", simulate)
    before = finished.results
    search = {"train.lr": [0.05, 0.2], "own": {"server.tail-start": [0, 4]}}
    again = tuned(finished.path, ["nested", "own:fedmaestro"], search, [10, 11], trials=2, resume=True)
    assert again.results == before
    with pytest.raises(UserError, match=r"was tuned with seeds=\[10, 11\], not \[10, 12\]"):
        tuned(finished.path, ["nested", "own:fedmaestro"], search, [10, 12], trials=2, resume=True)
    with pytest.raises(UserError, match=r"was tuned with train\.rounds=2, not 3"):
        tuned(
            *(finished.path, ["nested", "own:fedmaestro"], search, [10, 11]),
            trials=2,
            resume=True,
            overrides={"train.rounds": 3},
        )
    assert finished.results == before


def compared(finished: Any, out: Path, strategies: list[str], seeds: Any, **overrides: Any) -> Any:
    return fedmaestro.compare(
        None, strategies, seeds, overrides={**SMALL, **overrides}, tuned=finished, out=out, actors=0
    )


def test_a_comparison_runs_what_was_chosen_and_says_so(finished: Tuning, tmp_path: Path) -> None:
    comparison = compared(finished, tmp_path / "c", ["own:fedmaestro", "nested"], [0])
    for row in ("own", "nested"):
        config = (tmp_path / "c" / "cells" / f"{row}-seed0" / "config.toml").read_text()
        assert f"lr = {finished.chosen(row)['train.lr']}\n" in config
        assert "validation = 0\n" in config
    assert comparison.results["tuned"] == finished.results
    assert "train.lr" not in comparison.results["protocol"], "nothing that rows share"
    table = (tmp_path / "c" / "table.md").read_text()
    assert "Tuned = grid, 2 trials of every row, seeds 10, 11, by accuracy on 10 % of the training examples" in table
    assert "| own | train.lr: 0.05, 0.2; server.tail-start: 0, 4 | train.lr=0.2" in table
    assert 'sampler = "grid"' in (tmp_path / "c" / "compare.toml").read_text()
    assert r"\caption{Tuning. What was tried" in (tmp_path / "c" / "table.tex").read_text()
    assert "server.tail-start: 0, 4" in (tmp_path / "c" / "report.html").read_text()
    again = fedmaestro.compare(
        None, ["own:fedmaestro", "nested"], [0], overrides=SMALL, tuned=finished.path, out=tmp_path / "c", resume=True
    )
    assert again.results == comparison.results


@pytest.mark.parametrize(
    ("strategies", "seeds", "overrides", "said"),
    [
        (["nested"], [9, 11], {}, r"seed 11 is one that the rows were tuned on \(10, 11\)"),
        (["nested", "zero-pad"], [0], {}, "row 'zero-pad' was not tuned; rows that were: nested, own"),
        (["own:nested"], [0], {}, "row 'own' is nested here, and was tuned as fedmaestro"),
        (["nested:nested+train.momentum=0.5"], [0], {}, r"is nested\+train.momentum=0.5 here, and was tuned as nested"),
        (["nested"], [0], {"data.alpha": 0.5, "train.rounds": 3}, r"data.alpha = 1.0 there, 0.5 here; train.rounds"),
        (["nested"], [0], {"model.name": "lenet"}, "another experiment"),
        (["nested"], [0], {"fleet.preset": "phones"}, "fleet.preset"),
    ],
)
def test_a_comparison_refuses_what_the_tuning_is_not_for(
    finished: Tuning, strategies: list[str], seeds: list[int], overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        compared(finished, tmp_path / "c", strategies, seeds, **overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_of_several_experiments_each_has_to_be_the_tuned_one(finished: Tuning, tmp_path: Path) -> None:
    def both(**other: Any) -> Any:
        experiments = {"a": None, "b": read(ExperimentConfig, None, other)}
        options: dict[str, Any] = {"overrides": SMALL, "tuned": finished, "out": tmp_path / "c", "actors": 0}
        return fedmaestro.compare(experiments, ["nested", "own:fedmaestro"], 1, **options)

    with pytest.raises(UserError, match=r"experiment 'b': --tuned: it was made for another experiment \(data\.alpha"):
        both(**{"data.alpha": 0.5})
    with pytest.raises(UserError, match="experiment 'b': seed 11 is one that the rows were tuned on"):
        both(seed=11)
    assert not (tmp_path / "c").exists()
    for part in both(seed=5).parts.values():
        assert part.results["tuned"] == finished.results
        assert 'sampler = "grid"' in (part.path / "compare.toml").read_text()


def test_settings_that_change_no_result_or_were_chosen_may_differ(finished: Tuning, tmp_path: Path) -> None:
    compared(finished, tmp_path / "c", ["nested"], [0], **{"train.lr": 0.7, "train.evaluate-every": 2, "seed": 5})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("complete = true", "complete = false"), "is not finished: go on with"),
        (("trial = 2", "trial = 1"), "its best trial is 2"),
        (("format = 1", "format = 9"), "format 9 is not one that this version reads"),
        (("sampler =", "sampler :"), "not valid TOML"),
        (("seeds = [", "seeds = ['x',"), "seeds.0 is wrong"),
    ],
)
def test_a_file_that_was_changed_is_refused(
    finished: Tuning, change: tuple[str, str], said: str, tmp_path: Path
) -> None:
    before = finished.file.read_text()
    assert change[0] in before
    (tmp_path / "tuned.toml").write_text(before.replace(*change, 1))
    with pytest.raises(UserError, match=said):
        read_tuned(tmp_path)


def data(seed: int) -> dict[str, Any]:
    """Two classes whose test set is drawn by ``seed``."""
    generator, test = np.random.default_rng(0), np.random.default_rng(seed)
    x = generator.normal(size=(200, 6))
    tested = {"x_test": test.normal(size=(50, 6)), "y_test": test.permutation(50) % 2}
    return {"x": x, "y": (x.sum(axis=1) > 0) * 1, **tested}


def test_nothing_depends_on_the_test_set(tmp_path: Path) -> None:
    overrides = {"data.name": "mine", "data.devices": 10, "model.keep-dense": "none"}
    found = []
    for seed in (1, 2):
        extend.dataset("mine")(lambda seed=seed: data(seed))
        out = tmp_path / str(seed)
        results = tuned(out, ["nested", "zero-pad"], {"train.lr": [0.01, 0.5]}, overrides=overrides).results
        models = sorted(path.read_bytes() for path in out.glob("cells/*/model.safetensors"))
        assert len(models) == 4
        found.append((timeless(results), models))
    assert found[0] == found[1]


def test_the_lowest_error_of_a_regression_is_chosen(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 4))
    extend.dataset("line")({"x": x, "y": x @ np.ones(4), "task": "regression"})
    overrides = {"data.name": "line", "data.partition": "iid", "data.devices": 10, "model.keep-dense": "none"}
    out = tmp_path / "t"
    results = tuned(out, ["nested"], {"train.lr": [1e-6, 0.05]}, validation=40, overrides=overrides).results
    [row] = results["rows"]
    assert results["metric"]["name"] == "rmse"
    assert row["chosen"] == {"train.lr": 0.05}
    assert row["value"] == min(trial["value"] for trial in row["trials"])
    assert results["validation"] == 40


def test_trials_that_fail_are_worst_are_listed_and_end_nothing(tmp_path: Path) -> None:
    @extend.aggregation("fragile")
    def fragile(partial: Any, old: Any) -> Any:
        raise ZeroDivisionError("at once")

    lrs = {"train.lr": [1e30, 0.1], "broken": {"train.lr": [0.1, 0.2]}}
    overrides = {"train.clip-norm": 0.0}
    strategies = ["nested", "broken:nested+train.aggregation=fragile"]
    with pytest.raises(UntrainedError, match=r"all trials of row 'broken' failed.*ZeroDivisionError"):
        tuned(tmp_path / "t", strategies, lrs, overrides=overrides)
    results = Tuning(tmp_path / "t").results
    nested, broken = results["rows"]
    assert [trial["value"] is None for trial in nested["trials"]] == [True, False]
    assert "no update counted" in nested["trials"][0]["failed"]
    assert nested["chosen"] == {"train.lr": 0.1}
    assert (broken["chosen"], broken["trial"]) == ({}, None)
    assert len(broken["trials"]) == 2
    assert "trial 1 (train.lr=1e+30) failed" in (tmp_path / "t" / "tuning.md").read_text()
    with pytest.raises(UserError, match="all trials of row 'broken' failed: search other values"):
        read_tuned(tmp_path / "t")


def test_optuna_searches_ranges_and_resumes_to_the_same(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = ["train.lr=log:0.001..1", "server.tail-start=0..4"]
    options: dict[str, Any] = {"sampler": "optuna", "trials": 3}
    whole = tuned(tmp_path / "whole", ["fedmaestro"], search, **options)
    [row] = whole.results["rows"]
    assert all(0.001 <= trial["settings"]["train.lr"] <= 1 for trial in row["trials"])
    assert all(isinstance(trial["settings"]["server.tail-start"], int) for trial in row["trials"])
    assert "optuna" in whole.results["versions"]

    class StoppedError(RuntimeError):
        pass

    class Stopping(fedmaestro.flower.tune.ComparisonObserver):
        def on_trial(self, row: str, trial: Trial) -> None:
            if trial.number == 2:
                raise StoppedError

    with pytest.raises(StoppedError):
        tuned(tmp_path / "parts", ["fedmaestro"], search, observers=[Stopping()], **options)
    assert not Tuning(tmp_path / "parts").results["complete"]
    parts = tuned(tmp_path / "parts", ["fedmaestro"], search, resume=True, **options)
    assert timeless(parts.results) == timeless(whole.results)


@pytest.mark.parametrize(
    ("strategies", "search", "options", "said"),
    [
        ([], {"train.lr": [1]}, {}, "no strategy is named"),
        (["nested"], {}, {}, "nothing is searched for row 'nested'"),
        (["nested", "nested"], {"train.lr": [1]}, {}, "'nested' is given twice"),
        (["nested"], {"train.lrr": [1]}, {}, "train.lrr.*train.lr"),
        (["nested"], {"train.lr": [0.1, -1]}, {}, r"train\.lr = -1"),
        (["nested"], {"data.alpha": [0.1]}, {}, "data.alpha is the same for all"),
        (["nested"], {"train.rounds": [1]}, {}, "train.rounds: trials would differ in what they may spend"),
        (["nested+train.lr=0.1"], {"train.lr": [1]}, {}, r"row 'nested\+train.lr=0.1' sets it to 0.1"),
        (["nested"], {"server.momentum": [0.5]}, {}, "row 'nested' with server.momentum=0.5: .* has no effect"),
        (["nested"], {"train.lr": "0.1..0.2"}, {}, "ranges need --sampler optuna"),
        (["nested", "fedmaestro"], {"train.lr": [1], "nested": {"train.lr": [1, 2]}}, {}, "of 2 and row 'fedmaestro'"),
        (["nested"], {"train.lr": [1]}, {"trials": 2}, "has a grid of 1 only"),
        (["nested"], {"train.lr": [1]}, {"trials": 0}, "--trials 0"),
        (["nested"], {"train.lr": [1]}, {"sampler": "tpe"}, "unknown --sampler 'tpe'"),
        (["nested"], {"train.lr": [1]}, {"seeds": 0}, "--seeds 0"),
        (["nested"], {"train.lr": [1]}, {"seeds": [3, 3]}, "3 is given twice"),
        (["nested"], {"train.lr": [1]}, {"validation": 0}, "--validation 0"),
        (["nested"], {"train.lr": [1]}, {"validation": 2000}, "leaves nothing of 1437"),
        (["nested"], {"train.lr": [1]}, {"resume": True}, "holds no tuning to resume"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    strategies: list[str], search: Any, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        tuned(tmp_path / "t", strategies, search, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_folders_of_comparisons_and_tunings_are_kept_apart(finished: Tuning, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a tuning or a run"):
        tuned(finished.path, ["nested"], {"train.lr": [0.1]})
    with pytest.raises(UserError, match="already holds a comparison or a run"):
        compared(None, finished.path, ["nested"], [0])
    assert math.isfinite(finished.results["rows"][0]["value"])
