"""What is tried next: the points of a grid, or what Optuna suggests. The same answers give the same questions."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from fedmaestro import rng
from fedmaestro.config.base import Value
from fedmaestro.config.search import Choices, Range, Space, grid
from fedmaestro.errors import UserError, check_name

SAMPLERS = ("grid", "optuna")


class Sampler:
    """Suggests the settings of one row's trials, one after the other."""

    @abstractmethod
    def ask(self) -> dict[str, Value]:
        """Return the settings of the next trial."""

    @abstractmethod
    def tell(self, value: float | None) -> None:
        """Say what became of the trial that was asked for last; None: it failed."""


class GridSampler(Sampler):
    """The points of a grid, in order.

    Args:
        points: of it.
    """

    def __init__(self, points: Sequence[dict[str, Value]]) -> None:
        self._points = iter(points)

    def ask(self) -> dict[str, Value]:
        return next(self._points)

    def tell(self, value: float | None) -> None:
        """Nothing depends on it."""


class OptunaSampler(Sampler):
    """Optuna's TPE (Bergstra et al., NeurIPS 2011) with its own defaults; a failed trial counts as infinitely bad.

    Args:
        space: what is searched.
        seed: of its draws.
        higher_is_better: of the value that is told.
    """

    def __init__(self, space: Space, seed: int, *, higher_is_better: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            direction="maximize" if higher_is_better else "minimize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self._space, self._worst = space, -math.inf if higher_is_better else math.inf

    def ask(self) -> dict[str, Value]:
        self._trial = self._study.ask()
        return {key: _suggested(self._trial, key, dimension) for key, dimension in self._space.items()}

    def tell(self, value: float | None) -> None:
        self._study.tell(self._trial, self._worst if value is None else value)


def _suggested(trial: Any, key: str, dimension: Choices | Range) -> Value:
    if isinstance(dimension, Choices):
        value: Value = trial.suggest_categorical(key, dimension.values)
        return value
    suggest = trial.suggest_int if dimension.whole else trial.suggest_float
    number: float = suggest(key, dimension.low, dimension.high, log=dimension.log)
    return number


def check_sampler(sampler: str) -> None:
    """Raise UserError for a sampler that there is not, or that lacks its package."""
    check_name("--sampler", sampler, SAMPLERS)
    if sampler == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError("--sampler optuna needs Optuna: pip install 'fedmaestro[sweep]'") from None


def budget(spaces: dict[str, Space], sampler: str, trials: int | None) -> int:
    """Return the trials of every row: as many for each.

    Args:
        spaces: what is searched, by row.
        sampler: one of ``SAMPLERS``.
        trials: as asked for; None: all points of the rows' grids.

    Raises:
        UserError: rows would get different numbers of trials.
    """
    if trials is not None and trials < 1:
        raise UserError(f"--trials {trials}: at least one is needed")
    if sampler == "optuna":
        if trials is None:
            raise UserError("--sampler optuna: say how many trials each row gets (--trials N)")
        return trials
    sizes = {row: len(grid(space)) for row, space in spaces.items()}
    least, most = min(sizes, key=lambda row: sizes[row]), max(sizes, key=lambda row: sizes[row])
    if trials is None and sizes[least] < sizes[most]:
        raise UserError(
            f"row {most!r} has a grid of {sizes[most]} and row {least!r} one of {sizes[least]}: every row gets the "
            f"same number of trials: add --trials N (at most {sizes[least]}: of larger grids as many points are drawn "
            "by the seed), or declare as many values for each"
        )
    if trials is not None and trials > sizes[least]:
        raise UserError(f"--trials {trials}: row {least!r} has a grid of {sizes[least]} only: add values, or lower it")
    return trials or sizes[least]


def points_of(space: Space, trials: int, seed: int) -> list[dict[str, Value]]:
    """Return the points of a grid that are tried: all, or as many as ``seed`` draws without replacement, in order."""
    points = grid(space)
    drawn = rng.generator(seed, "tune").choice(len(points), trials, replace=False)
    return [points[i] for i in sorted(drawn.tolist())]


def sampler_of(space: Space, sampler: str, trials: int, seed: int, *, higher_is_better: bool) -> Sampler:
    """Return a row's sampler at its start; rows that search the same are asked for the same, as far as they answer so.

    Args:
        space: what is searched.
        sampler: one of ``SAMPLERS``.
        trials: how many there will be.
        seed: the experiment's.
        higher_is_better: of the value that is told.
    """
    if sampler == "grid":
        return GridSampler(points_of(space, trials, seed))
    return OptunaSampler(space, rng.derived_seed(seed, "tune"), higher_is_better=higher_is_better)
