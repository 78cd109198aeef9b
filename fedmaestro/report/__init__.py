"""From the files of a run folder to pictures and a page: pure functions without Flower, Ray or torch.

matplotlib is imported inside the functions that draw, so importing this package is cheap.
"""

from fedmaestro.report.accuracy_plot import plot_tier_accuracy
from fedmaestro.report.format import format_bytes, format_count, format_percent, format_seconds
from fedmaestro.report.page import html_report, write_report, write_run_report
from fedmaestro.report.partition_plot import plot_partition
from fedmaestro.report.records import RunRecord, read_run

__all__ = [
    "RunRecord",
    "format_bytes",
    "format_count",
    "format_percent",
    "format_seconds",
    "html_report",
    "plot_partition",
    "plot_tier_accuracy",
    "read_run",
    "write_report",
    "write_run_report",
]
