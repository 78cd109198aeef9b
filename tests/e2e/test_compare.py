"""A comparison on one running Ray: complete, interrupted and resumed, extended."""

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmaestro.config.base import read
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.errors import UserError
from fedmaestro.flower.compare import Comparison, compare
from fedmaestro.rounds.observer import ComparisonObserver
from fedmaestro.runs.records import RoundRecord

SMALL = {"train.rounds": 3, "train.evaluate-every": 1, "train.local-epochs": 1}
STRATEGIES = ["nested", "wide:heterofl"]
ADAM = "own+adam:nested+train.objective=own-prefix+server.optimizer=adam"
TABLES = ("results.json", "table.md", "table.csv", "table.tex", "differences.csv", "report.html")


class Watcher(ComparisonObserver):
    """Records the cells; interrupts in a round of one."""

    def __init__(self, interrupt: tuple[str, int] | None = None) -> None:
        self.cells: list[str] = []
        self.done: list[int] = []
        self._interrupt = interrupt

    def on_cells(self, path: Path, done: int, total: int) -> None:
        self.done.append(done)

    def on_cell(self, label: str, seed: int) -> None:
        self.cells.append(f"{label} {seed}")

    def on_round(self, record: RoundRecord) -> None:
        if self._interrupt == (self.cells[-1], record.round):
            os.kill(os.getpid(), signal.SIGINT)


def contents(comparison: Comparison) -> dict[str, str]:
    return {name: (comparison.path / name).read_text() for name in TABLES}


JUDGED: dict[str, Any] = {"baseline": "wide", "margin": 1.0, "last": 2, "target": 50.0}


def interrupted(out: Path, where: tuple[str, int]) -> Watcher:
    """Press Ctrl-C in a round of a cell."""
    watcher = Watcher(where)
    partial = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[watcher], **JUDGED)
    assert not partial.results["complete"]
    assert "of 2 seeds" in (out / "table.md").read_text()
    return watcher


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[str], list[str]]:
    """A comparison that was interrupted in its second cell and then resumed, and the cells that both parts ran."""
    out = tmp_path_factory.mktemp("finished") / "comparison"
    stopped, resumed = interrupted(out, ("wide 0", 2)), Watcher()
    comparison = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[resumed], resume=True, **JUDGED)
    assert resumed.done == [1, 2, 3, 4]
    return comparison, stopped.cells, resumed.cells


def test_every_cell_is_that_run(
    finished: tuple[Comparison, list[str], list[str]], federate: Callable[..., Any]
) -> None:
    comparison, before, after = finished
    results = comparison.results
    assert results["complete"]
    assert (before, after) == (["nested 0", "wide 0"], ["wide 0", "nested 1", "wide 1"])
    cells = sorted(path.parent for path in comparison.path.glob("cells/**/config.toml"))
    assert len(cells) == 4
    for cell in cells:
        settings = {key: x for key, x in read(ExperimentConfig, cell / "config.toml").flat().items() if key != "out"}
        alone, _, _ = federate(settings)
        assert json.loads((cell / "summary.json").read_text())["model_sha256"] == alone["model_sha256"]
    nested, wide = results["strategies"]
    assert nested["series"][0]["values"] != nested["series"][1]["values"]
    assert results["matched_macs"], "ranks and widths were compared"
    for tier in results["tiers"]:
        of_ranks, of_widths = (row["budgets"][tier]["macs_per_example"] for row in (nested, wide))
        assert of_ranks == pytest.approx(of_widths, rel=0.03)
    assert all(value is not None for value in nested["series"][0]["factor_bias"][1:])
    assert set(wide["series"][0]["tail_energy"]) == {None}
    assert (comparison.path / "plots" / "differences.png").exists()
    assert results["analysis"] == {"baseline": "wide", "margin": 0.01, "last": 2, "target": 0.5}
    for row, series in ((row, row["series"][0]) for row in results["strategies"]):
        means = [sum(values) / len(values) for values in zip(*series["values"].values(), strict=True)]
        assert row["mean"]["last"]["values"][0] == pytest.approx((means[-1] + means[-2]) / 2)
        at = next((i for i, mean in enumerate(means) if mean >= 0.5), None)
        reached = row["reached"][0]
        assert reached == (
            None if at is None else {"round": at, **{k: series[k][at] for k in ("bytes", "virtual_seconds")}}
        )
    rows = list(csv.DictReader((comparison.path / "differences.csv").read_text().splitlines()))
    assert {(row["strategy"], row["baseline"], row["seeds"]) for row in rows} == {("nested", "wide", "0 1")}


