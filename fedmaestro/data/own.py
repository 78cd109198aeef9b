"""Data that users bring: arrays, tables, torch and Hugging Face datasets become one record of arrays.

What a dataset's function may return is ``FORM``. Shapes: ``N`` examples, ``L`` longest sequence, ``D`` values of a
regression, ``F`` columns.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmaestro import rng
from fedmaestro.data import cache
from fedmaestro.errors import UserError, check_name

Array = npt.NDArray[Any]

FORM = """a dictionary with
  x, y, groups                   inputs, targets and users of the training examples (groups may be left out)
  x_test, y_test, groups_test    the same of the test examples; left out, test_share (0.2) of the training examples
or with
  train, test                    torch datasets of (x, y) or (x, y, user), Hugging Face datasets, or pandas tables
  target, inputs, groups         which columns of these; inputs are all others by default
and perhaps
  task       classification, regression, next-token, sequence-to-sequence, or one of your own
  classes    how many, or their names in order, where the training examples do not have all of them
  padding    the token that fills up short sequences (0 for sequences of unequal length)
  standardize    True: numbers are shifted and scaled to mean 0 and standard deviation 1 over the training examples
x is an array or tensor (N, …), a tuple of several, or a list of token sequences; y is left out for next-token"""
"""What ``@extend.dataset`` functions return."""

_KEYS = (
    *("x", "y", "groups", "x_test", "y_test", "groups_test", "test_share"),
    *("train", "test", "target", "inputs", "task", "classes", "padding", "standardize"),
)
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """A row of ``DATASETS`` that user code has added."""

    name: str
    load: Callable[[], Any]
    """Returns ``FORM``."""
    task: str | None = None
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one split."""

    inputs: tuple[Array, ...]
    """Each ``(N, …)``: float32, uint8 (pixels, which become numbers from 0 to 1) or int64 (tokens)."""
    targets: Array
    """``(N,)`` int64 classes, ``(N, D)`` float32 values or ``(N, L)`` int64 tokens."""
    groups: Array | None
    """``(N,)`` int64, user of each example; None: there are none."""


@dataclass(frozen=True, kw_only=True)
class OwnDataset:
    """Data of a user's.

    Attributes:
        task: name of what is learnt.
        outputs: classes, size of the vocabulary, or values of a regression.
        classes: their names, in order; empty where they are numbers from 0 on, or no classes.
        users: names of the groups, in order.
        padding: token that does not count; None: there is none.
        standardized: whether numbers are brought to mean 0 and standard deviation 1.
        mean: of each input, what is subtracted, after scaling pixels to 0 … 1; broadcasts to an example.
        std: what it is divided by then.
        fingerprint: hash of the content.
    """

    name: str
    train: Examples
    test: Examples
    task: str
    outputs: int
    classes: tuple[str, ...]
    users: tuple[str, ...]
    padding: int | None
    standardized: bool
    mean: tuple[Array, ...]
    std: tuple[Array, ...]
    fingerprint: str


def own_dataset(row: OwnRow, fingerprint: str = "") -> OwnDataset:
    """Return the data of a row.

    Args:
        row: whose function is called, unless the cache has what is asked for.
        fingerprint: of the data that another process has made of this row.

    Raises:
        UserError: what the function returned is not ``FORM``.
    """
    if fingerprint and (found := _cached(fingerprint, row.name)) is not None:
        return found
    dataset = convert(row.name, row.load(), row.task)
    entry = _entry(dataset.fingerprint)
    return cache.fetch(entry, lambda folder: _store(folder, dataset), lambda folder: _read(folder, row.name))


