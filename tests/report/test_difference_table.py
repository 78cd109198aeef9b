"""The tables of what may be said: differences, target, devices' own tests, ranks; in Markdown, CSV and LaTeX."""

import csv
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import edited, make_results, make_row

from fedmaestro.report.compare_table import further_tables, score_columns, table_csv, table_latex, table_markdown
from fedmaestro.report.difference_table import difference_tables, differences_csv, p_text, target_table
from fedmaestro.report.ranking_table import ranking_csv, ranking_latex, ranking_markdown
from fedmaestro.report.text_table import Number, TextTable, tex, text_of, to_latex
from fedmaestro.runs.ranking import ranking
from fedmaestro.runs.records import Analysis, Results

EIGHT = tuple(range(8))
EVIL = r"50% of a_b & {c}~^ $x$ #1 \input{x} <b>"


def noisy(seeds: tuple[int, ...] = EIGHT, analysis: Analysis = Analysis()) -> Results:  # noqa: B008
    """The second row lies 1 point below the first, by 0.8 and 1.2 in turn."""
    rows = [make_row(n, i, seeds=seeds, noise=0.002 * i, analysis=analysis) for i, n in enumerate("ab")]
    return make_results(rows, seeds=seeds, analysis=analysis)


def cells(table: TextTable) -> list[list[str]]:
    return [list(table.header), *(list(map(text_of, row)) for row in table.rows)]


def test_a_row_says_difference_interval_tests_and_verdict() -> None:
    """The half width is t.975(7) · sd / √8 = 2.365 · 0.2138 / 2.828 = 0.179 points."""
    full, short = difference_tables(noisy())
    heading = ["Strategy", "Seeds", "Difference in points", "p", "p (Holm)", "p level (Holm)", "Verdict"]
    assert cells(full) == [heading, ["b", "8", "-1.00 ± 0.18", "0.00781", "0.00781", "1", "below"]]
    assert full.heading == "Differences from a: mean of tiers"
    assert "within ±0.50 points" in full.note
    assert "Too few" not in full.note
    measures = ["Worst tier", "flagship", "mid", "minimal"]
    assert cells(short) == [["Strategy", *measures], ["b", *["-1.00 ± 0.18 below"] * 4]]
    number = full.rows[0][2]
    assert isinstance(number, Number)
    assert number.value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("seeds", "rows", "text"),
    [
        (3, 2, "with 3 no p can be below 0.25. It takes at least 6."),
        (6, 3, "with 6 no p can be below 0.0312, or 0.0625 after Holm's adjustment over 2 rows. It takes at least 7."),
    ],
)
def test_too_few_seeds_say_what_it_takes(seeds: int, rows: int, text: str) -> None:
    full, short = difference_tables(make_results(rows, seeds=range(seeds)))
    assert full.note.endswith(f"Too few seeds for a claim: {text}")
    assert all(text_of(row[-1]).startswith("too few seeds for a claim (p ≥ 0.") for row in full.rows)
    assert "below" not in " ".join(map(str, cells(short)))


def test_the_last_rounds_are_judged_and_shown() -> None:
    """The evaluation before the last one is 0.1 points above it, so the mean of both is 0.05 above."""
    results = noisy(analysis=Analysis(last=2))
    columns = {column.heading: column.texts[0] for column in score_columns(results)}
    assert columns["Mean of tiers"].startswith("96.70")
    assert columns["Last 2: mean"].startswith("96.75")
    assert columns["Last 2: worst"].startswith("95.75")
    assert "means of the last 2 evaluated rounds" in difference_tables(results)[0].note
    rows = list(csv.DictReader(io.StringIO(table_csv(results))))
    assert float(rows[0]["last_accuracy"]) == pytest.approx(float(rows[0]["final_accuracy"]) + 0.0005)


def test_a_target_counts_seeds_that_never_reach_it() -> None:
    """Final means over tiers are 96.0, 96.2, 96.4 %, those of the second row a point less; round 15 has 0.1 more."""
    results = make_results(2, analysis=Analysis(target=0.9545))
    table = target_table(results)
    assert table is not None
    assert table.heading == "Mean of tiers reaches 95.45 %"
    assert cells(table)[1:] == [
        ["nested", "3 of 3", "15", "22.5 MB", "1 h 30 min"],
        ["zero-pad", "1 of 3", "not reached", "not reached", "not reached"],
    ]
    lines = list(csv.DictReader(io.StringIO(table_csv(results))))
    reached = [(x["seed"], x["target_reached"], x["target_round"]) for x in lines if x["tier"] == "mid"]
    assert reached[3:] == [("0", "no", ""), ("1", "no", ""), ("2", "yes", "15")]
    assert target_table(make_results()) is None


def test_devices_own_tests_have_a_table() -> None:
    def own(content: dict[str, Any]) -> None:
        row = content["strategies"][0]
        row["own_test"] = {"mid": {"mean": row["mean"]["final"], "worst_decile": row["worst"]["final"]}}
        row["own_test_mean"] = row["mean"]["final"]

    table = further_tables(edited(make_results(2), own))[-1]
    assert table.heading == "Devices' own tests"
    known, unknown = cells(table)[1:]
    assert known == ["nested", "96.20 ± 0.20", "–", "96.20 ± 0.20", "–", "–", "95.20 ± 0.20", "–"]
    assert unknown == ["zero-pad", *["–"] * 7]
    assert "Own test" in cells(further_tables(edited(make_results(2), own))[1])[0]


