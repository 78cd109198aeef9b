"""The command line. Heavy imports (PyTorch, Flower, Ray) happen inside the commands: ``--help`` is instant."""

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedmaestro.errors import DivergedError, UntrainedError, UserError, check_name, one_line
from fedmaestro.places import place_caches
from fedmaestro.terminal.console import Terminal, tolerate_encodings

if TYPE_CHECKING:
    from fedmaestro.config.base import Settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Simulate federations of unequal devices that share one low-rank ordered network.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fedmaestro import __version__

        Terminal().print(f"fedmaestro {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_Experiment = Annotated[Path | None, typer.Argument(help="Experiment TOML; without it the demo on embedded digits.")]
_Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
_DataDir = Annotated[Path | None, typer.Option(help="Folder of local datasets (data.dir).")]
_Use = Annotated[
    str | None, typer.Option("--use", metavar="FILE", help="Files or modules of your own code that add rows (use).")
]
_Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="TRACKER", help="Also write to a tracker (`fedmaestro list trackers`)."),
]
_Gpus = Annotated[
    float,
    typer.Option(
        min=0.0, help="GPUs of each actor, also parts of one (0.25); with --actors 0, of this process; 0: the CPU."
    ),
]
_Actors = Annotated[
    int | None,
    typer.Option(help="Ray actors working in parallel, one per free CPU by default; 0: this process, without Ray."),
]


_Strategies = Annotated[
    str,
    typer.Option(
        metavar="A,B,…",
        help="Rows of `fedmaestro list strategies`, separated by commas: [LABEL:]NAME[+KEY=VALUE…], for example "
        "nested,both:nested+train.objective=paired-prefixes.",
    ),
]


class LogFormat(StrEnum):
    """How a command tells what happens."""

    TEXT = "text"
    JSON = "json"


_LogFormat = Annotated[
    LogFormat, typer.Option(help="What is printed: for people (text), or a line of JSON for each event (json).")
]
_Out = Annotated[Path | None, typer.Option(help="Folder of the results; a new one under runs/ by default.")]
_Trust = Annotated[
    bool, typer.Option("--trust", help="Run the code that a run folder holds, also where somebody else has written it.")
]
_RayAddress = Annotated[
    str | None, typer.Option(help="Address of a running Ray cluster; by default one is started here.")
]


@app.command()
def run(
    experiment: _Experiment = None,
    set_: _Overrides = None,
    use: _Use = None,
    data_dir: _DataDir = None,
    out: _Out = None,
    actors: _Actors = None,
    gpus_per_actor: _Gpus = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    trust: _Trust = False,
    ray_address: _RayAddress = None,
    track: _Track = None,
    log_format: _LogFormat = LogFormat.TEXT,
) -> None:
    """Run one experiment and report the accuracy of every tier."""
    from fedmaestro.config.base import parse_assignment
    from fedmaestro.flower.run import Run
    from fedmaestro.flower.run import run as run_experiment
    from fedmaestro.terminal.display import LiveDisplay, print_closing
    from fedmaestro.terminal.json_lines import RunLines
    from fedmaestro.trackers import trackers_of

    json = log_format is LogFormat.JSON
    console = Terminal(quiet=json)
    trackers = trackers_of(track or [])
    overrides = dict(parse_assignment(text) for text in set_ or [])
    try:
        with RunLines() if json else LiveDisplay(console) as display:
            finished = run_experiment(
                experiment,
                use=use,
                overrides=overrides,
                data_dir=data_dir,
                out=out,
                actors=actors,
                gpus_per_actor=gpus_per_actor,
                resume=resume,
                trust=trust,
                ray_address=ray_address,
                observers=[display, *trackers],
            )
    except KeyboardInterrupt:
        console.print("interrupted before the first round: nothing to keep")
        raise typer.Exit(130) from None
    except UntrainedError as error:
        print_closing(console, str(error.path), Run(error.path).summary)
        raise
    summary = finished.summary
    print_closing(console, str(finished.path), summary)
    if summary.get("interrupted"):
        console.print(
            f"interrupted after round {summary['rounds']}: continue with "
            f"`fedmaestro run --resume --out {finished.path}`",
            soft_wrap=True,
        )
        raise typer.Exit(130)


