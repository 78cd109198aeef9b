"""The terminal, or what stands in its place: a pipe that somebody closes, a log file, an encoding of few letters."""

import logging
import os
import sys

from rich.console import Console
from rich.text import Text

LEVELS = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class Terminal(Console):
    """A console that takes text as it is (names may look like markup), and outlives its reader (``| head -1``)."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(markup=False, emoji=False, quiet=quiet)

    def on_broken_pipe(self) -> None:
        """Say nothing any more; the work goes on."""
        self.quiet = True
        drop_output()


class LogLines(logging.Handler):
    """Writes the log to a terminal, above what is live there, one line for each message whatever the width."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        level = (f"{record.levelname:8} ", LEVELS.get(record.levelno, "blue"))
        self._console.print(Text.assemble(level, printable(record.getMessage())), soft_wrap=True)


def drop_output() -> None:
    """Let standard output go nowhere from now on, with what waits to be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def printable(text: str) -> str:
    """Return a text without what would control the terminal."""
    return "".join(x if x.isprintable() or x == "\n" else x.encode("unicode_escape").decode() for x in text)


def tolerate_encodings() -> None:
    """Let what the encoding of the output lacks be a question mark: no run is lost for a dot."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
