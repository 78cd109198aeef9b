"""MkDocs hook: the reference pages that follow from the code, made while the site is built."""

from collections.abc import Iterable
from typing import Any

import click
import typer
from mkdocs.structure.files import File, Files

from fedmaestro.cli import app
from fedmaestro.config.base import Settings, describe
from fedmaestro.config.experiment import ExperimentConfig
from fedmaestro.config.training import TrainingConfig


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {"commands": commands(), "settings": settings(), "rows": rows()}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def commands() -> str:
    """Return what each command does and takes, as ``--help`` says it."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    parts = ["# Commands", "`fedmaestro COMMAND --help` shows the same in the terminal."]
    for name, command in group.commands.items():
        parts += [f"## fedmaestro {name}", command.help or ""]
        taken = [(_usage(parameter), getattr(parameter, "help", "") or "") for parameter in command.params]
        parts.append(_table(("argument or option", "meaning"), taken))
    return "\n\n".join(parts)


def _usage(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        return f"`{(parameter.name or '').upper()}`"
    word = "" if isinstance(parameter, click.Option) and parameter.is_flag else f" {parameter.make_metavar(_CONTEXT)}"
    return f"`{', '.join(parameter.opts)}{word}`"


_CONTEXT = click.Context(click.Command("fedmaestro"))


def settings() -> str:
    """Return every setting with its default."""
    parts = [
        "# Settings",
        "An experiment's TOML has a table for each first word: `train.rounds` is `rounds` below `[train]`. `--set` and "
        "Flower's run config take the dotted names. `fedmaestro list settings` shows the same.",
        "## Of an experiment",
        _settings(ExperimentConfig),
        "## Of a training on one machine",
        _settings(TrainingConfig),
    ]
    return "\n\n".join(parts)


def _settings(schema: type[Settings]) -> str:
    return _table(
        ("setting", "default", "meaning"), [(f"`{x.key}`", f"`{x.default!r}`", x.meaning) for x in describe(schema)]
    )


def rows() -> str:
    """Return the tables of everything that a setting can name."""
    from fedmaestro.clients import OBJECTIVES
    from fedmaestro.clients.optimizers import OPTIMIZERS, SCHEDULES
    from fedmaestro.data import DATASETS, PARTITIONS
    from fedmaestro.fleet.attacks import ATTACKS
    from fedmaestro.fleet.selection import SELECTIONS
    from fedmaestro.fleet.tiers import FLEETS
    from fedmaestro.models import MODELS
    from fedmaestro.strategies import AGGREGATIONS, SERVER_STEPS, STRATEGIES
    from fedmaestro.tasks.augment import AUGMENTATIONS
    from fedmaestro.tasks.goal import TASKS
    from fedmaestro.tasks.metrics import METRICS
    from fedmaestro.trackers import SUMMARIES

    tables: dict[str, tuple[str, dict[str, Any]]] = {
        "Strategies": ("train.strategy", STRATEGIES),
        "Objectives": ("train.objective", OBJECTIVES),
        "Aggregations": ("train.aggregation", AGGREGATIONS),
        "Server steps": ("server.steps", SERVER_STEPS),
        "Local optimisers": ("train.optimizer", OPTIMIZERS),
        "Schedules": ("train.schedule", SCHEDULES),
        "Selections": ("train.selection", SELECTIONS),
        "Models": ("model.name", MODELS),
        "Datasets": ("data.name", DATASETS),
        "Partitions": ("data.partition", PARTITIONS),
        "Augmentations": ("data.augment", AUGMENTATIONS),
        "Tasks": ("data.task", TASKS),
        "Metrics": ("data.metrics", METRICS),
        "Fleets": ("fleet.preset", FLEETS),
        "Attacks": ("fleet.attack", ATTACKS),
    }
    parts = [
        "# Rows",
        "What settings can name; `fedmaestro list KIND` shows the same, with `--use` also your own rows.",
    ]
    for heading, (setting, table) in tables.items():
        listed = [(f"`{name}`", row.summary, getattr(row, "source", "")) for name, row in table.items()]
        parts += [f"## {heading}", f"`{setting}`", _table(("name", "what it is", "source"), listed)]
    parts += ["## Trackers", "`--track`", _table(("name", "where it writes"), SUMMARIES.items())]
    return "\n\n".join(parts)


def _table(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *escaped])