def test_differences_csv_has_every_measure_in_full() -> None:
    results = noisy()
    rows = list(csv.DictReader(io.StringIO(differences_csv(results))))
    assert [row["measure"] for row in rows] == ["mean", "worst", "tier flagship", "tier mid", "tier minimal"]
    first = rows[0]
    assert (first["strategy"], first["baseline"], first["seeds"]) == ("b", "a", "0 1 2 3 4 5 6 7")
    assert float(first["difference"]) == pytest.approx(-0.01)
    assert json.loads(first["differences"]) == pytest.approx([-0.008, -0.012] * 4)
    assert (float(first["p"]), first["verdict"], float(first["margin"])) == (2 / 256, "below", 0.005)


def test_the_order_of_rows_changes_no_number() -> None:
    named = Analysis(baseline="nested")
    results = make_results(5, seeds=EIGHT, analysis=named)
    turned = edited(results, lambda content: content["strategies"].reverse())
    lines = [sorted(differences_csv(x).splitlines()) for x in (results, turned)]
    assert lines[0] == lines[1]


def test_of_an_error_below_is_better_and_points_are_none() -> None:
    def rmse(content: dict[str, Any]) -> None:
        content["metric"] = {"name": "rmse", "higher_is_better": False, "percent": False}

    full, _ = difference_tables(edited(noisy(), rmse))
    assert full.header[2] == "Difference"
    assert text_of(full.rows[0][2]) == "-0.01 ± 0.001787"
    assert full.note.endswith("Lower is better: below is better.")
    assert "no margin of equivalence was given (--margin)" in full.note


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (1.0, "1"), (0.0625, "0.0625"), (0.001, "0.001"), (1e-9, "<0.001")]
)
def test_p_values_have_three_digits(p: float | None, text: str) -> None:
    assert p_text(p) == text


def test_markdown_has_the_tables_after_the_results() -> None:
    text = table_markdown(make_results(analysis=Analysis(target=0.9)))
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == [
        "Results",
        "Differences from nested: mean of tiers",
        "Differences from nested: other measures",
        "Mean of tiers reaches 90.00 %",
        "Budgets",
    ]


# LaTeX


def check_latex(text: str) -> None:
    """Braces and environments close, rows have as many cells as columns, and nothing special is bare."""
    bare = re.sub(r"\\[\\&%$#_{}]", "", re.sub(r"(?m)^%.*$", "", text))
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert text.count("$") % 2 == text.count(r"\$") % 2
    assert not set(re.sub(r"\$[^$]*\$|\\[a-z]+", "", bare)) & set('#%^~<>|"')
    opened, closed = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
    assert opened == ["table", "tabular"] * (len(opened) // 2)
    assert closed == ["tabular", "table"] * (len(opened) // 2)
    for columns, body in re.findall(r"\\begin{tabular}{([lr]+)}\n(.*?)\\end{tabular}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1


def test_latex_compiles_as_far_as_it_can_be_told() -> None:
    rows = [make_row(name, i, tiers=[EVIL, "[low]"]) for i, name in enumerate((EVIL, "[b]", "c"))]
    text = table_latex(make_results(rows, analysis=Analysis(target=0.9, last=2)))
    check_latex(text)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 4
    assert r"\textbackslash{}input\{x\}" in text
    assert "$-$1.00 $\\pm$ 0.00" in text
    assert "\n{}[b] & " in text, "a bracket after a row's end would be its argument"


@given(st.text(max_size=30), st.text(max_size=10))
def test_any_name_can_be_set(name: str, heading: str) -> None:
    rows = [[name, Number(heading)]]
    check_latex(to_latex(TextTable(heading=heading, note=name, header=[heading, name], rows=rows), label=name))


def test_latex_shows_what_was_written() -> None:
    assert tex("a_b & 5 %") == r"a\_b \& 5 \%"
    assert tex("97.2 ± 0.1 – ε ≥ 1") == r"97.2 $\pm$ 0.1 -- $\varepsilon$ $\ge$ 1"


# Ranks over experiments


def test_ranks_in_markdown_csv_and_latex() -> None:
    x, y = (
        make_results([make_row(n, r) for n, r in zip((EVIL, "b"), ranks, strict=True)]) for ranks in ((0, 1), (0, 2))
    )
    ranks = ranking({"x": x, "y_z": y, "late": make_results([make_row(EVIL, 0, seeds=[]), make_row("b", 1)])})
    text = ranking_markdown(ranks)
    assert "# Comparison over 2 experiments" in text
    assert "**Left out**, as a strategy lacks a seed or a value: late" in text
    assert "| b | 2.00 | 95.20 (2) | 94.20 (2) |" in text
    assert "χ² = 2, p = 0.5. Critical difference" in text
    assert "Too few experiments for a claim: 2 describe, it takes 6 or more (no p can be below 0.5 here)." in text
    assert "no two strategies are told apart" in text
    check_latex(ranking_latex(ranks))
    lines = list(csv.DictReader(io.StringIO(ranking_csv(ranks))))
    assert [(line["strategy"], line["experiment"], float(line["rank"])) for line in lines] == [
        (EVIL, "x", 1.0),
        (EVIL, "y_z", 1.0),
        ("b", "x", 2.0),
        ("b", "y_z", 2.0),
    ]


def test_nothing_to_rank_is_said() -> None:
    ranks = ranking({"late": make_results([make_row("a", 0, seeds=[]), make_row("b", 1, seeds=[])])})
    assert "There is nothing to rank yet" in ranking_markdown(ranks)
    assert ranking_csv(ranks).count("\n") == 1
    check_latex(ranking_latex(ranks))
