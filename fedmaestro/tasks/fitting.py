"""A model for a task: made for the shapes of its examples, and tried on some, before anything starts."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedmaestro.errors import UserError
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.shape import example_inputs
from fedmaestro.runs.code import located
from fedmaestro.tasks.task import Task

_TRIED = 2


def fitted(task: Task, make: Callable[[Task], Architecture]) -> tuple[Architecture, Task]:
    """Return the architecture for the examples of a task, and the task with the examples as that takes them.

    Examples ``(H, W)`` are given as pictures ``(1, H, W)`` to models that can be made for these only.

    Args:
        task: what is learnt.
        make: returns the architecture for a task.

    Raises:
        UserError: the model cannot be made, fails on an example, or puts out something else than the task needs.
    """
    try:
        return _tried(task, make(task)), task
    except UserError as error:
        picture = task.with_channel()
        if picture is None:
            raise
        try:
            return _tried(picture, make(picture)), picture
        except UserError:
            raise error from None


def _tried(task: Task, architecture: Architecture) -> Architecture:
    shapes = " and ".join(f"{x.shape} {x.dtype}" for x in task.inputs)
    what = f"model {architecture.name!r} for examples {shapes} and {task.num_classes} outputs"
    try:
        _ = architecture.full
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be made: {located(error)}") from None
    if not architecture.own:
        _check_kind(what, task, architecture)
        return architecture
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model = architecture.measurable()
            outputs = task.goal.outputs(model(*example_inputs(task.inputs, _TRIED)))
    except Exception as error:
        raise UserError(f"{what} fails on an example: {located(error)}") from None
    _check_outputs(what, task, outputs)
    return architecture


def _check_kind(what: str, task: Task, architecture: Architecture) -> None:
    """Refuse examples that a built-in model is not made for."""
    translates = architecture.name.startswith("transformer")
    pair = len(task.inputs) == 2 and all(x.dtype == "int64" for x in task.inputs)
    if translates != pair or (not translates and (len(task.inputs) > 1 or task.inputs[0].dtype == "int64")):
        needs = "two sequences of tokens" if translates else "one input of numbers"
        raise UserError(f"{what}: it takes {needs}: choose another model.name, or bring one of your own")


def _check_outputs(what: str, task: Task, outputs: Tensor) -> None:
    """Refuse outputs that the loss would take for something else, or fail on in every device."""
    got, last, targets = tuple(outputs.shape), task.num_classes, task.goal.targets
    wanted = (_TRIED, "T", last) if targets == "tokens" else (_TRIED, last)
    if targets == "values" and got == (_TRIED,) and last == 1:
        return
    if len(got) != len(wanted) or got[0] != _TRIED or got[-1] != last:
        shape = ", ".join(map(str, wanted))
        raise UserError(f"{what} puts out {got} for {_TRIED} examples: task {task.goal.name!r} needs ({shape})")
