"""From the files of a run folder to pictures and a page: pure functions without Flower, Ray or torch.

matplotlib is imported inside the functions that draw, so importing this package is cheap.
"""

from fedmaestro.report.accuracy_plot import plot_tier_accuracy
from fedmaestro.report.cost_plot import accuracy_cost_svg, plot_accuracy_cost
from fedmaestro.report.format import format_bytes, format_count, format_percent, format_seconds
from fedmaestro.report.page import html_report, write_report, write_run_report
from fedmaestro.report.partition_plot import plot_partition
from fedmaestro.report.rank_plot import plot_ranks, plot_tier_ranks, rank_svg, tier_rank_svg
from fedmaestro.runs.reader import RunRecord, read_run

__all__ = [
    "RunRecord",
    "accuracy_cost_svg",
    "format_bytes",
    "format_count",
    "format_percent",
    "format_seconds",
    "html_report",
    "plot_accuracy_cost",
    "plot_partition",
    "plot_ranks",
    "plot_tier_accuracy",
    "plot_tier_ranks",
    "rank_svg",
    "read_run",
    "tier_rank_svg",
    "write_report",
    "write_run_report",
]
