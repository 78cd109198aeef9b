"""A comparison on one running Ray: complete, interrupted and resumed, extended."""

import os
import shutil
import signal
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Watcher]:
    watcher = Watcher()
    out = tmp_path_factory.mktemp("whole") / "comparison"
    return compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[watcher]), watcher


def test_every_cell_runs_once(whole: tuple[Comparison, Watcher]) -> None:
    comparison, watcher = whole
    results = comparison.results
    assert results["complete"]
    assert [row["name"] for row in results["strategies"]] == ["nested", "wide"]
    assert watcher.cells == [f"{name} {seed}" for seed in (0, 1) for name in ("nested", "wide")]
    assert watcher.done == [0, 1, 2, 3, 4]
    nested, wide = results["strategies"]
    assert nested["series"][0]["accuracy"] != nested["series"][1]["accuracy"]
    assert results["matched_macs"], "ranks and widths were compared"
    for tier in results["tiers"]:
        of_ranks, of_widths = (row["budgets"][tier]["macs_per_example"] for row in (nested, wide))
        assert of_ranks == pytest.approx(of_widths, rel=0.03)
    assert all(value is not None for value in nested["series"][0]["factor_bias"][1:])
    assert set(wide["series"][0]["tail_energy"]) == {None}
    assert (comparison.path / "plots").is_dir()


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(("nested 0", 0), marks=pytest.mark.slow),
        ("wide 0", 2),
        pytest.param(("nested 1", 3), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_comparison_goes_on_to_identical_tables(
    whole: tuple[Comparison, Watcher], where: tuple[str, int], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    stopped = Watcher(where)
    try:
        partial = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[stopped])
    except KeyboardInterrupt:
        assert where == ("nested 0", 0), "only without a finished cell is there nothing to show"
    else:
        assert not partial.results["complete"]
        assert "of 2 seeds" in (out / "table.md").read_text()
    assert len(stopped.cells) < 4
    resumed = Watcher()
    finished = compare(None, STRATEGIES, 2, overrides=SMALL, out=out, observers=[resumed], resume=True)
    assert len(resumed.cells) < 4 or where == ("nested 0", 0)
    assert contents(finished) == contents(whole[0])


def test_strategies_can_be_added_and_share_start_partition_and_sampling_but_settings_cannot_change(
    whole: tuple[Comparison, Watcher], tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(whole[0].path, out)
    watcher = Watcher()
    extended = compare(None, [*STRATEGIES, ADAM], 2, overrides=SMALL, out=out, resume=True, observers=[watcher])
    assert watcher.cells == ["own+adam 0", "own+adam 1"]
    *old, adam = extended.results["strategies"]
    assert old == whole[0].results["strategies"]
    nested = old[0]
    for seed in (0, 1):
        first = [row["series"][seed]["accuracy"] for row in (nested, adam)]
        assert {tier: values[0] for tier, values in first[0].items()} == {t: v[0] for t, v in first[1].items()}
        assert nested["series"][seed]["bytes"] == adam["series"][seed]["bytes"], "the same devices were sampled"
        assert nested["series"][seed]["accuracy"] != adam["series"][seed]["accuracy"]
    before = (out / "results.json").read_text()
    with pytest.raises(UserError, match=r"train\.rounds=3, not 2"):
        compare(None, STRATEGIES, 2, overrides=SMALL | {"train.rounds": 2}, out=out, resume=True)
    assert (out / "results.json").read_text() == before