def convert(name: str, returned: Any, task: str | None = None) -> OwnDataset:
    """Return what a dataset's function returned as arrays; UserError if it is not ``FORM``."""
    form = _as_form(name, returned)
    for key in form:
        check_name(f"key of dataset {name!r}", str(key), _KEYS)
    train, test = _splits(name, form)
    task = task or form.get("task")
    padding = form.get("padding")
    x, x_test, padding = _all_inputs(name, train[0], test[0] if test else None, padding)
    y, y_test = _column(name, train[1]), _column(name, test[1]) if test else None
    _check_lengths(name, "train", x, y, train[2])
    task = task or _task_of(x, y)
    groups, groups_test, users = _groups(name, train[2], test[2] if test else None, test is not None)
    if test is None:
        kept, held = _split(
            name, len(x[0]), y if task == "classification" else None, groups, form.get("test_share", 0.2)
        )
        x, x_test = tuple(a[kept] for a in x), tuple(a[held] for a in x)
        y, y_test = (None, None) if y is None else (y[kept], y[held])
        groups, groups_test = (None, None) if groups is None else (groups[kept], groups[held])
    else:
        assert x_test is not None
        _check_lengths(name, "test", x_test, y_test, test[2])
    for i, array in enumerate(x):
        if array.dtype != np.int64 and array.min() == array.max():
            what = "x" if len(x) == 1 else f"input {i} of x"
            raise _wrong(name, f"all numbers in {what} of the training examples are {array.flat[0]}: check the data")
    x, x_test, targets, targets_test, outputs, classes = _targets(
        name, task, x, x_test, y, y_test, padding, form.get("classes")
    )
    moments = [_moments(a, bool(form.get("standardize"))) for a in x]
    dataset = OwnDataset(
        name=name,
        train=Examples(inputs=x, targets=targets, groups=groups),
        test=Examples(inputs=x_test, targets=targets_test, groups=groups_test),
        task=task,
        outputs=outputs,
        classes=classes,
        users=users,
        padding=padding,
        standardized=bool(form.get("standardize")),
        mean=tuple(mean for mean, _ in moments),
        std=tuple(std for _, std in moments),
        fingerprint="",
    )
    return replace(dataset, fingerprint=_fingerprint(dataset))


# --- what was returned -------------------------------------------------------------------------------------------


def _wrong(name: str, why: str) -> UserError:
    return UserError(f"dataset {name!r}: {why}")


def _as_form(name: str, returned: Any) -> Mapping[str, Any]:
    if isinstance(returned, Mapping):
        return returned
    if isinstance(returned, tuple) and len(returned) == 2:
        return {"train": returned[0], "test": returned[1]}
    if _is_table(returned) or hasattr(returned, "__getitem__"):
        return {"train": returned}
    raise _wrong(name, f"its function returned {type(returned).__name__}, expected {FORM}")


Split = tuple[Any, Any, Any]
"""x, y, groups as they were given; y and groups may be None."""


def _splits(name: str, form: Mapping[str, Any]) -> tuple[Split, Split | None]:
    if "x" in form:
        if "x_test" not in form and ("y_test" in form or "groups_test" in form):
            raise _wrong(name, "there is y_test or groups_test, but no x_test")
        test = (form["x_test"], form.get("y_test"), form.get("groups_test")) if "x_test" in form else None
        return (form["x"], form.get("y"), form.get("groups")), test
    if "train" not in form:
        raise _wrong(name, f"it has the keys {', '.join(map(str, form)) or 'none'}, expected {FORM}")
    return (_columns(name, form, "train"), _columns(name, form, "test") if form.get("test") is not None else None)


def _columns(name: str, form: Mapping[str, Any], split: str) -> Split:
    """Return inputs, targets and users of a table or a dataset."""
    data = form[split]
    if _is_table(data):
        return _of_table(name, data, form, split)
    if hasattr(data, "column_names"):  # Hugging Face
        return _of_hub(name, data, form, split)
    try:
        items = [data[i] for i in range(len(data))]
    except TypeError:
        raise _wrong(name, f"{split} is {type(data).__name__}: give a dataset with a length, or arrays") from None
    if not items or not isinstance(items[0], tuple | list) or len(items[0]) not in (2, 3):
        raise _wrong(name, f"the examples of {split} are not (x, y) or (x, y, user)")
    x, y, *groups = zip(*items, strict=True)
    if isinstance(x[0], tuple):
        return tuple(_stacked(column) for column in zip(*x, strict=True)), _stacked(y), groups[0] if groups else None
    return _stacked(x), _stacked(y), groups[0] if groups else None


