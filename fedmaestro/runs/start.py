"""From what the user gave (a file, overrides, a folder to go on in) to one validated configuration and its folder."""

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedmaestro.config.base import Schema, Settings, is_file_name, read
from fedmaestro.errors import UserError
from fedmaestro.extend import session_rows
from fedmaestro.places import absolute, new_folder
from fedmaestro.runs.code import Code, check_trust, gather, read_code
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
    for key, path in (("data.dir", data_dir), ("out", out)):
        if path is not None:
            changes[key] = str(path)
    if resume and source is None and changes.get("out"):
        own = RunFolder(absolute(str(changes["out"]))).config
        source = own if own.exists() else None
    config = read(schema, source, changes)
    if isinstance(source, str | Path) and config.get("use") and "use" not in changes:
        _check_use(str(config.get("use")), absolute(source).parent)
    if resume and config.get("out") is None:
        raise UserError("--resume needs the folder of the run: add --out DIR")
    return config


def _check_use(use: str, folder: Path) -> None:
    """Raise UserError where an experiment in a run folder names other code than this user's run has kept there."""
    if not RunFolder(folder).holds_run():
        return
    kept = read_code(folder)
    try:
        named = gather(use)
    except UserError:  # it is gone: nothing of it can run
        return
    if kept.difference(named):
        check_trust(folder)


def code_of(config: Settings, folder: Path | None = None, *, more: str = "") -> Code:
    """Return the user's code of a run.

    Args:
        config: names files and modules (``use``), and rows that may be of a script or a notebook.
        folder: of the run to go on with; None: a new one. Where its files are gone or nothing of the script is there
            any more, the folder's own copy is taken.
        more: other words that may name rows.

    Raises:
        UserError: it cannot be read, or is not what the run in ``folder`` was started with.
    """
    values = [more, *(value for value in config.flat().values() if isinstance(value, str))]
    rows = session_rows({word for value in values for word in value.split()})
    if folder is None:
        return gather(str(config.get("use")), rows)
    before = read_code(folder)
    files = [word for word in shlex.split(str(config.get("use"))) if is_file_name(word)]
    if not rows and not all(Path(word).is_file() for word in files):
        return before
    if not rows and before.object_digests and not files:
        return before
    now = gather(str(config.get("use")), rows)
    if changed := before.difference(now):
        raise UserError(
            f"{folder} was run with other code: {changed} ({folder / 'code'} has what was run): resume with the same "
            "code, or start a new run"
        )
    return now


def name_of(source: object, config: Settings) -> str:
    """Return what a run is called: by its file, else by its dataset."""
    return Path(source).stem if isinstance(source, str | Path) else str(config.get("data.name"))


def folder_of(config: Settings, name: str, label: str) -> RunFolder:
    """Return the folder that ``out`` names, or a new one (``places.new_folder``)."""
    if (out := config.get("out")) is not None:
        return RunFolder(Path(out))
    return RunFolder(new_folder(f"{name}-{label}"))


def check_folder(folder: RunFolder, config: Settings, resume: bool, free: Collection[str]) -> None:
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
    before, now = read(type(config), folder.config).flat(), config.flat()
    fixed = [key for key in now if key not in free and f"{key.partition('.')[0]}." not in free]
    if changed := [key for key in fixed if before[key] != now[key]]:
        key = changed[0]
        raise UserError(
            f"{folder.path} was run with {key}={before[key]!r}, not {now[key]!r}: "
            "resume with the same settings, or start a new run"
        )
