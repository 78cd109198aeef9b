"""Why an update does not count: one record of a failure, with its kind, wherever it was found out."""

from dataclasses import dataclass

from fedmaestro.errors import DivergedError

KINDS: dict[str, str] = {
    "error": "the device's training raised an error",
    "not-finite": "a loss or a number of the update is infinite or not a number",
    "too-large": "the update is longer than train.max-update-norm allows",
    "malformed": "the reply lacks something, or has something of another type",
    "devices": "the reply is about other devices than those that were asked",
    "tensors": "the update has other tensors, shapes or types than what was sent",
    "host": "every host that was asked failed",
    "late": "no reply came in time",
}
"""What each kind means; the first three are found out where a device trains, the next three in what a host replies."""


@dataclass(frozen=True)
class Failure:
    """Why nothing came of a device."""

    kind: str
    """One of ``KINDS``."""
    reason: str


class RejectedError(ValueError):
    """An update, or a reply, is not what it must be.

    Args:
        kind: one of ``KINDS``.
        reason: on one line.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.failure = Failure(kind, reason)


def failure_of(error: Exception, reason: str) -> Failure:
    """Return the failure of a device whose training raised ``error``."""
    if isinstance(error, RejectedError):
        return error.failure
    return Failure("not-finite" if isinstance(error, DivergedError) else "error", reason)