def _stacked(values: Sequence[Any]) -> Any:
    """Return examples as one array, or as the list that they are where their shapes differ."""
    arrays = [np.asarray(_plain(value)) for value in values]
    if len({a.shape for a in arrays}) == 1:
        return np.stack(arrays)
    return arrays


def _plain(value: Any) -> Any:
    """Return a tensor or a picture as an array, and whatever else as it is."""
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    if isinstance(value, dict) and value.get("bytes"):  # an image as parquet files hold it
        from fedmaestro.data.decode import decode

        return decode(value["bytes"], "RGB", "an image")
    if hasattr(value, "convert") and hasattr(value, "getbands"):  # PIL
        pixels = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return value


def _is_table(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "iloc")


def _target_of(name: str, columns: Sequence[str], form: Mapping[str, Any]) -> str:
    if (given := form.get("target")) is not None:
        check_name(f"column (target of dataset {name!r})", str(given), list(map(str, columns)))
        return str(given)
    for known in ("label", "labels", "target", "y", "class"):
        if known in columns:
            return known
    raise _wrong(name, f"which of the columns {', '.join(map(str, columns))} is the target? Give target='…'")


def _inputs_of(name: str, columns: Sequence[str], form: Mapping[str, Any], taken: set[str]) -> list[str]:
    given = form.get("inputs")
    if given is None:
        return [column for column in columns if column not in taken]
    wanted = [given] if isinstance(given, str) else list(given)
    for column in wanted:
        check_name(f"column (inputs of dataset {name!r})", str(column), list(map(str, columns)))
    return wanted


def _of_table(name: str, table: Any, form: Mapping[str, Any], split: str) -> Split:
    columns = [str(column) for column in table.columns]
    table = table.set_axis(columns, axis=1)
    target, users = _target_of(name, columns, form), form.get("groups")
    if users is not None:
        check_name(f"column (groups of dataset {name!r})", str(users), columns)
    wanted = _inputs_of(name, columns, form, {target, str(users)})
    blocks = []
    for column in wanted:
        values = table[column]
        if values.dtype.kind in "fiub":
            blocks.append(np.asarray(values, np.float32)[:, None])
        else:
            known = form["train"].set_axis(columns, axis=1)[column].astype(str)
            kinds = sorted(known.unique())
            if len(kinds) > 100:
                raise _wrong(
                    name,
                    f"column {column!r} has {len(kinds)} different values that are no numbers: leave it out of inputs, "
                    "or turn it into numbers",
                )
            blocks.append((values.astype(str).to_numpy()[:, None] == np.asarray(kinds)).astype(np.float32))
    if not blocks:
        raise _wrong(name, f"{split} has no input column besides {target!r}")
    return np.concatenate(blocks, axis=1), table[target].to_numpy(), None if users is None else table[users].to_numpy()


def _of_hub(name: str, data: Any, form: Mapping[str, Any], split: str) -> Split:
    columns = list(data.column_names)
    users = form.get("groups")
    target = None if form.get("task") == "next-token" else _target_of(name, columns, form)
    wanted = _inputs_of(name, columns, form, {str(target), str(users)})
    if not wanted:
        raise _wrong(name, f"{split} has no input column besides {target!r}")
    inputs = tuple(_stacked(list(data[column])) for column in wanted)
    if len(inputs) > 1 and all(isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype.kind in "fiub" for x in inputs):
        inputs = (np.stack([np.asarray(x, np.float32) for x in inputs], axis=1),)
    y = None if target is None else _stacked(list(data[target]))
    return inputs[0] if len(inputs) == 1 else inputs, y, None if users is None else list(data[users])


# --- inputs ------------------------------------------------------------------------------------------------------


