"""Says when a round takes far longer than its messages should: a host that hangs looks like one that works."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fedmaestro")

FACTOR = 10
"""Times the predicted duration that a round may take before anything is said."""

LEAST_SECONDS = 30.0
"""Nothing is said before."""


class Watched:
    """What is known of the exchange that is watched.

    Args:
        what: it is.
        replies: how many are waited for.
    """

    def __init__(self, what: str, replies: int) -> None:
        self._what, self._replies = what, replies
        self._here, self._began = 0, time.monotonic()
        self._last = self._began

    def replied(self) -> None:
        """Take note of a reply."""
        self._here, self._last = self._here + 1, time.monotonic()

    def complaint(self, predicted: float) -> str:
        """Return what to say of it."""
        now = time.monotonic()
        return (
            f"{self._what} has taken {now - self._began:.0f} s, {predicted:.1f} s were predicted: {self._here} of "
            f"{self._replies} replies are here, and {now - self._last:.0f} s went by without one (a limit: "
            "train.reply-timeout-seconds)"
        )


@contextmanager
def watched(what: str, replies: int, predicted: float | None) -> Iterator[Watched]:
    """Warn when what is inside takes ``FACTOR`` times as long as predicted, and again each time that doubles.

    Args:
        what: it is, for the message.
        replies: that are waited for.
        predicted: seconds; None: it is not known, and nothing is said.
    """
    this, over = Watched(what, replies), threading.Event()

    def watch(seconds: float) -> None:
        wait = seconds
        while not over.wait(min(wait, threading.TIMEOUT_MAX)):
            log.warning("%s", this.complaint(predicted or 0.0))
            wait, seconds = seconds, 2 * seconds

    if predicted is None or not replies:
        yield this
        return
    thread = threading.Thread(
        target=watch, args=(max(FACTOR * predicted, LEAST_SECONDS),), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield this
    finally:
        over.set()
        thread.join()