def test_how_rows_are_judged_can_change_without_running_anything(
    finished: tuple[Comparison, list[str], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(finished[0].path, out)
    watcher = Watcher()
    again = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, resume=True, observers=[watcher])
    assert watcher.cells == []
    assert again.results["analysis"] == {"baseline": None, "margin": None, "last": 1, "target": None}
    assert "Differences from nested" in (out / "table.md").read_text()


@pytest.mark.slow
def test_tables_do_not_depend_on_interruptions(
    finished: tuple[Comparison, list[str], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):  # without a finished cell there is nothing to show
        interrupted(tmp_path / "at once", ("nested 0", 0))
    interrupted(tmp_path / "late", ("nested 1", 3))
    for name in ("at once", "late"):
        out = tmp_path / name
        again = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, resume=True, **JUDGED)
        assert contents(again) == contents(finished[0])


def test_strategies_can_be_added_and_share_start_partition_and_sampling_but_settings_cannot_change(
    finished: tuple[Comparison, list[str], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(finished[0].path, out)
    watcher = Watcher()
    more = {"resume": True, "observers": [watcher], **JUDGED}
    extended = compare(None, [*STRATEGIES, ADAM], 2, overrides=SMALL, out=out, **more)
    assert watcher.cells == ["own+adam 0", "own+adam 1"]
    *old, adam = extended.results["strategies"]
    assert old == finished[0].results["strategies"]
    nested = old[0]
    for seed in (0, 1):
        first = [row["series"][seed]["values"] for row in (nested, adam)]
        assert {tier: values[0] for tier, values in first[0].items()} == {t: v[0] for t, v in first[1].items()}
        assert nested["series"][seed]["bytes"] == adam["series"][seed]["bytes"], "the same devices were sampled"
        assert nested["series"][seed]["values"] != adam["series"][seed]["values"]
    before = (out / "results.json").read_text()
    with pytest.raises(UserError, match=r"train\.rounds=3, not 2"):
        compare(None, STRATEGIES, 2, overrides=SMALL | {"train.rounds": 2}, out=out, resume=True)
    assert (out / "results.json").read_text() == before


def test_several_experiments_are_a_comparison_each_and_ranks_over_all(tmp_path: Path) -> None:
    few, many, third = (tmp_path / f"{name}.toml" for name in ("few", "many", "third"))
    few.write_text("[data]\nalpha = 0.3\n")
    many.write_text('seed = 5\n[data]\npartition = "iid"\n')
    third.write_text("[data]\nalpha = 3.0\n")
    out, watcher = tmp_path / "out", Watcher(("many: nested 5", 2))
    rest: dict[str, Any] = {"overrides": SMALL, "out": out, "actors": 0}
    partial = compare([few, many], STRATEGIES, 1, observers=[watcher], **rest)
    assert watcher.cells == ["few: nested 0", "few: wide 0", "many: nested 5"]
    assert (partial.ranks["left_out"], len(partial.ranks["settings"])) == (["many"], 1)
    resumed = Watcher()
    whole = compare([few, many, third], STRATEGIES, 1, observers=[resumed], resume=True, **rest)
    assert resumed.cells == ["many: nested 5", "many: wide 5", "third: nested 0", "third: wide 0"]
    assert list(whole.parts) == ["few", "many", "third"]
    assert whole.parts["many"].results["seeds"] == [5]
    for name, part in whole.parts.items():
        assert part.results["complete"]
        assert (part.path / "report.html").exists()
        means = [row["mean"]["final"]["mean"] for row in part.results["strategies"]]
        setting = next(setting for setting in whole.ranks["settings"] if setting["name"] == name)
        assert setting["values"] == means
        assert setting["ranks"] == ([1.0, 2.0] if means[0] > means[1] else [2.0, 1.0])
    assert set(whole.to_pandas()["experiment"]) == {"few", "many", "third"}
    files = {path.name for path in out.iterdir() if path.is_file()}
    assert files == {"experiments.toml", "ranks.json", "ranks.md", "ranks.csv", "ranks.tex"}
    alone = compare(few, STRATEGIES, 1, overrides=SMALL, out=tmp_path / "alone", actors=0)
    assert contents(alone) == contents(whole.parts["few"])