def _all_inputs(
    name: str, train: Any, test: Any, padding: int | None
) -> tuple[tuple[Array, ...], tuple[Array, ...] | None, int | None]:
    """Return the inputs of both splits as arrays, sequences of one length, and the padding."""
    firsts, seconds = _several(train), None if test is None else _several(test)
    if seconds is not None and len(firsts) != len(seconds):
        raise _wrong(name, f"training examples have {len(firsts)} inputs, test examples {len(seconds)}")
    arrays: list[list[Array]] = []
    for i, x in enumerate(firsts):
        what = "x" if len(firsts) == 1 else f"input {i} of x"
        splits = [x] if seconds is None else [x, seconds[i]]
        if _is_ragged(splits):
            padding = 0 if padding is None else padding
            arrays.append(_padded(name, what, splits, padding))
            continue
        arrays.append([_numbers(name, what, split) for split in splits])
        shapes = [a.shape[1:] for a in arrays[-1]]
        if len(set(shapes)) > 1:
            raise _wrong(name, f"{what} has examples of shape {shapes[0]} to train, {shapes[1]} to test")
    return tuple(a[0] for a in arrays), None if seconds is None else tuple(a[1] for a in arrays), padding


def _several(x: Any) -> list[Any]:
    """Return the inputs of examples: of a tuple or a dictionary, several."""
    if isinstance(x, Mapping):
        return list(x.values())
    return list(x) if isinstance(x, tuple) else [x]


def _is_ragged(splits: Sequence[Any]) -> bool:
    """Return whether the examples are sequences of unequal length: in a list, or tokens that differ between splits."""
    if any(isinstance(x, list) and len({np.shape(_plain(row)) for row in x}) > 1 for x in splits):
        return True
    firsts = [np.asarray(_plain(x[0])) for x in splits if not _is_table(x) and len(x)]
    return len({a.shape for a in firsts}) > 1 and all(a.ndim == 1 and a.dtype.kind in "iu" for a in firsts)


def _padded(name: str, what: str, splits: Sequence[Any], padding: int) -> list[Array]:
    """Return token sequences of both splits filled up to the longest one."""
    both = [[np.asarray(_plain(row)) for row in x] for x in splits]
    rows = [row for part in both for row in part]
    if any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows if row.size or row.ndim != 1):
        raise _wrong(name, f"{what} has examples of unequal shape that are no token sequences: bring them to one shape")
    if any(bool((row == padding).any()) for row in rows):
        raise _wrong(
            name,
            f"{what} has sequences of unequal length, and {padding} is a token in some: it fills up the short ones, so "
            "number tokens from 1 on, or give another padding",
        )
    longest = max(map(len, rows), default=0)
    arrays = []
    for part in both:
        array = np.full((len(part), longest), padding, np.int64)
        for to, row in zip(array, part, strict=True):
            to[: len(row)] = row
        arrays.append(array)
    return arrays


def _numbers(name: str, what: str, x: Any) -> Array:
    """Return an input as uint8 pixels, int64 tokens or float32 numbers."""
    if _is_table(x):
        x = x.to_numpy()
    elif isinstance(x, list) and x and (hasattr(x[0], "detach") or hasattr(x[0], "getbands")):
        x = np.stack([_plain(row) for row in x])
    try:
        array = np.asarray(_plain(x))
    except ValueError as error:
        raise _wrong(name, f"{what} is no array: {error}") from None
    if array.ndim == 0 or len(array) == 0:
        raise _wrong(name, f"{what} holds no examples")
    if array.ndim == 1:
        array = array[:, None]
    if array.dtype.kind not in "fiub":
        kind = "text" if array.dtype.kind in "UST" or isinstance(array.ravel()[0], str) else f"{array.dtype}"
        raise _wrong(name, f"{what} holds {kind}: turn it into numbers, or into lists of tokens (integers)")
    if array.dtype == np.uint8 and array.ndim > 2:
        return array
    if array.dtype.kind in "iu" and array.ndim == 2:
        if array.min() < 0:
            raise _wrong(name, f"{what} holds the token {array.min()}: tokens are 0 or more; numbers must be floats")
        return array.astype(np.int64)
    numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        row = int(np.nonzero(~np.isfinite(numbers).reshape(len(numbers), -1).all(axis=1))[0][0])
        raise _wrong(
            name, f"{what} of example {row} holds a number that is not finite (NaN or infinite): fill or drop it"
        )
    return numbers