@app.command()
def compare(
    experiments: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Experiment TOMLs: with several, one comparison for each and the ranks over all of them; without any "
            "the demo on embedded digits."
        ),
    ] = None,
    strategies: _Strategies = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each strategy, counted from the experiment's.")] = 3,
    baseline: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Row that the others are tested against; the first by default.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", help="Smaller differences count as none; 0.5 points for shares, else nothing is level."
        ),
    ] = None,
    last: Annotated[
        int, typer.Option(metavar="K", help="Compare by the mean of the last K evaluated rounds; 1: the final one.")
    ] = 1,
    target: Annotated[
        float | None,
        typer.Option(metavar="VALUE", help="Say when and at what cost the mean over tiers reaches this (shares in %)."),
    ] = None,
    set_: _Overrides = None,
    use: _Use = None,
    data_dir: _DataDir = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="File or folder of `fedmaestro tune`: every row runs with what was chosen for it."),
    ] = None,
    out: _Out = None,
    actors: _Actors = None,
    gpus_per_actor: _Gpus = 0.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out; strategies, seeds and experiments may be added.")
    ] = False,
    trust: _Trust = False,
    ray_address: _RayAddress = None,
    track: _Track = None,
    log_format: _LogFormat = LogFormat.TEXT,
) -> None:
    """Run strategies × seeds on one Ray and write tables, plots and a report that compare them."""
    from fedmaestro.config.base import parse_assignment
    from fedmaestro.flower.compare import Comparison
    from fedmaestro.flower.compare import compare as run_comparison
    from fedmaestro.terminal.comparison import print_comparison
    from fedmaestro.terminal.display import ComparisonDisplay
    from fedmaestro.terminal.json_lines import RunLines
    from fedmaestro.trackers import trackers_of

    json = log_format is LogFormat.JSON
    console = Terminal(quiet=json)
    trackers = trackers_of(track or [])
    overrides = dict(parse_assignment(text) for text in set_ or [])
    names = _named(strategies)
    try:
        with RunLines() if json else ComparisonDisplay(console) as display:
            finished = run_comparison(
                experiments or None,
                names,
                seeds,
                baseline=baseline,
                margin=margin,
                last=last,
                target=target,
                use=use,
                overrides=overrides,
                data_dir=data_dir,
                tuned=tuned,
                out=out,
                actors=actors,
                gpus_per_actor=gpus_per_actor,
                resume=resume,
                trust=trust,
                ray_address=ray_address,
                observers=[display, *trackers],
            )
    except KeyboardInterrupt:
        console.print("interrupted before the first cell was finished: go on with --resume and the same --out")
        raise typer.Exit(130) from None
    except UntrainedError as error:
        print_comparison(console, Comparison(error.path))
        raise
    if not print_comparison(console, finished):
        console.print("interrupted: repeat the command with --resume and this folder as --out", soft_wrap=True)
        raise typer.Exit(130)


@app.command()
def tune(
    experiment: _Experiment = None,
    strategies: _Strategies = "",
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ROW:]KEY=VALUES",
            help="A setting and what is tried: train.lr=0.05,0.1,0.2, or for Optuna also train.lr=log:0.01..1; ROW: in "
            "front makes it that row's own. May be repeated.",
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N|A,B,…",
            help="Tuning seeds, which `compare` refuses: how many (counted from the experiment's + 1000), or which "
            "(one: 7,).",
        ),
    ] = "1",
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials of every row; by default all points of the grids.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, or optuna (TPE; extra sweep).")] = "grid",
    validation: Annotated[
        float | None,
        typer.Option(help="Training examples to choose on: so many, or below 1 this part (data.validation); 0.1."),
    ] = None,
    set_: _Overrides = None,
    use: _Use = None,
    data_dir: _DataDir = None,
    out: _Out = None,
    actors: _Actors = None,
    gpus_per_actor: _Gpus = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the tuning in --out.")] = False,
    trust: _Trust = False,
    ray_address: _RayAddress = None,
    track: _Track = None,
    log_format: _LogFormat = LogFormat.TEXT,
) -> None:
    """Choose settings for every row on validation splits, with equal budgets, for `compare --tuned`."""
    from fedmaestro.config.base import parse_assignment
    from fedmaestro.flower.tune import Tuning
    from fedmaestro.flower.tune import tune as run_tuning
    from fedmaestro.report.tuning import edge_notes
    from fedmaestro.runs.records import Tuned
    from fedmaestro.terminal.display import ComparisonDisplay
    from fedmaestro.terminal.json_lines import RunLines
    from fedmaestro.terminal.tuning import tuning_table
    from fedmaestro.trackers import trackers_of

    json = log_format is LogFormat.JSON
    console = Terminal(quiet=json)
    trackers = trackers_of(track or [])
    overrides = dict(parse_assignment(text) for text in set_ or [])
    names = _named(strategies)
    try:
        with RunLines() if json else ComparisonDisplay(console) as display:
            finished = run_tuning(
                experiment,
                names,
                search or [],
                _seeds(seeds),
                trials=trials,
                sampler=sampler,
                validation=validation if validation is None or validation < 1 else _whole(validation),
                use=use,
                overrides=overrides,
                data_dir=data_dir,
                out=out,
                actors=actors,
                gpus_per_actor=gpus_per_actor,
                resume=resume,
                trust=trust,
                ray_address=ray_address,
                observers=[display, *trackers],
            )
    except KeyboardInterrupt:
        console.print("interrupted before the first trial was finished: go on with --resume and the same --out")
        raise typer.Exit(130) from None
    except UntrainedError as error:
        console.print(tuning_table(Tuned(**Tuning(error.path).results)))
        raise
    tuned = Tuned(**finished.results)
    console.print(tuning_table(tuned))
    for note in edge_notes(tuned):
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"results: {finished.path} (tuning.md, tuned.toml)", soft_wrap=True)
    console.print(f"use them: fedmaestro compare … --tuned {finished.path}", soft_wrap=True, markup=False)
    if not tuned.complete:
        console.print("interrupted: repeat the command with --resume and this folder as --out", soft_wrap=True)
        raise typer.Exit(130)


