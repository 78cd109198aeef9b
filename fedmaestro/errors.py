"""Errors that a user can act on."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake in the input: one line that names the key, the value and what to do.

    The command line prints it and exits with code 2.
    """


class UntrainedError(RuntimeError):
    """No update counted, in a whole run or for too long: what was reached is no result.

    The command line prints it and exits with code 3.

    Args:
        message: on one line.
        path: the folder of the run, or of the comparison.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class DivergedError(RuntimeError):
    """A loss or a parameter is not finite any more."""


LINE = 300
"""Characters of a message that is printed on one line."""


def one_line(error: object, limit: int = LINE) -> str:
    """Return what an error says, on one line of at most ``limit`` characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= limit else f"{said[: limit - 1]}…"


def shown(value: object, limit: int = 80) -> str:
    """Return a value as messages show it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or something nested as deeply
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def unknown_name(kind: str, name: str, valid: Iterable[str], where: str = "") -> UserError:
    """Return the error for an unknown name, with the nearest valid one and the whole list.

    ``where`` is put behind the name, for example " in my.toml".
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {shown(name)}{where}: {hint}valid: {', '.join(names) or 'none'}")


def reason_of(error: Mapping[str, Any]) -> str:
    """Return what a pydantic error says, as the end of a sentence."""
    message = str(error["msg"])
    return message[:1].lower() + message[1:]


def check_name(kind: str, name: str, valid: Collection[str], where: str = "") -> None:
    """Raise ``unknown_name`` unless ``name`` is one of ``valid``."""
    if name not in valid:
        raise unknown_name(kind, name, valid, where)