def _check_lengths(name: str, split: str, x: tuple[Array, ...], y: Array | None, groups: Any) -> None:
    counts = {f"x[{i}]" if len(x) > 1 else "x": len(a) for i, a in enumerate(x)}
    counts |= {} if y is None else {"y": len(y)}
    counts |= {} if groups is None else {"groups": len(groups)}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{key} has {n}" for key, n in counts.items())
        raise _wrong(name, f"the {split} examples differ in number: {said}")


def _moments(x: Array, standardize: bool) -> tuple[Array, Array]:
    """Return mean and standard deviation that inputs are brought to 0 and 1 by, shaped to broadcast to an example."""
    one = (1,) * (x.ndim - 1)
    if x.dtype == np.uint8:
        channels = x.shape[1] if x.ndim == 4 else 1
        rows = x.reshape(len(x), channels, -1)
        mean = np.array([rows[:, c].mean(dtype=np.float64) for c in range(channels)]) / 255
        std = np.array([rows[:, c].std(dtype=np.float64) for c in range(channels)]) / 255
        shape = (channels, *one[1:])
    elif standardize and x.dtype == np.float32:
        if x.ndim == 2:
            mean, std, shape = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64), x.shape[1:]
        else:
            mean, std, shape = np.array([x.mean(dtype=np.float64)]), np.array([x.std(dtype=np.float64)]), one
    else:
        return np.zeros(one, np.float32), np.ones(one, np.float32)
    std = np.where(std > 0, std, 1.0)
    return mean.reshape(shape).astype(np.float32), std.reshape(shape).astype(np.float32)


# --- targets and users -------------------------------------------------------------------------------------------


def _column(name: str, y: Any) -> Array | None:
    if y is None:
        return None
    if isinstance(y, list) and _is_ragged([y]):
        column = np.empty(len(y), dtype=object)
        column[:] = [np.asarray(_plain(row)) for row in y]
        return column
    array = np.asarray(_plain(y))
    if array.dtype.kind in "OT":
        missing = [i for i, value in enumerate(array.tolist()) if value is None or value != value]
        if missing:
            raise _wrong(name, f"y of example {missing[0]} is missing: fill or drop it")
        array = array.astype(str)
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind != "f" else array


def _task_of(x: tuple[Array, ...], y: Array | None) -> str:
    if y is None:
        return "next-token"
    if y.dtype.kind == "f":
        return "regression"
    tokens = y.ndim == 2 or (y.dtype == object and np.ndim(y[0]) == 1)
    return "sequence-to-sequence" if tokens and x[0].dtype == np.int64 else "classification"


