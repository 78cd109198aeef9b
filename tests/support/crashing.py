"""Runs that die at a given disk operation, and what a resume makes of them: ``python -m tests.support.crashing``.

Every process is a fork of one that has imported everything; what it does to the disk is counted, and at the operation
asked for it is killed by a signal that nothing can catch.
"""

import builtins
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "link", "symlink")
"""Functions of ``os`` that change the disk."""

SETTINGS = {
    "data.devices": 8,
    "train.devices-per-round": 4,
    "train.rounds": 3,
    "train.evaluate-every": 2,
    "model.name": "mlp",
    "data.device-test": 0.2,
}


def die_at(call: int, after: bool) -> Callable[[], int]:
    """Kill this process before or after the given operation; return a counter of those so far."""
    done = 0

    def wrap(function: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if not counts(*arguments, **options):
                return function(*arguments, **options)
            done += 1
            mine = done
            if mine == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if mine == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation

    def writes(_file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return any(letter in mode for letter in "wax+")

    for step in STEPS:
        setattr(os, step, wrap(getattr(os, step), lambda *_, **__: True))
    builtins.open = io.open = wrap(builtins.open, writes)  # type: ignore[misc]
    return lambda: done


def forked(work: Callable[[], None]) -> int:
    """Do some work in a fork; return its exit status (negative: the signal that ended it)."""
    if (pid := os.fork()) == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(out: Path, resume: bool = False) -> None:
    import fedmaestro

    fedmaestro.run(overrides=None if resume else SETTINGS, out=out, actors=0, resume=resume)


def files(folder: Path) -> list[str]:
    """Return the names of what is in a folder and below, without locks, which stay."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def main(folder: Path, every: int, first: int) -> None:
    """Print, as JSON, what came of a crash before and after every so many operations.

    Args:
        folder: an empty one; ``FEDMAESTRO_CACHE`` is set to one below it.
        every: how far apart they are.
        first: the first one.
    """
    train(folder / "warm")  # imports whatever there is to import, for all forks
    whole, counted = folder / "whole", folder / "counted"

    def count() -> None:
        done = die_at(0, after=False)
        train(whole)
        counted.write_text(str(done()))

    assert forked(count) == 0
    total = int(counted.read_text())
    expected = json.loads((whole / "summary.json").read_text())["model_sha256"]
    bad: list[str] = []
    points = [(call, after) for call in range(first, total + 1, every) for after in (False, True)]
    for call, after in points:
        out, cache = folder / f"{call}-{after}", folder / f"cache-{call}-{after}"
        os.environ["FEDMAESTRO_CACHE"] = str(cache)

        def crash(out: Path = out, call: int = call, after: bool = after) -> None:
            die_at(call, after)
            train(out)

        def again(out: Path = out) -> None:
            held = any((out / name).exists() for name in ("config.toml", "rounds.jsonl", "checkpoint"))
            train(out, resume=held)

        where = f"{'after' if after else 'before'} operation {call} of {total}"
        if (status := forked(crash)) not in (-signal.SIGKILL, 0):
            bad.append(f"{where}: the run ended with {status}")
        if forked(again) != 0:
            bad.append(f"{where}: no resume")
            continue
        if json.loads((out / "summary.json").read_text())["model_sha256"] != expected:
            bad.append(f"{where}: another model")
        if {*files(out)} != {*files(whole)}:
            bad.append(f"{where}: {sorted(set(files(out)) ^ set(files(whole)))} left or missing")
        bad += [f"{where}: {path.name} in the cache" for path in cache.rglob(".tmp-*")]
    print(json.dumps({"total": total, "tried": len(points), "bad": bad}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
