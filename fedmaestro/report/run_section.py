"""The part of the page about one run."""

import base64
from collections.abc import Mapping
from typing import Any

from fedmaestro.report.accuracy_plot import tier_accuracy_svg
from fedmaestro.report.curves import as_number
from fedmaestro.report.facts import (
    NAN,
    epsilon,
    flat_config,
    full_ranks,
    headline,
    mean_and_worst,
    other_metrics,
    rank_history,
    run_title,
    shown,
    tier_facts,
    totals,
)
from fedmaestro.report.figure import inline_svg
from fedmaestro.report.format import (
    MISSING,
    format_bytes,
    format_count,
    format_privacy,
    format_seconds,
    lost_share,
    lost_text,
)
from fedmaestro.report.html import Cell, Content, Markup, details, escape, table
from fedmaestro.report.rank_plot import tier_rank_svg
from fedmaestro.runs.reader import RunRecord
from fedmaestro.runs.records import Updates

# Column, key in the summary's tier, formatter. Memory and download are those of one device.
_COLUMNS = (
    ("Parameters", "params", format_count),
    ("MACs per example", "macs_per_example", format_count),
    ("Training memory", "train_memory_bytes", format_bytes),
    ("Download per round", "download_bytes", format_bytes),
)


def run_section(run: RunRecord, name: str, anchor: str) -> str:
    """Return the section of one run.

    Args:
        run: The run.
        name: What the page calls it.
        anchor: Id of the section, and prefix of the ids of its plots: unique in the page.

    """
    parts = [
        f"<h2>{escape(name)}</h2>",
        _headline(run),
        _interrupted(run),
        _totals(run),
        "<h3>Tiers</h3>",
        _tier_table(run),
        f"<h3>Test {escape(shown(run).name)} per tier</h3>",
        _metric_plot(run, anchor),
        _rank_plot(run, anchor),
        _partition_plot(run),
        _config(run),
    ]
    inner = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}">\n{inner}\n</section>'


def _headline(run: RunRecord) -> str:
    items = (f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in headline(run).items())
    return f'<dl class="headline">{"".join(items)}</dl>'


def _interrupted(run: RunRecord) -> str:
    if run.finished:
        return ""
    why = "it has no summary.json" if run.summary is None else "it was interrupted and can be resumed"
    last = totals(run)["rounds"] if run.rounds else None
    reached = "no round was recorded" if last is None else f"the last recorded round is {last:.0f}"
    return f'<p class="warning">This run is not finished: {why}; {reached}.</p>'


