"""Tables and one figure from finished trainings (``fedmaestro train``): mean ± sample standard deviation over seeds.

Runs of one task, model and form are one method, whatever their seeds. Budgets are parts of the dense model's MACs.

    python experiments/maestro_table.py RUN_DIR… [--plot PATH_WITHOUT_SUFFIX]
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedmaestro.report import cost_figure, save_figure
from fedmaestro.runs.records import CostCurve, CostPoint
from fedmaestro.training import TrainingRun

Groups = dict[str, list[dict[str, Any]]]


def spread(values: list[float], scale: float, digits: int) -> str:
    """Return mean ± sample standard deviation; only the value for one seed."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def final_table(runs: list[TrainingRun]) -> list[str]:
    """Return one row per method: the trained model itself, final (best in brackets) on the split it was scored on."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        summary = run.summary
        groups[summary["task"], summary["model"], summary["form"], summary["split"]].append(summary)
    lines = [
        "| task | model | form | metric | final (best) | parameters | of dense | MACs | of dense | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, model, form, split), group in sorted(groups.items()):
        scale, digits = (100, 2) if group[0]["metric"] == "accuracy" else (1, 3)
        params = [s["params"] for s in group]
        macs = [s["macs_per_example"] for s in group]
        lines.append(
            f"| {task} | {model} | {form} | {split} {group[0]['metric']} "
            f"| {spread([s['final_value'] for s in group], scale, digits)} "
            f"({spread([s['best_value'] for s in group], scale, digits)}) "
            f"| {statistics.mean(params):,.0f} "
            f"| {spread([p / s['dense_params'] for p, s in zip(params, group, strict=True)], 100, 1)} % "
            f"| {statistics.mean(macs):,.0f} "
            f"| {spread([m / s['dense_macs_per_example'] for m, s in zip(macs, group, strict=True)], 100, 1)} % "
            f"| {', '.join(str(s['seed']) for s in sorted(group, key=lambda s: s['seed']))} |"
        )
    return lines


def budgets(runs: list[TrainingRun]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Return the points of every series by budget, over all runs; budgets that not all seeds reach are left out."""
    series: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    count: dict[str, int] = defaultdict(int)
    for run in runs:
        for name, points in run.curve["series"].items():
            count[name] += 1
            for point in points[:-1]:  # the last one is the smallest model, whose MACs differ by seed
                series[name][round(point["budget"], 4)].append(point)
    return {
        name: {budget: points for budget, points in by_budget.items() if len(points) == count[name]}
        for name, by_budget in series.items()
    }


def curve_table(runs: list[TrainingRun]) -> list[str]:
    """Return one row per budget, one column per series: the metric on the test set."""
    series, metric = budgets(runs), runs[0].curve["metric"]
    scale, digits = (100, 2) if metric == "accuracy" else (1, 3)
    names = sorted(series)
    lines = [f"| MACs ≤ | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for budget in sorted({b for by_budget in series.values() for b in by_budget}, reverse=True):
        cells = [
            spread([p["value"] for p in series[name][budget]], scale, digits) if budget in series[name] else "–"
            for name in names
        ]
        lines.append(f"| {100 * budget:g} % | {' | '.join(cells)} |")
    return lines


def mean_curve(runs: list[TrainingRun]) -> CostCurve:
    """Return the seeds' mean as the content of a ``curve.json``, for the plot."""

    def mean(points: list[dict[str, Any]]) -> CostPoint:
        macs, params = (round(statistics.mean(p[key] for p in points)) for key in ("macs", "params"))
        value, loss = (statistics.mean(p[key] for p in points) for key in ("value", "loss"))
        latency = [p["latency_ms"] for p in points if p["latency_ms"] is not None]
        latency_ms = statistics.mean(latency) if latency else None
        return CostPoint(macs=macs, params=params, value=value, loss=loss, latency_ms=latency_ms)

    dense = [run.curve["dense"] for run in runs if run.curve["dense"] is not None]
    series = {name: [mean(p) for p in by_budget.values()] for name, by_budget in budgets(runs).items()}
    first = CostCurve.model_validate(runs[0].curve)
    return first.model_copy(update={"series": series, "dense": mean(dense) if dense else None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished trainings of one task")
    parser.add_argument("--plot", type=Path, help="write PATH.png and PATH.svg")
    arguments = parser.parse_args()
    runs = [TrainingRun(path) for path in arguments.runs]
    if missing := [str(run.path) for run in runs if not (run.path / "curve.json").exists()]:
        sys.exit(f"no finished training in {', '.join(missing)}")
    print("\n".join([*final_table(runs), "", *curve_table(runs)]))
    if arguments.plot:
        summary = runs[0].summary
        seeds = len({run.summary["seed"] for run in runs})
        title = f"{summary['task']} · {summary['model']} · mean of {seeds} seeds"
        print(f"plot: {save_figure(cost_figure(mean_curve(runs), title), arguments.plot)[0]}")


if __name__ == "__main__":
    main()