def _named(strategies: str) -> list[str]:
    """Return the rows of ``--strategies``."""
    names = [name for name in strategies.split(",") if name.strip()]
    if not names:
        raise UserError("--strategies is empty: name some, for example --strategies nested,zero-pad")
    return names


def _seeds(text: str) -> int | list[int]:
    """Return how many seeds are meant, or which."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f"--seeds {text!r}: say how many (2), or which (10,11; a single one 10,)")
    return numbers if "," in text else numbers[0]


def _whole(number: float) -> int:
    """Return a number of examples."""
    if not number.is_integer():
        raise UserError(f"--validation {number}: a share below 1, or a whole number of examples")
    return int(number)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="Training TOML; without it Maestro on embedded digits.")] = None,
    set_: _Overrides = None,
    use: _Use = None,
    data_dir: _DataDir = None,
    out: _Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training in --out.")] = False,
    trust: _Trust = False,
    compare: Annotated[
        Path | None, typer.Option(help="Finished training (of the dense model, say) to draw beside this one.")
    ] = None,
    log_format: _LogFormat = LogFormat.TEXT,
) -> None:
    """Train one model with Maestro on this machine and draw accuracy over cost."""
    from fedmaestro.config.base import parse_assignment
    from fedmaestro.terminal.json_lines import TrainingLines
    from fedmaestro.terminal.training import TrainingDisplay, curve_table
    from fedmaestro.training import train as run_training

    json = log_format is LogFormat.JSON
    console = Terminal(quiet=json)
    overrides = dict(parse_assignment(text) for text in set_ or [])
    try:
        with TrainingLines() if json else TrainingDisplay(console) as display:
            finished = run_training(
                config,
                use=use,
                overrides=overrides,
                data_dir=data_dir,
                out=out,
                resume=resume,
                trust=trust,
                compare=compare,
                observers=[display],
            )
            if isinstance(display, TrainingLines):
                display.event("finish", folder=str(finished.path), **finished.summary)
    except DivergedError as error:
        sys.stderr.write(f"fedmaestro: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted: what was saved last can be continued with --resume")
        raise typer.Exit(130) from None
    if finished.summary.get("interrupted"):
        console.print(
            f"interrupted: continue with `fedmaestro train --resume --out {finished.path}`",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    console.print(curve_table(finished.curve))
    console.print(f"model_sha256 {finished.summary['model_sha256']}", soft_wrap=True)
    console.print(f"results: {finished.path} (curve.json, plots/accuracy_cost.png)", soft_wrap=True)


@app.command()
def extract(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run or of a training.")],
    tier: Annotated[str | None, typer.Option(help="Tier of a federation.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Budget: forward MACs per example.")] = None,
    max_params: Annotated[float | None, typer.Option(help="Budget: parameters.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Budget: measured ms of a forward pass on this machine, one thread.")
    ] = None,
    latency_batch: Annotated[int, typer.Option(min=1, help="Examples of a measured forward pass.")] = 1,
    calibration: Annotated[int, typer.Option(min=1, help="Training examples of the rank search.")] = 2048,
    out: Annotated[Path | None, typer.Option(help="New folder; under RUN_DIR/extracted by default.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of local datasets; that of the run by default.")] = None,
    trust: _Trust = False,
) -> None:
    """Write the model for a tier or a budget, with a card of what it costs and how accurate it is."""
    from fedmaestro.deploy.extract import Target
    from fedmaestro.deploy.extract import extract as extract_model
    from fedmaestro.report.format import Shown, format_count
    from fedmaestro.runs.records import MetricFacts

    console = Terminal()
    target = Target(tier=tier, max_macs=max_macs, max_params=max_params, max_latency_ms=max_latency_ms)
    with console.status("reading the run") as status:
        extracted = extract_model(
            run_dir,
            target,
            out=out,
            data_dir=data_dir,
            calibration=calibration,
            latency_batch=latency_batch,
            note=status.update,
            trust=trust,
        )
    card = extracted.card
    shown = Shown(MetricFacts(**card["metric"]))
    rows: list[tuple[Any, ...]] = [
        ("parameters", format_count(card["params"])),
        ("MACs per example", format_count(card["macs_per_example"])),
        (f"latency, batch {card['latency_batch']}", f"{card['latency_ms']:.3g} ms"),
        (f"test {shown.heading}", shown.number(card[f"test_{shown.name}"])),
        ("layers", ", ".join(f"{name} {form}" for name, form in card["layers"].items())),
    ]
    console.print(_filled(_table("figure", "value"), rows))
    console.print(f"written: {extracted.path} (model.safetensors, model.json)", soft_wrap=True)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of a comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file for several runs; report.html in the folder for one.")
    ] = None,
) -> None:
    """Write plots and an HTML report of one run or comparison, or one page that compares several runs."""
    from fedmaestro.report import write_report, write_run_report
    from fedmaestro.report.compare_files import is_comparison, report_comparison

    if len(run_dirs) == 1 and is_comparison(run_dirs[0]):
        if out is not None:
            raise UserError(f"--out {out}: the files of a comparison are written into its folder: leave --out out")
        written = report_comparison(run_dirs[0])
    elif len(run_dirs) == 1 and out is None:
        written = write_run_report(run_dirs[0])[-1]
    else:
        written = write_report(run_dirs, out or Path("report.html"))
    Terminal().print(f"report: {written}", soft_wrap=True)


@app.command(name="list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="strategies, submodels, objectives, aggregations, server-steps, server-optimizers, models, datasets, "
            "tasks, metrics, augmentations, partitions, selections, attacks, optimizers, schedules, trackers, fleets, "
            "settings or training-settings"
        ),
    ],
    use: _Use = None,
) -> None:
    """List what can be named in an experiment; with --use, rows of your own too."""
    tables: dict[str, Callable[[], Table]] = {
        "strategies": _strategies,
        "submodels": _submodels,
        "objectives": _objectives,
        "aggregations": _aggregations,
        "server-steps": _server_steps,
        "server-optimizers": _server_optimizers,
        "models": _models,
        "datasets": _datasets,
        "tasks": _tasks,
        "metrics": _metrics,
        "augmentations": _augmentations,
        "partitions": _partitions,
        "selections": _selections,
        "attacks": _attacks,
        "optimizers": _optimizers,
        "schedules": _schedules,
        "trackers": _trackers,
        "fleets": _fleets,
        "settings": _settings,
        "training-settings": _training_settings,
    }
    check_name("list", kind, tables)
    if use is not None:
        from fedmaestro.config.base import located_use
        from fedmaestro.runs.code import activate, gather

        activate(gather(located_use(use, Path.cwd())))
    Terminal().print(tables[kind]())


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="New Python file, my_paper.py say.")],
) -> None:
    """Write a commented file of your own code, with an experiment beside it, that runs as it is."""
    from fedmaestro.runs.starter import write_starter

    experiment = write_starter(file)
    Terminal().print(f"written: {file} and {experiment}; try `fedmaestro run {experiment}`", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0, overflow="fold")
    return table


def _filled(table: Table, rows: list[tuple[Any, ...]]) -> Table:
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _strategies() -> Table:
    from fedmaestro.strategies import STRATEGIES

    table = _table("strategy", "rule · its switches: submodel | objective | aggregation | server · source")
    for row in STRATEGIES.values():
        switches = (row.submodel.describe(), row.objective, row.value("train.aggregation"), row.describe_server())
        about = Text(f"{' | '.join(map(str, switches))} · {row.source}", style="dim")
        table.add_row(row.name, Text(f"{row.summary}\n").append(about))
    return table


def _submodels() -> Table:
    from fedmaestro.strategies import SUBMODELS

    return _filled(_table("submodel", "rule"), [(name, rule.describe()) for name, rule in SUBMODELS.items()])


def _aggregations() -> Table:
    from fedmaestro.strategies import AGGREGATIONS

    rows = [(rule.name, rule.summary, rule.source) for rule in AGGREGATIONS.values()]
    return _filled(_table("aggregation", "rule", "source"), rows)


def _server_steps() -> Table:
    from fedmaestro.strategies import SERVER_STEPS

    rows = [(row.name, row.summary, ", ".join(row.settings.values()), row.source) for row in SERVER_STEPS.values()]
    return _filled(_table("server step", "what it does", "settings", "source"), rows)


def _server_optimizers() -> Table:
    from fedmaestro.strategies import SERVER_OPTIMIZERS

    rows = [(x.name, x.lr, x.beta1, x.beta2, x.adaptivity, x.damping) for x in SERVER_OPTIMIZERS.values()]
    return _filled(_table("server optimizer", "lr", "β₁", "β₂", "adaptivity τ", "damping"), rows)


def _objectives() -> Table:
    from fedmaestro.clients import OBJECTIVES

    rows = [(o.name, o.summary, o.source) for o in OBJECTIVES.values()]
    return _filled(_table("objective", "loss of a local step", "source"), rows)


def _models() -> Table:
    from fedmaestro.models import MODELS

    return _filled(_table("model", "what it is"), [(n, m.summary) for n, m in MODELS.items()])


def _datasets() -> Table:
    from fedmaestro.data import DATASETS

    return _filled(_table("dataset", "what it is"), [(n, d.summary) for n, d in DATASETS.items()])


def _tasks() -> Table:
    from fedmaestro.tasks.goal import TASKS

    return _filled(
        _table("task", "what is learnt", "metrics"), [(n, t.summary, " ".join(t.metrics)) for n, t in TASKS.items()]
    )


def _metrics() -> Table:
    from fedmaestro.tasks.metrics import METRICS

    rows = [(n, "higher" if m.higher_is_better else "lower", m.summary) for n, m in METRICS.items()]
    return _filled(_table("metric", "better", "what it is"), rows)


def _augmentations() -> Table:
    from fedmaestro.tasks.augment import AUGMENTATIONS

    return _filled(_table("augmentation", "what devices train on"), [(n, a.summary) for n, a in AUGMENTATIONS.items()])


def _partitions() -> Table:
    from fedmaestro.data import PARTITIONS

    return _filled(_table("partition", "who gets what"), [(n, p.summary) for n, p in PARTITIONS.items()])


def _selections() -> Table:
    from fedmaestro.fleet.selection import SELECTIONS

    rows = [(name, row.summary, row.source) for name, row in SELECTIONS.items()]
    return _filled(_table("selection", "who is asked to train", "source"), rows)


def _attacks() -> Table:
    from fedmaestro.fleet.attacks import ATTACKS

    rows = [(name, row.summary, row.source) for name, row in ATTACKS.items()]
    return _filled(_table("attack", "what attackers do", "source"), rows)


def _optimizers() -> Table:
    from fedmaestro.clients.optimizers import OPTIMIZERS

    return _filled(_table("optimizer", "local steps"), [(n, row.summary) for n, row in OPTIMIZERS.items()])


def _schedules() -> Table:
    from fedmaestro.clients.optimizers import SCHEDULES

    return _filled(_table("schedule", "learning rate"), [(n, row.summary) for n, row in SCHEDULES.items()])


def _trackers() -> Table:
    from fedmaestro.trackers import SUMMARIES

    return _filled(_table("tracker", "where it writes"), list(SUMMARIES.items()))


def _fleets() -> Table:
    from fedmaestro.fleet.tiers import FLEETS

    return _filled(_table("fleet", "tiers"), [(n, f.summary) for n, f in FLEETS.items()])


def _settings() -> Table:
    from fedmaestro.config.experiment import ExperimentConfig

    return _described(ExperimentConfig)


def _training_settings() -> Table:
    from fedmaestro.config.training import TrainingConfig

    return _described(TrainingConfig)


def _described(schema: type["Settings"]) -> Table:
    from fedmaestro.config.base import describe

    rows = [(setting.key, repr(setting.default), setting.meaning) for setting in describe(schema)]
    return _filled(_table("setting", "default", "meaning"), rows)


def main() -> None:
    """Entry point: user errors are one line on standard error and exit code 2; code 3: nothing was trained."""
    place_caches()
    tolerate_encodings()
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"fedmaestro: {one_line(error)}\n")
        sys.exit(2)
    except UntrainedError as error:
        sys.stderr.write(f"fedmaestro: {error}\n")
        sys.exit(3)


if __name__ == "__main__":
    main()