def _totals(run: RunRecord) -> str:
    sums, (mean, worst), show = totals(run), mean_and_worst(run), shown(run)
    lost = f"{sums['failed']:.0f} failed, {sums['dropped']:.0f} dropped"
    facts = {
        f"mean tier {show.name}": show.text(mean),
        f"worst tier {show.name}": show.text(worst),
        "rounds": f"{sums['rounds']:.0f}",
        "download, all devices": format_bytes(sums["download_bytes"]),
        "upload, all devices": format_bytes(sums["upload_bytes"]),
        "virtual time": format_seconds(sums["virtual_seconds"]),
        "wall time": format_seconds(sums["wall_seconds"]),
        "device updates lost": lost if sums["failed"] + sums["dropped"] else "0",
    }
    if (spent := epsilon(run)) is not None:
        facts["differential privacy"] = format_privacy(spent, run.summary.delta if run.summary else None)
    items = (f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f'<dl class="totals">{"".join(items)}</dl>'


def _tier_table(run: RunRecord) -> str:
    tiers = tier_facts(run)
    if not tiers:
        return "<p>No round has been evaluated yet.</p>"
    show, others = shown(run), other_metrics(run)
    scores = [f"Final {show.name}", f"Best {show.name}", *(f"Final {name}" for name in others), *_own_test(run)]
    header = ["Tier", "Devices", *scores, "Updates lost", *(name for name, _, _ in _COLUMNS), "Ranks"]
    own = " Own test: over the tier's devices, each on its own test examples." if _own_test(run) else ""
    note = f"<p>Training memory and download per round are those of one device.{own}</p>"
    return note + table(header, (_tier_row(run, name, facts) for name, facts in tiers.items()))


def _tier_row(run: RunRecord, name: str, facts: Mapping[str, Any]) -> list[Content]:
    show = shown(run)
    final, best = as_number(facts.get("final")), as_number(facts.get("best"))
    devices = as_number(facts.get("devices"))
    known = facts.get("updates")
    updates = Updates(**known) if isinstance(known, Mapping) else None
    cells = [
        Cell(format_count(devices), devices),
        Cell(show.text(final) + _final_round(run, facts), final),
        Cell(show.text(best), best),
        *(_plain(values.get(name, NAN)) for values in other_metrics(run).values()),
        *(Cell(show.text(row.get(name)), as_number(row.get(name))) for row in _own_test(run).values()),
        Cell(lost_text(updates), lost_share(updates)),
    ]
    for _, key, to_text in _COLUMNS:
        value = as_number(facts.get(key))
        cells.append(Cell(to_text(value), value))
    return [name, *cells, _ranks(facts.get("ranks"))]


def _plain(value: float) -> Cell:
    """Return a value of another metric: nobody has said whether it is a share."""
    return Cell(f"{value:.4g}" if value == value else MISSING, value)


def _own_test(run: RunRecord) -> dict[str, dict[str, float | None]]:
    """Return what the devices of each tier reached on their own tests in the last evaluated round, by heading."""
    last = next((row.device_test for row in reversed(run.rounds) if row.device_test), {})
    if not last:
        return {}
    return {
        "Own test, mean": {tier: row["mean"] for tier, row in last.items()},
        "Own test, worst tenth": {tier: row["worst_decile"] for tier, row in last.items()},
    }


def _final_round(run: RunRecord, facts: Mapping[str, Any]) -> str:
    """Return the round of the final value where that was measured before the last one."""
    measured, last = as_number(facts.get("final_round")), as_number(run.summary.rounds if run.summary else None)
    return f" (round {measured:.0f})" if measured < last else ""


def _ranks(ranks: object) -> Content:
    """Show one rank (or width) as it is; fold more than one away."""
    if not isinstance(ranks, Mapping) or not ranks:
        return MISSING
    pairs = [f"{layer}\N{NO-BREAK SPACE}{rank}" for layer, rank in ranks.items()]
    if len(pairs) == 1:
        return pairs[0]
    return details(f"{len(pairs)} layers", Markup(escape(", ".join(pairs))))


def _metric_plot(run: RunRecord, anchor: str) -> str:
    label = escape(f"Test {shown(run).name} per tier over rounds and virtual time: {run_title(run)}")
    return f'<div class="plot">{inline_svg(tier_accuracy_svg(run.rounds), f"{anchor}-accuracy", label)}</div>'


def _rank_plot(run: RunRecord, anchor: str) -> str:
    if not (history := rank_history(run)):
        return ""
    svg = tier_rank_svg(history, full=full_ranks(run))
    label = escape(f"Rank per layer and tier over rounds: {run_title(run)}")
    return f'<h3>Rank per layer</h3>\n<div class="plot">{inline_svg(svg, f"{anchor}-ranks", label)}</div>'


def _partition_plot(run: RunRecord) -> str:
    """Embed the file as an image, not as elements: unlike the plot above, its source is not this program."""
    path = run.path / "plots" / "partition.svg"
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="Examples per device and class">'
    return f'<h3>Data partition</h3>\n<div class="plot">{image}</div>'


def _config(run: RunRecord) -> str:
    if not run.config:
        return "<p>No config.toml.</p>"
    rows = table(["Setting", "Value"], flat_config(run.config).items())
    return details("Resolved configuration", Markup(rows)).text
