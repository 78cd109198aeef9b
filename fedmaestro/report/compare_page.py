"""The files of a comparison: ``table.md``, ``table.csv``, ``plots/`` and one self-contained page, ``report.html``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmaestro.report import compare_curves, compare_plots
from fedmaestro.report.compare_figure import ranked
from fedmaestro.report.compare_table import (
    BUDGETS,
    budget,
    family,
    is_whole,
    macs_remark,
    overall_stat,
    protocol,
    score_columns,
    score_note,
    seeds_text,
    table_csv,
    table_markdown,
    unfinished,
)
from fedmaestro.report.curves import as_number
from fedmaestro.report.figure import inline_svg, plot_style, save_figure
from fedmaestro.report.format import MISSING, Shown, format_bytes, format_seconds, lost_share, lost_text
from fedmaestro.report.html import Cell, Content, Markup, details, document, escape, pairs, table
from fedmaestro.runs.folder import write_atomically
from fedmaestro.runs.records import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture: its file below ``plots/``, its heading, what to look for, and the function that draws it."""

    name: str
    heading: str
    caption: str
    draw: Callable[[Results], "Figure"]


PLOTS = (
    Plot(
        name="tier_accuracy",
        heading="{Metric} per tier",
        caption="Best mean first. A wide row serves its tiers unequally.",
        draw=compare_plots.tier_accuracy_figure,
    ),
    Plot(
        name="worst_mean",
        heading="Worst tier against mean of tiers",
        caption="Up and right is better. On the grey line all tiers are equally good.",
        draw=compare_plots.worst_mean_figure,
    ),
    Plot(
        name="accuracy_rounds",
        heading="{Metric} over rounds",
        caption="Mean over tiers, best final value first.",
        draw=compare_curves.accuracy_round_figure,
    ),
    Plot(
        name="accuracy_bytes",
        heading="{Metric} over traffic",
        caption="Mean over tiers, over what all devices have received and sent until then.",
        draw=compare_curves.accuracy_bytes_figure,
    ),
    Plot(
        name="accuracy_time",
        heading="{Metric} over virtual time",
        caption="Mean over tiers, over the simulated time of the federation.",
        draw=compare_curves.accuracy_time_figure,
    ),
    Plot(
        name="tail_energy",
        heading="Tail energy",
        caption="Share of the layers' energy beyond the smallest tier's ranks. Near zero, all tiers are one model. "
        "Strategies with LoD layers only; means and deviations of the logarithms.",
        draw=compare_curves.tail_energy_figure,
    ),
    Plot(
        name="factor_bias",
        heading="Factor bias",
        caption="What a round's update misses because factors are averaged, not their products. Strategies with LoD "
        "layers only.",
        draw=compare_curves.factor_bias_figure,
    ),
)


