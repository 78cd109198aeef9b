"""Whatever stands in the files of a run, pages show it as text: markup in every field of every page."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from reports import Page, make_results, make_rounds, make_row, write_run

from fedmaestro.report import html_report
from fedmaestro.report.compare_page import write_comparison
from fedmaestro.runs.records import Results, RoundRecord, Summary

EVIL = "\"'><img src=x onerror=alert(1)><script>alert(2)</script></svg><b>&amp;"


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every text in nested records, and every name of a mapping's entry, as (holder, key)."""
    if isinstance(node, dict | list):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield node, key
            yield from places(value)


def poisoned(content: dict[str, Any], valid: Callable[[dict[str, Any]], object]) -> tuple[dict[str, Any], int]:
    """Put markup into every text that the record takes; return how many there are too."""
    count = 0
    for holder, key in list(places(content)):
        if isinstance(holder, dict) and key not in holder:
            continue
        if isinstance(holder[key], str):
            before = holder[key]
            holder[key] = f"{EVIL}{count}"
            try:
                valid(content)
                count += 1
            except (ValidationError, ValueError):
                holder[key] = before
    return content, count


def check(source: str) -> None:
    page = Page(source)
    assert "onerror" not in {name for _, name, _ in page.attributes}
    assert all(value.startswith("data:") for value in page.values("src"))
    assert "b" not in re.findall(r"<(\w+)", source)
    assert source.count("<script") == 1
    assert "alert(2)</script>" not in source
    assert "alert(2)" in page.text, "it is shown"


@pytest.mark.parametrize("finished", [True, False])
def test_a_page_about_runs(tmp_path: Path, finished: bool) -> None:
    evil = f"{EVIL}tier"
    folders = []
    for number in range(2):
        rounds = make_rounds([evil, "low"], [0.9, 0.8])
        folder = write_run(tmp_path / f"run<b>{number}", rounds, finished=finished)
        lines = []
        for record in rounds:
            content, _ = poisoned(record.to_dict(), RoundRecord.model_validate)
            lines.append(json.dumps(content))
        (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
        if finished:
            content, count = poisoned(json.loads((folder / "summary.json").read_text()), Summary.model_validate)
            assert count > 5
            (folder / "summary.json").write_text(json.dumps(content))
        (folder / "config.toml").write_text(
            f"seed = 0\n[{json.dumps(EVIL)}]\nx = {json.dumps(EVIL)}\n[data]\nname = {json.dumps(EVIL)}\n"
            f"y = [{json.dumps(EVIL)}]\n"
        )
        folders.append(folder)
    check(html_report(folders))
    check(html_report(folders[:1]))


def test_a_page_about_a_comparison(tmp_path: Path) -> None:
    rows = [make_row(f"{EVIL}{i}", i, tiers=[f"{EVIL}t", "low"], seeds=[0, 1]) for i in range(3)]
    results = make_results(rows, seeds=[0, 1])
    content, count = poisoned(results.to_dict() | {"protocol": {EVIL: EVIL}}, Results.model_validate)
    assert count > 20
    content["tiers"] = results.tiers  # the names that all rows share are markup already
    check(write_comparison(Results.model_validate(content), tmp_path)["report.html"].read_text(encoding="utf-8"))
