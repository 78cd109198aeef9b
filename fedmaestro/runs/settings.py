"""From what the user gave (a file, overrides, a folder to go on in) to one validated configuration and its folder."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedmaestro.config.experiment import Schema, flatten, load
from fedmaestro.errors import UserError
from fedmaestro.runs.folder import RunFolder, holds_a_run


def resolve(
    schema: type[Schema],
    source: str | Path | Schema | None,
    overrides: Mapping[str, Any] | None,
    data_dir: str | Path | None,
    out: str | Path | None,
    resume: bool,
) -> Schema:
    """Return the configuration of a run.

    Args:
        schema: what ``source`` is written in; has ``out`` and ``data.dir``.
        source: TOML file or configuration; None: the defaults, or when resuming the folder's own configuration.
        overrides: dotted settings.
        data_dir: ``data.dir``.
        out: the run's folder.
        resume: whether to go on with the run in the folder, which must be named then.

    Raises:
        UserError: unreadable or invalid settings, ``resume`` without a folder.
    """
    changes = dict(overrides or {})
    if data_dir is not None:
        changes["data.dir"] = str(data_dir)
    if out is not None:
        changes["out"] = str(out)
    if changes.get("out"):
        changes["out"] = str(Path(str(changes["out"])).expanduser())
    if isinstance(source, schema):
        config = load(schema, None, flatten(source.model_dump(by_alias=True)) | changes)
    else:
        path = source if isinstance(source, str | Path) else None
        own = RunFolder(Path(str(changes.get("out", "")))).config
        config = load(schema, own if resume and path is None and own.exists() else path, changes)
    if resume and not config.model_dump()["out"]:
        raise UserError("--resume needs the folder of the run: add --out DIR")
    return config


def prepare_folder(folder: RunFolder, config: Schema, resume: bool, free: Collection[str]) -> None:
    """Check that the run may use ``folder``; nothing is written.

    Args:
        folder: new, or that of the run to go on with.
        config: the run's settings.
        resume: whether to go on.
        free: settings, or tables with a dot at the end, that may differ in a continuation.

    Raises:
        UserError: it holds another run, cannot be written, or (resuming) holds none or one of another configuration.
    """
    folder.check_usable()
    if not resume:
        if folder.holds_run():
            raise UserError(holds_a_run(folder.path))
        return
    if not folder.config.exists():
        raise UserError(f"{folder.path} holds no run to resume: leave --resume out")
    before, now = (flatten(c.model_dump(by_alias=True)) for c in (load(type(config), folder.config), config))
    fixed = [key for key in now if key not in free and f"{key.partition('.')[0]}." not in free]
    if changed := [key for key in fixed if before[key] != now[key]]:
        key = changed[0]
        raise UserError(
            f"{folder.path} was run with {key}={before[key]!r}, not {now[key]!r}: "
            "resume with the same settings, or start a new run"
        )
