"""The page of a comparison in a real browser: what it shows, what it reports as an error, how wide it gets."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from reports import edited, make_results, make_row

from fedmaestro.report.compare_page import write_comparison

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt-get install chromium")

LONG = "a-strategy-with-a-name-that-is-very-much-longer-than-any-table-cell-of-a-phone"
NAMES = ["nested", "zero-pad", '<i>hetero</i> & "fl"', LONG, "m4", "m5"]

# What a page reports goes into its title, which the dump of its DOM shows; a frame reports to the page around it.
REPORT = "window.top.document.title = JSON.stringify({});"
WIDTHS = "[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
TOO_WIDE = """[...document.querySelectorAll("main *")].filter((element) =>
  element.getBoundingClientRect().right > innerWidth + 0.5 && !element.closest(".scroll, .plot")).length"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A comparison with everything that a page can show: both families, missing seeds, unequal MACs, odd names."""
    rows = [make_row(name, rank, form="dense" if rank == 2 else "lod") for rank, name in enumerate(NAMES)]
    rows[4] = make_row("m4", 4, seeds=[])

    def change(content: dict[str, Any]) -> None:
        content["strategies"][2]["budgets"]["mid"]["macs_per_example"] *= 2
        content["experiment"] = "an_experiment_with_a_name_that_does_not_fit_on_one_line_of_a_phone"
        content["protocol"]["data.a_long_setting_without_any_place_to_break_it_in_two"] = "x" * 80

    results = edited(make_results(rows), change)
    folder = tmp_path_factory.mktemp("comparison")
    return write_comparison(results, folder)["report.html"].read_text(encoding="utf-8")


def browse(page: str, folder: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page; return its DOM after the scripts have run, and what it wrote to the console: errors too."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--virtual-time-budget=2000",
        "--enable-logging=stderr",
        "--v=0",
        "--window-size=1200,900",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def with_script(page: str, script: str) -> str:
    head, end, tail = page.rpartition("</body>")
    assert end
    return f"{head}<script>{script}</script>{end}{tail}"


def report(page: str, value: str, folder: Path, *options: str) -> Any:
    """Return a JavaScript value of a page, as it is after all of its scripts."""
    dom, console = browse(with_script(page, REPORT.format(value)), folder, *options)
    assert console == []
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return json.loads(html.unescape(title[1]))


def in_frame(page: str, width: int) -> str:
    """Return a page that shows ``page`` in a frame: Chromium's own window is never narrower than 500 pixels."""
    frame = f'<iframe width="{width}" height="844" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
    return f'<!DOCTYPE html><html><head><title></title></head><body style="margin: 0">{frame}</body></html>'


def phone(page: str, value: str, folder: Path) -> Any:
    framed = in_frame(with_script(page, f"addEventListener('load', () => {{ {REPORT.format(value)} }});"), 390)
    dom, console = browse(framed, folder)
    assert console == []
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return json.loads(html.unescape(title[1]))


def test_no_errors_and_every_strategy_is_shown(page: str, tmp_path: Path) -> None:
    dom, console = browse(page, tmp_path)
    assert console == []
    body = re.sub(r"<script>.*?</script>", "", dom, flags=re.DOTALL)
    tables = body.partition("<svg")[0]
    for name in NAMES:
        assert html.escape(name, quote=False) in tables
    assert dom.count('role="img"') == 8
    assert 'tabindex="0"' in dom, "the page's own script has run"


def test_a_click_on_a_heading_sorts(page: str, tmp_path: Path) -> None:
    steps = """(() => {
      const table = document.querySelector("table.sortable");
      const head = (name) => [...table.tHead.rows[0].cells].find((cell) => cell.textContent === name);
      const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
      const state = () => [...table.querySelectorAll("[aria-sort]")].map((cell) => cell.ariaSort);
      const seen = [[order(), state()]];
      for (const name of ["Mean of tiers", "Mean of tiers", "Strategy"]) {
        head(name).click();
        seen.push([order(), state()]);
      }
      head("Worst tier").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
      return [...seen, [order(), state()]];
    })()"""
    given, down, up, by_name, by_key = report(page, steps, tmp_path)
    best_first = ["nested", "zero-pad", NAMES[2], LONG, "m5", "m4"]
    assert given == [NAMES, []]
    assert down == [best_first, ["descending"]]
    assert up == [best_first[::-1], ["ascending"]]
    assert by_name == [["zero-pad", "nested", "m5", "m4", LONG, NAMES[2]], ["descending"]]
    assert by_key == [best_first, ["descending"]]


def test_a_phone_scrolls_tables_not_the_page(page: str, tmp_path: Path) -> None:
    inner, document, body = phone(page, WIDTHS, tmp_path)
    assert inner == 390
    assert document <= 390
    assert body <= 390
    assert phone(page, TOO_WIDE, tmp_path) == 0
    boxes = """[...document.querySelectorAll("details")].map((one) => one.open = true) &&
      [...document.querySelectorAll(".scroll")].map((box) => box.scrollWidth > box.clientWidth)"""
    assert phone(page, boxes, tmp_path)[0], "the results do not fit: they scroll in their box"
