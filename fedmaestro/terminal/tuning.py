"""What the terminal shows of a tuning."""

from rich import box
from rich.table import Table

from fedmaestro.config.search import settings_text
from fedmaestro.report.format import MISSING, Shown, format_count, format_seconds
from fedmaestro.runs.records import Tuned


def tuning_table(tuned: Tuned) -> Table:
    """Return the closing table: what was chosen for every row, its value on the validation split, what it cost."""
    show = Shown(tuned.metric)
    seeds = ", ".join(map(str, tuned.seeds))
    title = f"{tuned.experiment} · validation {show.heading} · seeds {seeds}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("row", no_wrap=True)
    table.add_column("chosen", overflow="fold")
    for heading in ("value", "failed", "updates", "wall"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in tuned.rows:
        failed = sum(trial.value is None for trial in row.trials)
        cost = format_count(row.cost.updates), format_seconds(row.cost.wall_seconds)
        table.add_row(row.name, settings_text(row.chosen) or MISSING, show.number(row.value), str(failed), *cost)
    return table
