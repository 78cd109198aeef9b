"""Ctrl-C as a wish to stop: the first one lets the work end in order, a second one interrupts at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (Ctrl-C, or the runtime ended)."""


@contextmanager
def interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set ``stop``; outside of the main thread, which gets no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
