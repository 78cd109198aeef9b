"""Whose code a run folder holds: code that this user's runs have written is signed, other code is not run unasked.

The key lies in the user's configuration folder and never leaves it. A folder from elsewhere, or one whose code was
changed, has no signature of it; on another machine, the same user's folders have none either.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedmaestro.places import writable

P = ParamSpec("P")
R = TypeVar("R")

_trusting: ContextVar[bool] = ContextVar("trusting", default=False)

_LENGTH = 32
"""Bytes of a key."""
_TRIES = 100
_own_key = secrets.token_bytes(_LENGTH)


@contextmanager
def trusting(everything: bool) -> Iterator[None]:
    """Run the code of any folder inside, if ``everything`` is to be trusted."""
    token = _trusting.set(everything or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(token)


def honoured(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's own argument ``trust`` hold while it runs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(bool(kwargs.get("trust", False))):
            return function(*args, **kwargs)

    return call


def sign(content: bytes) -> str:
    """Return the signature of what this user writes."""
    return hmac.new(_key(), content, hashlib.sha256).hexdigest()


def is_trusted(content: bytes, signature: str) -> bool:
    """Return whether this user has written ``content``, or trusts everything at the moment."""
    return _trusting.get() or hmac.compare_digest(sign(content).encode(), signature.strip().encode(errors="replace"))


def _key() -> bytes:
    """Return the user's key, which is made the first time; where there is no folder for it, one of this process."""
    with contextlib.suppress(OSError, RuntimeError):  # pathlib's word for "no home folder"
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fedmaestro"
        path = folder / "signing.key"
        if not path.exists() and writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # of two processes that make one, the first wins
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(descriptor, secrets.token_bytes(_LENGTH))
                os.close(descriptor)
        for _ in range(_TRIES):
            if len(key := path.read_bytes()) >= _LENGTH:
                return key
            time.sleep(0.01)  # another process has made the file, and is about to write it
    return _own_key
