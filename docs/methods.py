"""Write the tables of `methods.md` from the rows' own records: `python docs/methods.py`; `--check` only compares.

<!-- methods --> … <!-- end -->     what each row is, and where it departs from its paper
<!-- robust --> … <!-- end -->      aggregations against attackers
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmaestro.report.text_table import TextTable, to_markdown
from fedmaestro.strategies import AGGREGATIONS, STRATEGIES
from fedmaestro.strategies.rows import Strategy

PAGE = Path(__file__).with_name("methods.md")


def methods() -> str:
    """Return the table of the audit: what each row is in every respect, and where it departs from its paper."""

    def weights(row: Strategy) -> str:
        return "norms of products" if row.aggregation.name == "hetlora" else "examples"

    def normalisation(row: Strategy) -> str:
        scaler = ", scaler" if row.value("model.scaler") == "on" else ""
        own = ", own of each tier" if "norm" in str(row.value("train.per-tier")).split() else ""
        return f"{row.value('model.norm')}{scaler}{own}"

    def smallest(row: Strategy) -> str:
        rule = row.submodel
        if rule.trains == "smallest":
            return "the one model of all tiers, which is its own"
        if rule.trains in ("full", "capable"):
            return "the leading part of a model that it does not train"
        if rule.separate:
            who = "all devices" if rule.trains == "affordable" else "its own devices"
            return f"a model of its own, trained by {who}"
        if rule.rolls:
            return "the window that its devices trained last"
        return "its part of the shared model"

    lines = [
        (
            row.name,
            row.submodel.describe(),
            row.objective + (" + logit adjustment" if row.value("train.logit-adjustment") else ""),
            f"{row.aggregation.name}, by {weights(row)}",
            normalisation(row),
            row.describe_server(),
            smallest(row),
            row.paper or "–",
            row.code or "–",
            _departures(row),
        )
        for row in STRATEGIES.values()
    ]
    header = (
        "row",
        "submodel, who trains it",
        "objective",
        "aggregation, weights",
        "norm",
        "server",
        "what the smallest tier gets",
        "paper",
        "code it was checked against",
        "faithful?",
    )
    return _table(header, lines)


def _departures(row: Strategy) -> str:
    if not row.paper:
        return "of this project"
    return "departs: " + "; ".join(row.departures) if row.departures else "faithful"


def robust() -> str:
    """Return the table of the aggregations against attackers, which go with every row of one shared model."""
    lines = [(name, row.summary, row.source) for name, row in AGGREGATIONS.items() if row.summary.startswith("robust")]
    return _table(("train.aggregation", "what it is", "source"), lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the table alone: the page has headings and notes of its own."""
    return to_markdown(TextTable(heading="", note="", header=header, rows=list(rows))).partition("\n\n")[2]


def page(markdown: str) -> str:
    """Return the page with its tables made anew."""
    for mark, make in (("methods", methods), ("robust", robust)):
        block = re.compile(rf"<!-- {mark} -->.*?<!-- end -->", re.DOTALL)
        text = f"<!-- {mark} -->\n{make()}\n<!-- end -->"
        markdown = block.sub(lambda _, text=text: text, markdown)
    return markdown


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in sys.argv:
        sys.exit("docs/methods.md differs from the rows: python docs/methods.py" if after != before else 0)
    PAGE.write_text(after, encoding="utf-8")
