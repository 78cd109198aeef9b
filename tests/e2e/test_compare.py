"""A comparison on one running Ray: complete, interrupted and resumed, extended."""

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
TABLES = ("results.json", "table.md", "table.csv", "report.html")


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


def interrupted(out: Path, where: tuple[str, int]) -> Watcher:
    """Press Ctrl-C in a round of a cell."""
    watcher = Watcher(where)
    partial = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[watcher])
    assert not partial.results["complete"]
    assert "of 2 seeds" in (out / "table.md").read_text()
    return watcher


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[str], list[str]]:
    """A comparison that was interrupted in its second cell and then resumed, and the cells that both parts ran."""
    out = tmp_path_factory.mktemp("finished") / "comparison"
    stopped, resumed = interrupted(out, ("wide 0", 2)), Watcher()
    comparison = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[resumed], resume=True)
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
    assert (comparison.path / "plots").is_dir()


@pytest.mark.slow
def test_tables_do_not_depend_on_interruptions(
    finished: tuple[Comparison, list[str], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):  # without a finished cell there is nothing to show
        interrupted(tmp_path / "at once", ("nested 0", 0))
    interrupted(tmp_path / "late", ("nested 1", 3))
    for name in ("at once", "late"):
        out = tmp_path / name
        again = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, resume=True)
        assert contents(again) == contents(finished[0])


def test_strategies_can_be_added_and_share_start_partition_and_sampling_but_settings_cannot_change(
    finished: tuple[Comparison, list[str], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(finished[0].path, out)
    watcher = Watcher()
    extended = compare(None, [*STRATEGIES, ADAM], 2, overrides=SMALL, out=out, resume=True, observers=[watcher])
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