def write_comparison(results: Results, folder: Path) -> dict[str, Path]:
    """Write the tables, the plots and the page of a comparison; return the paths by name relative to ``folder``.

    Args:
        results: Strategies may lack seeds, series may hold nulls.
        folder: Made if it does not exist; files of the same names are replaced.

    """
    assert results.strategies, "a comparison needs at least one strategy"
    plots = write_plots(results, folder)
    svgs = {name: plots[f"plots/{name}.svg"].read_text(encoding="utf-8") for name in (plot.name for plot in PLOTS)}
    texts = {
        "table.md": table_markdown(results),
        "table.csv": table_csv(results),
        "report.html": comparison_page(results, svgs),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return {**{name: folder / name for name in texts}, **plots}


def write_plots(results: Results, folder: Path) -> dict[str, Path]:
    """Write ``plots/NAME.png`` and ``.svg`` for each of `PLOTS`; return the paths by name relative to ``folder``."""
    paths: dict[str, Path] = {}
    for plot in PLOTS:
        with plot_style():
            png, svg = save_figure(plot.draw(results), folder / "plots" / plot.name)
        paths |= {f"plots/{path.name}": path for path in (png, svg)}
    return paths


def comparison_page(results: Results, svgs: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        results: What the page is about.
        svgs: The plots by name, as SVG documents that matplotlib wrote.

    """
    sections = [
        _section("Overview", _headline(results), _warning(results), "<h3>Protocol</h3>", pairs("", protocol(results))),
        _section("Results", _remark(results), _result_table(results)),
        _section("Budgets", _budget_tables(results), "<h3>Whole runs</h3>", _cost_table(results)),
        _section("Plots", *(_plot(results, plot, svgs[plot.name]) for plot in PLOTS)),
        _section("What each row is", f'<div class="prose">{_row_table(results)}</div>'),
    ]
    return document(f"Comparison: {results.experiment}", "\n".join(sections))


def _section(heading: str, *parts: str) -> str:
    inner = "\n".join(part for part in (f"<h2>{escape(heading)}</h2>", *parts) if part)
    return f"<section>\n{inner}\n</section>"


def _headline(results: Results) -> str:
    facts = {
        "experiment": results.experiment,
        "strategies": str(len(results.strategies)),
        "tiers, largest first": ", ".join(results.tiers),
        "seeds": ", ".join(map(str, results.seeds)),
        "status": "complete" if results.complete else "incomplete",
    }
    return pairs("headline", facts)


def _warning(results: Results) -> str:
    if results.complete:
        return ""
    lacking = "; ".join(unfinished(results)) or "it was interrupted"
    return f'<p class="warning">This comparison is incomplete: {escape(lacking)}.</p>'


def _remark(results: Results) -> str:
    note = f"<p>{escape(score_note(results))} Bold: the best of a column. Click a heading to sort.</p>"
    remark = macs_remark(results)
    return note + (f'\n<p class="warning">{escape(remark)}</p>' if remark else "")


def _named_table(header: list[str], rows: list[list[Content]]) -> str:
    """Return a sortable table whose first column stays in sight when it scrolls sideways."""
    return f'<div class="named">{table(header, rows, sortable=True)}</div>'


def _result_table(results: Results) -> str:
    columns = score_columns(results)
    rows: list[list[Content]] = [
        [
            row.name,
            Cell(str(len(row.seeds)) if is_whole(row, results) else seeds_text(row, results), len(row.seeds)),
            *(Cell(column.texts[index], column.values[index], column.best[index]) for column in columns),
        ]
        for index, row in enumerate(results.strategies)
    ]
    return _named_table(["Strategy", "Seeds", *(column.heading for column in columns)], rows)


def _budget_tables(results: Results) -> str:
    """Return a table per tier, the largest one open: strategies stand below each other."""
    header = ["Strategy", *(heading for heading, _, _ in BUDGETS)]
    tables = [
        details(f"Tier {tier}", Markup(_named_table(header, _budget_rows(results, tier))), opened=index == 0).text
        for index, tier in enumerate(results.tiers)
    ]
    return "<p>Per example, or per device and round.</p>\n" + "\n".join(tables)


def _budget_rows(results: Results, tier: str) -> list[list[Content]]:
    rows: list[list[Content]] = []
    for row in results.strategies:
        values = [(as_number(budget(row, tier, key)), to_text) for _, key, to_text in BUDGETS]
        rows.append([row.name, *(Cell(to_text(value), value) for value, to_text in values)])
    return rows


def _cost_table(results: Results) -> str:
    columns = (
        ("Download", "download_bytes", format_bytes),
        ("Upload", "upload_bytes", format_bytes),
        ("Virtual time", "virtual_seconds", format_seconds),
    )
    rows: list[list[Content]] = []
    for row in results.strategies:
        values = [(as_number(getattr(row, key)), to_text) for _, key, to_text in columns]
        lost = [Cell(lost_text(row.updates.get(tier)), lost_share(row.updates.get(tier))) for tier in results.tiers]
        why = ", ".join(f"{count} {kind}" for kind, count in row.failed_by.items())
        rows.append([row.name, *(Cell(to_text(value), value) for value, to_text in values), *lost, why or "–"])
    note = (
        "<p>Of all devices and rounds, mean over seeds. Updates lost: devices of a tier that were asked to train and "
        "whose update does not count, failed or dropped, all seeds together.</p>"
    )
    lost_of = [f"Lost: {tier}" for tier in results.tiers]
    header = ["Strategy", *(heading for heading, _, _ in columns), *lost_of, "Why updates failed"]
    return note + "\n" + _named_table(header, rows)


def _plot(results: Results, plot: Plot, svg: str) -> str:
    best = ranked(results)[0]
    text, show = overall_stat(results, best, "mean", "final").text, Shown(results.metric)
    summary = "" if text == MISSING else f" Best final mean of tiers: {best.name}, {text}{show.unit}."
    heading = plot.heading.format(metric=show.name, Metric=f"{show.name[:1].upper()}{show.name[1:]}")
    label = escape(f"{heading} of {len(results.strategies)} strategies. {plot.caption}{summary}")
    picture = inline_svg(svg, plot.name.replace("_", "-"), label)
    return f'<h3>{escape(heading)}</h3>\n<p>{escape(plot.caption)}</p>\n<div class="plot">{picture}</div>'


def _row_table(results: Results) -> str:
    header = ["Strategy", "What it does", "Source", "Family", "Devices train", "Objective", "Aggregation", "Server"]
    keys = ("submodel", "objective", "aggregation", "server")
    rows = [
        [row.name, row.summary, row.source, family(row), *(str(getattr(row, key)) for key in keys)]
        for row in results.strategies
    ]
    return table(header, rows)