def _targets(
    name: str,
    task: str,
    x: tuple[Array, ...],
    x_test: tuple[Array, ...],
    y: Array | None,
    y_test: Array | None,
    padding: int | None,
    classes: Any,
) -> tuple[tuple[Array, ...], tuple[Array, ...], Array, Array, int, tuple[str, ...]]:
    """Return inputs and targets of both splits, the number of outputs, and the names of classes."""
    if y is None or task == "next-token":
        if x[0].dtype != np.int64 or len(x) > 1 or x[0].shape[1] < 2:
            raise _wrong(name, "it has no y, and x holds no token sequences of two or more to predict the next one of")
        tokens, tokens_test = x[0], x_test[0]
        outputs = _vocabulary(name, classes, tokens, tokens_test)
        return (tokens[:, :-1],), (tokens_test[:, :-1],), tokens[:, 1:], tokens_test[:, 1:], outputs, _names(classes)
    if y_test is None:
        raise _wrong(name, "there is x_test, but no y_test")
    if y.dtype == object or task == "sequence-to-sequence":
        plain = object not in (y.dtype, y_test.dtype) and padding is None and y.shape[1:] == y_test.shape[1:]
        both = [y, y_test] if plain else _padded(name, "y", [y, y_test], 0 if padding is None else padding)
        one, two = (a.astype(np.int64) for a in both)
        outputs = _vocabulary(name, classes, one, two)
        return (*x, one[:, :-1]), (*x_test, two[:, :-1]), one[:, 1:], two[:, 1:], outputs, _names(classes)
    if y.dtype.kind == "f" and task != "classification":
        values, values_test = (a.astype(np.float32).reshape(len(a), -1) for a in (y, y_test))
        for split, found in (("training", values), ("test", values_test)):
            if not np.isfinite(found).all():
                row = int(np.nonzero(~np.isfinite(found).all(axis=1))[0][0])
                raise _wrong(name, f"y of {split} example {row} is not finite: fill or drop it")
        return x, x_test, values, values_test, values.shape[1], ()
    if task == "regression":
        return _targets(name, task, x, x_test, y.astype(float), y_test.astype(float), padding, classes)
    if y.ndim == 2:
        return x, x_test, y.astype(np.int64), y_test.astype(np.int64), int(max(y.max(), y_test.max())) + 1, ()
    labels, labels_test, count, names = _classes(name, y, y_test, classes)
    return x, x_test, labels, labels_test, count, names


def _vocabulary(name: str, classes: Any, *tokens: Array) -> int:
    used = max(int(a.max()) for a in tokens) + 1
    given = len(classes) if isinstance(classes, list | tuple) else classes
    if given is not None and used > given:
        raise _wrong(name, f"classes={given}, but there is a token {used - 1}")
    return int(used if given is None else given)


def _names(classes: Any) -> tuple[str, ...]:
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) else ()


def _classes(name: str, y: Array, y_test: Array, given: Any) -> tuple[Array, Array, int, tuple[str, ...]]:
    """Return labels from 0 on, their number, and the names of those that were none."""
    if y.dtype.kind == "f":
        y, y_test = y.astype(np.int64), y_test.astype(np.int64)
    if isinstance(given, int):
        found: Array = np.arange(given)
    else:
        found = np.asarray(given) if given is not None else np.unique(y)
    for split, labels in (("training", y), ("test", y_test)):
        if unknown := sorted(set(labels.tolist()) - set(found.tolist()), key=str):
            some = ", ".join(map(str, unknown[:5]))
            why = "of which there is no training example" if given is None else "which classes does not name"
            raise _wrong(name, f"the {split} examples have the class {some}, {why}: give classes, or check the data")
    if len(found) < 2:
        raise _wrong(name, f"all training examples have the class {found[0]}: there is nothing to tell apart")
    position = {value: i for i, value in enumerate(found.tolist())}
    mapped, mapped_test = (np.array([position[v] for v in labels.tolist()], np.int64) for labels in (y, y_test))
    plain = found.dtype.kind in "iu" and found.tolist() == list(range(len(found)))
    return mapped, mapped_test, len(found), () if plain else tuple(map(str, found.tolist()))


def _groups(name: str, train: Any, test: Any, has_test: bool) -> tuple[Array | None, Array | None, tuple[str, ...]]:
    if train is None:
        if test is not None:
            raise _wrong(name, "there is groups_test, but no groups")
        return None, None, ()
    values = np.asarray(_plain(train))
    users, codes = np.unique(values, return_inverse=True)
    names = tuple(map(str, users.tolist()))
    if not has_test or test is None:
        return codes.astype(np.int64), None, names
    position = {value: i for i, value in enumerate(users.tolist())}
    # A user without training examples is no device.
    known = np.array([position.get(value, -1) for value in np.asarray(_plain(test)).tolist()], np.int64)
    return codes.astype(np.int64), known, names


