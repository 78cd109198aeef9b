"""From the files of a run folder to pictures and a page: pure functions without Flower, Ray or torch.

A function ``…_figure`` draws, `save_figure` writes PNG and SVG, `svg_text` returns the latter. matplotlib and Jinja2
are imported inside the functions that use them, so importing this package is cheap.
"""

from fedmaestro.report.accuracy_plot import tier_accuracy_figure
from fedmaestro.report.cost_plot import cost_figure
from fedmaestro.report.figure import save_figure, svg_text
from fedmaestro.report.format import format_bytes, format_count, format_percent, format_seconds
from fedmaestro.report.partition_plot import partition_figure
from fedmaestro.report.rank_plot import rank_figure
from fedmaestro.report.run_page import html_report, write_report, write_run_report
from fedmaestro.runs.reader import RunRecord, read_run

__all__ = [
    "RunRecord",
    "cost_figure",
    "format_bytes",
    "format_count",
    "format_percent",
    "format_seconds",
    "html_report",
    "partition_figure",
    "rank_figure",
    "read_run",
    "save_figure",
    "svg_text",
    "tier_accuracy_figure",
    "write_report",
    "write_run_report",
]
