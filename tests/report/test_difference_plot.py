"""The pictures of differences and of ranks."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from reports import make_results, make_row, svg_texts

from fedmaestro.errors import UserError
from fedmaestro.report.compare_files import EXPERIMENTS, is_comparison, report_comparison, write_files
from fedmaestro.report.difference_plot import critical_difference_figure, difference_figure, has_differences
from fedmaestro.report.figure import plot_style
from fedmaestro.runs.folder import write_atomically, write_record
from fedmaestro.runs.ranking import Ranking, ranking
from fedmaestro.runs.records import Results

EIGHT = tuple(range(8))
ROWS = ("best", "second", "third", "fourth", "last")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with plot_style():
        yield


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def one_order(settings: int) -> dict[str, Results]:
    """Every setting ranks the rows in the same way."""
    results = make_results([make_row(name, index) for index, name in enumerate(ROWS)])
    return {f"setting {index}": results for index in range(settings)}


def test_a_row_has_its_seeds_its_mean_and_its_interval() -> None:
    rows = [make_row("a", 0, seeds=EIGHT), make_row("b", 1, seeds=EIGHT, noise=0.002)]
    figure = difference_figure(make_results(rows, seeds=EIGHT))
    mean, worst = figure.axes
    assert [axes.get_title(loc="left") for axes in (mean, worst)] == ["Mean of tiers", "Worst tier"]
    assert mean.get_xlabel() == "Difference from a (points)"
    zero, bar, dots, diamond = mean.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert [float(x) for x in bar.get_xdata()] == pytest.approx([-1.179, -0.821], abs=5e-4)
    assert sorted(float(x) for x in dots.get_xdata()) == pytest.approx([-1.2] * 4 + [-0.8] * 4)
    assert float(diamond.get_xdata()[0]) == pytest.approx(-1.0)
    band = mean.patches[0]
    assert (band.get_x(), band.get_width()) == pytest.approx((-0.5, 1.0))
    shown = texts(figure)
    assert "-1.00 ± 0.18  below" in shown
    assert not any("Too few" in text for text in shown)


def test_without_a_claim_rows_are_grey_and_it_is_said_why() -> None:
    results = make_results([make_row("a", 0), make_row("b", 1, noise=0.002), make_row("c", 1, seeds=[])])
    figure = difference_figure(results)
    shown = texts(figure)
    assert "-0.93 ± 0.57" in shown
    assert "unknown" in shown
    assert any("Too few seeds for a claim" in text for text in shown)
    claimed = difference_figure(make_results(2, seeds=EIGHT)).axes[0].lines[1].get_color()
    assert figure.axes[0].lines[1].get_color() != claimed


def test_ranks_are_on_a_line_with_bars_over_what_does_not_differ() -> None:
    ranks = ranking(one_order(10))
    figure = critical_difference_figure(ranks)
    (axes,) = figure.axes
    shown = texts(figure)
    assert {"best  1.00", "second  2.00", "third  3.00", "4.00  fourth", "5.00  last"} <= set(shown)
    bars = [line for line in axes.lines if line.get_linewidth() > 3]
    assert len(bars) == len(ranks.cliques) == 4, "neighbours are nearer than 1.93, the next are not"
    ends = [tuple(round(float(x)) for x in bar.get_xdata()) for bar in bars]
    assert ends == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert any(text.startswith("critical difference 1.93") for text in shown)


def test_where_the_test_keeps_the_rows_together_one_bar_holds_all() -> None:
    ranks = ranking(one_order(1))
    (axes,) = critical_difference_figure(ranks).axes
    (bar,) = [line for line in axes.lines if line.get_linewidth() > 3]
    assert [round(float(x)) for x in bar.get_xdata()] == [1, 5]
    assert "critical difference 6.10, longer than the axis" in texts(axes.figure)


def write_comparison_of(folder: Path, results: Results) -> Path:
    write_record(folder / "results.json", results)
    return folder


def test_a_comparison_is_shown_again_from_its_results(tmp_path: Path) -> None:
    results = make_results(2)
    folder = write_comparison_of(tmp_path / "one", results)
    assert is_comparison(folder)
    write_files(results, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {path.relative_to(folder).as_posix() for path in before}
    assert {"table.tex", "differences.csv", "plots/differences.png", "plots/differences.svg"} <= names
    assert "zero-pad" in svg_texts(folder / "plots" / "differences.svg")
    for path in set(before) - {folder / "results.json"}:
        path.unlink()
    assert report_comparison(folder) == folder / "report.html"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_one_row_has_no_picture_of_differences(tmp_path: Path) -> None:
    write_files(make_results(1), tmp_path)
    assert not has_differences(make_results(1))
    assert not (tmp_path / "plots" / "differences.png").exists()
    assert (tmp_path / "differences.csv").read_text().count("\n") == 1


def test_several_experiments_are_shown_again(tmp_path: Path) -> None:
    write_atomically(tmp_path / EXPERIMENTS, 'experiments = ["x", "y"]\n')
    for name in ("x", "y"):
        write_comparison_of(tmp_path / name, make_results(2))
    assert report_comparison(tmp_path) == tmp_path / "ranks.md"
    assert (tmp_path / "y" / "report.html").exists()
    assert Ranking.model_validate_json((tmp_path / "ranks.json").read_text()).average == [1.0, 2.0]
    assert (tmp_path / "plots" / "critical_difference.png").exists()


@pytest.mark.parametrize("content", ['experiments = "x"', 'experiments = ["../x"]', "experiments = [1]"])
def test_a_list_of_experiments_leads_nowhere_else(tmp_path: Path, content: str) -> None:
    (tmp_path / EXPERIMENTS).write_text(content)
    with pytest.raises(UserError, match="experiments is no list of folders beside it"):
        report_comparison(tmp_path)