def _split(name: str, count: int, labels: Array | None, groups: Array | None, share: float) -> tuple[Array, Array]:
    """Return the indices to train on and to test on: the share of each user's examples, or of each class's."""
    if not 0 < share < 1:
        raise _wrong(name, f"test_share={share!r}: a number between 0 and 1")
    strata = groups if groups is not None else labels if labels is not None else np.zeros(count, np.int64)
    order = rng.generator(0, "own-test").permutation(count)
    keys = strata[order]
    held: list[Array] = []
    for value in np.unique(keys):
        members = order[keys == value]
        held.append(members[: round(share * len(members))])
    test = np.sort(np.concatenate(held))
    if len(test) == 0:
        raise _wrong(name, f"{count} examples are too few to hold out {share:g} of them: give x_test and y_test")
    return np.setdiff1d(np.arange(count), test), test


# --- the cache ---------------------------------------------------------------------------------------------------


def _arrays(dataset: OwnDataset, *, moments: bool = True) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        arrays |= {f"{split}_x{i}": x for i, x in enumerate(examples.inputs)} | {f"{split}_y": examples.targets}
        if examples.groups is not None:
            arrays[f"{split}_groups"] = examples.groups
    if moments:
        arrays |= {f"mean{i}": x for i, x in enumerate(dataset.mean)}
        arrays |= {f"std{i}": x for i, x in enumerate(dataset.std)}
    return arrays


def _meta(dataset: OwnDataset) -> dict[str, Any]:
    keys = ("task", "outputs", "classes", "users", "padding", "standardized")
    return {key: getattr(dataset, key) for key in keys}


def _fingerprint(dataset: OwnDataset) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, _meta(dataset)]).encode())
    # Without moments, which follow from the rest, rounded as this machine's processor does.
    for name, array in _arrays(dataset, moments=False).items():
        contiguous = np.ascontiguousarray(array)
        digest.update(f"{name}{contiguous.dtype.str}{contiguous.shape}".encode())
        digest.update(contiguous.data)
    return digest.hexdigest()


def _entry(fingerprint: str) -> Path:
    return cache.cache_root() / cache.DATA / f"own-{fingerprint[:32]}"


def _store(folder: Path, dataset: OwnDataset) -> None:
    for name, array in _arrays(dataset).items():
        np.save(folder / f"{name}.npy", array)
    meta = {**_meta(dataset), "inputs": len(dataset.train.inputs), "fingerprint": dataset.fingerprint}
    (folder / cache.META).write_text(json.dumps(meta), encoding="utf-8")


def _read(folder: Path, name: str) -> OwnDataset:
    meta = json.loads((folder / cache.META).read_bytes())

    def load(array: str) -> Array:
        return np.load(folder / f"{array}.npy", mmap_mode="r")  # type: ignore[no-any-return]

    def examples(split: str) -> Examples:
        groups = load(f"{split}_groups") if (folder / f"{split}_groups.npy").is_file() else None
        inputs = tuple(load(f"{split}_x{i}") for i in range(meta["inputs"]))
        return Examples(inputs=inputs, targets=load(f"{split}_y"), groups=groups)

    return OwnDataset(
        name=name,
        train=examples("train"),
        test=examples("test"),
        task=meta["task"],
        outputs=meta["outputs"],
        classes=tuple(meta["classes"]),
        users=tuple(meta["users"]),
        padding=meta["padding"],
        standardized=meta["standardized"],
        mean=tuple(load(f"mean{i}") for i in range(meta["inputs"])),
        std=tuple(load(f"std{i}") for i in range(meta["inputs"])),
        fingerprint=meta["fingerprint"],
    )


def _cached(fingerprint: str, name: str) -> OwnDataset | None:
    found = cache.read(_entry(fingerprint), lambda folder: _read(folder, name))
    return found if found is not None and found.fingerprint == fingerprint else None
