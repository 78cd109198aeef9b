"""Writing off the critical path: one thread, in order, and what fails there is said here."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Writer:
    """Runs writes one after the other beside the caller; at most one waits, so that nothing piles up.

    Use it as a context: at its end all is written, or what failed is raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._last: Future[None] | None = None

    def write(self, what: Callable[..., None], *arguments: Any) -> None:
        """Write once what came before is written; raises what that raised."""
        self.drain()
        self._last = self._pool.submit(what, *arguments)

    def drain(self) -> None:
        """Wait until all is written; raises what that raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._pool.shutdown(wait=True)
