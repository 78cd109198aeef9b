"""Ctrl-C, and what schedulers send, as a wish to stop: the first lets the work end in order, a second interrupts."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C; the end of a job's time; the end of a terminal."""

_ACTION_BYTES = 512
"""More than C's ``struct sigaction`` has on any system."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM, SIGHUP, or the runtime ended)."""


@contextmanager
def interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Let the first signal set ``stop``, and a second one raise KeyboardInterrupt.

    Outside of the main thread, which gets no signals, nothing changes; nor for a signal that is ignored (``nohup``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def handler(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        for number in heard:
            signal.signal(number, signal.default_int_handler)

    heard = [number for number, before in previous.items() if before is not signal.SIG_IGN and before is not None]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, previous[number])


@contextmanager
def signals_kept() -> Iterator[None]:
    """Let whoever handles signals handle them afterwards too.

    Ray's C++ part takes SIGTERM over, prints its stack and aborts. Python restores handlers in the main thread only,
    where this may not be.
    """
    try:
        action = ctypes.CDLL(None).sigaction
    except (OSError, AttributeError):
        yield
        return
    saved = {number: ctypes.create_string_buffer(_ACTION_BYTES) for number in SIGNALS}
    for number, buffer in saved.items():
        action(int(number), None, buffer)
    try:
        yield
    finally:
        for number, buffer in saved.items():
            with contextlib.suppress(OSError):
                action(int(number), buffer, None)
