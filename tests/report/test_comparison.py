"""The tables, the page and the files of a comparison."""

import csv
import io
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from reports import NAMES, Page, edited, make_results, make_row

from fedmaestro.report.compare_page import PLOTS, comparison_page, write_comparison
from fedmaestro.report.compare_table import table_csv, table_markdown
from fedmaestro.runs.records import Results

TIERS = ["flagship", "mid", "minimal"]
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><g id="axes"/></svg>'


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the tables as rows of cells, without the rules."""
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    return [
        [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block
            if not line.startswith("| ---")
        ]
        for block in blocks
    ]


def rows_of(results: Results) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table_csv(results), newline="")))


def page_of(results: Results) -> Page:
    """The page with empty plots, which cost most of the time."""
    return Page(comparison_page(results, dict.fromkeys(PLOTS, SVG)))


def with_macs(results: Results, index: int, factor: float, tiers: list[str]) -> Results:
    def change(content: dict[str, Any]) -> None:
        for tier in tiers:
            budget = content["strategies"][index]["budgets"][tier]
            budget["macs_per_example"] = int(budget["macs_per_example"] * factor)

    return edited(results, change)


# Tables


def test_results_in_percent_in_the_given_order() -> None:
    header, *rows = tables(table_markdown(make_results()))[0]
    overall = ["Mean of tiers", "Worst tier", "Best round: mean", "Best round: worst", "Monotone seeds", "Updates lost"]
    assert header == ["Strategy", *TIERS, *overall]
    first = ("97.20", "96.20", "95.20", "96.20", "95.20", "96.30", "95.30")
    assert rows[0] == ["nested", *(f"**{mean} ± 0.20**" for mean in first), "**3 of 3**", "–"]
    assert rows[1][:4] == ["zero-pad", "96.20 ± 0.20", "95.20 ± 0.20", "94.20 ± 0.20"]
    assert [row[0] for row in rows] == list(NAMES)


def test_what_stands_above_the_tables() -> None:
    text = table_markdown(make_results())
    protocol = 'data.name = mnist, train.rounds = 20, data.alpha = 0.5, fleet.file = "", '
    assert text.startswith(f"# Comparison: mnist\n\nProtocol: {protocol}MACs matched between families = yes")
    assert "\n\nSeeds: 0, 1, 2\n\n" in text
    assert "Incomplete" not in text
    assert "Remark" not in text


def test_budgets_per_strategy_and_tier() -> None:
    header, *rows = tables(table_markdown(make_results()))[-1]
    assert len(rows) == len(NAMES) * len(TIERS)
    assert dict(zip(header, rows[1], strict=True)) == {
        "Strategy": "nested",
        "Tier": "mid",
        "Devices": "20",
        "MACs per example": "141 k",
        "Parameters": "30.9 k",
        "Down per round and device": "123 kB",
        "Up per round and device": "61.7 kB",
        "Peak training memory": "950 kB",
        "Training MACs per example": "422 k",
        "Virtual time per round": "0.25 s",
        "Updates lost": "–",
    }


def test_missing_seeds_are_said() -> None:
    results = make_results([make_row("a", 0), make_row("b", 1, seeds=[2]), make_row("c", 2, seeds=[])])
    text = table_markdown(results)
    assert "**Incomplete**: b: 1 of 3 seeds; c: 0 of 3 seeds" in text
    shown, *_, budgets = tables(text)
    assert [row[0] for row in shown[1:]] == ["a", "b (1 of 3 seeds)", "c (0 of 3 seeds)"]
    assert shown[2][1:3] == ["96.40", "95.40"], "one seed has no deviation"
    assert shown[3][1:] == ["–"] * 9
    assert budgets[-1] == ["c", "minimal", *["–"] * 9]
    assert {row["strategy"] for row in rows_of(results)} == {"a", "b"}
    page = page_of(results)
    assert "This comparison is incomplete: b: 1 of 3 seeds; c: 0 of 3 seeds." in page.text
    assert [row[1] for row in page.tables[0][1:]] == ["3", "1 of 3 seeds", "0 of 3 seeds"]
    whole_runs = next(table for table in page.tables if "Why updates failed" in table[0])
    assert whole_runs[3] == ["c", *["–"] * (4 + len(TIERS))]
    interrupted = edited(make_results(), lambda r: r.update(complete=False))
    assert "incomplete: it was interrupted." in page_of(interrupted).text


@pytest.mark.parametrize(("factor", "excess"), [(1.031, 3.1), (1.2, 20.0), (0.9, 11.1)])
def test_unequal_macs_are_remarked_with_the_worst_tier_and_pair(factor: float, excess: float) -> None:
    results = with_macs(with_macs(make_results(), 2, factor, ["mid"]), 2, 1.02, ["flagship"])
    more, less = ("heterofl (width)", "nested (rank)") if factor > 1 else ("nested (rank)", "heterofl (width)")
    remark = f"Worst at tier mid: {more} has {excess} % more MACs per example than {less}."
    assert any(line.startswith("Remark: ") and line.endswith(remark) for line in table_markdown(results).splitlines())
    page = page_of(results)
    assert page.values("class").count("warning") == 1
    assert remark in page.text


def test_markdown_shows_any_name_as_it_is() -> None:
    evil = "a|b *c* <i>d</i> `e` [f](g) _h_\n$i$ \\"
    results = make_results([make_row(evil, 0), make_row("snake_case", 1)])
    rows = tables(table_markdown(results))[0]
    assert len({len(row) for row in rows}) == 1
    assert rows[1][0] == r"a\|b \*c\* \<i\>d\</i\> \`e\` \[f\](g) \_h\_ \$i\$ \\"
    assert rows[2][0] == "snake_case"


def test_csv_is_one_line_per_strategy_seed_and_tier() -> None:
    results = make_results()
    rows = rows_of(results)
    assert [(row["strategy"], row["seed"], row["tier"]) for row in rows] == [
        (name, seed, tier) for name in NAMES for seed in "012" for tier in TIERS
    ]
    first, row = rows[4], results.strategies[0]
    assert float(first["final_accuracy"]) == row.tiers["mid"].final.values[1]
    assert float(first["best_accuracy"]) == row.tiers["mid"].best.values[1]
    budget = row.budgets["mid"].to_dict()
    assert json.loads(first["ranks"]) == budget.pop("ranks")
    assert {key: float(first[key]) for key in budget} == budget
    assert json.loads(rows[-1]["ranks"]) == {"width": 0.25}


# The page and the files


def test_writes_these_files_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mnist"
    results = make_results()
    paths = write_comparison(results, folder)
    plots = [f"plots/{plot}.{suffix}" for plot in (*PLOTS, "differences") for suffix in ("png", "svg")]
    assert list(paths) == ["table.md", "table.csv", "report.html", *plots]
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert found == paths
    for plot in plots:
        if plot.endswith("png"):
            assert paths[plot].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert min(struct.unpack(">II", paths[plot].read_bytes()[16:24])) > 300
        else:
            ElementTree.parse(paths[plot])
    Page(paths["report.html"].read_text(encoding="utf-8")).check_self_contained()
    first = {name: path.read_bytes() for name, path in paths.items()}
    again = write_comparison(results, folder)
    assert {name: path.read_bytes() for name, path in again.items()} == first


def test_headline_protocol_and_what_each_row_is() -> None:
    page = page_of(make_results())
    for fact in ("Comparison: mnist", "0, 1, 2", "flagship, mid, minimal", "complete", "data.alpha", "matched between"):
        assert fact in page.text
    assert "warning" not in page.values("class")
    header, *rows = page.tables[-1]
    assert dict(zip(header, rows[2], strict=True)) == {
        "Strategy": "heterofl",
        "What it does": "what heterofl does",
        "Source": "paper of heterofl",
        "Family": "width",
        "Devices train": "width, own",
        "Objective": "own-prefix",
        "Aggregation": "coverage-mean",
        "Server": "none",
    }


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<b>&\"'</b><script>x</script>"
    results = make_results([make_row(evil, 0, tiers=[evil, "low"], seeds=[0]), make_row("b", 1, tiers=[evil, "low"])])

    def change(content: dict[str, Any]) -> None:
        content |= {"experiment": evil, "protocol": {evil: evil}}
        for key in ("summary", "source", "objective", "aggregation", "server", "submodel"):
            content["strategies"][0][key] = evil

    text = write_comparison(edited(results, change), tmp_path)["report.html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "b" not in re.findall(r"<(\w+)", text)
    assert text.count("<script>") == 1
    assert page.tables[0][0][2] == page.tables[0][1][0] == evil
    assert page.tables[-1][1].count(evil) == 7
    assert f"incomplete: {evil}: 1 of 3 seeds" in page.text
