"""Replies as broken and hostile hosts could send them: what each does to an honest one, and what must come of it."""

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

Change = Callable[[RecordDict], None]


@dataclass(frozen=True)
class Hostile:
    """One kind of bad reply."""

    name: str
    change: Change
    """Of the content of an honest reply to a cohort."""
    kind: str
    """Of the failure that it must be; empty: what is changed is nothing the server looks at."""


def tampered(reply: Message, change: Change) -> Message:
    """Return a copy of a reply with ``change`` made to its content."""
    copy: Message = pickle.loads(pickle.dumps(reply))
    change(copy.content)
    return copy


def _array(content: RecordDict, kind: str = "sums") -> tuple[ArrayRecord, str]:
    record = content.array_records[kind]
    # Not a square one: transposed, it would be another that could be.
    return record, max(record, key=lambda name: (len({*record[name].shape}) > 1, len(record[name].data)))


def _values(change: Callable[[np.ndarray], Any], every: bool = False) -> Change:
    def edit(content: RecordDict) -> None:
        record, name = _array(content)
        for each in list(record) if every else [name]:
            record[each] = Array(np.asarray(change(record[each].numpy().copy())))

    return edit


def _put(value: float) -> Change:
    def one(x: np.ndarray) -> np.ndarray:
        x.reshape(-1)[0] = value
        return x

    return _values(one)


def _raw(change: Callable[[Array], Array]) -> Change:
    def edit(content: RecordDict) -> None:
        record, name = _array(content)
        record[name] = change(record[name])

    return edit


def _pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def _header(array: Array) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)})
    return file.getvalue() + array.data[128:]


def _record(edit: Callable[[ArrayRecord, str], None]) -> Change:
    return lambda content: edit(*_array(content))


def _rename(record: ArrayRecord, name: str) -> None:
    record["another"] = record.pop(name)


def _drop(record: ArrayRecord, name: str) -> None:
    del record[name]


def _more(record: ArrayRecord, name: str) -> None:
    record["another"] = record[name]


def _swap(record: ArrayRecord, name: str) -> None:
    other = min(record, key=lambda each: len(record[each].data))
    record[name], record[other] = record[other], record[name]


def _state(content: RecordDict) -> None:
    content["other"] = content["sums"]


def _without(name: str) -> Change:
    return lambda content: content.pop(name)


def _clear(content: RecordDict) -> None:
    for name in list(content):
        del content[name]


def _as(name: str, record: Any) -> Change:
    def edit(content: RecordDict) -> None:
        del content[name]
        content[name] = record

    return edit


def _metric(key: str, change: Callable[[Any], Any]) -> Change:
    def edit(content: RecordDict) -> None:
        record = content.metric_records["metrics"]
        record[key] = change(record[key])

    return edit


def _no_metric(key: str) -> Change:
    return lambda content: content.metric_records["metrics"].pop(key)


def _rows(devices: Callable[[list[int]], list[int]]) -> Change:
    """Change the devices, with as many rows of everything else."""

    def edit(content: RecordDict) -> None:
        record = content.metric_records["metrics"]
        new = devices(list(record["device"]))  # type: ignore[arg-type]
        record["device"] = new
        for key in ("loss", "norm"):
            record[key] = [record[key][0]] * len(new)  # type: ignore[index]

    return edit


def _failures(**columns: list[Any]) -> Change:
    return lambda content: content.config_records["failures"].update(columns)


def _fail_first(content: RecordDict) -> None:
    first = content.metric_records["metrics"]["device"][0]  # type: ignore[index]
    content.config_records["failures"].update({"device": [first], "kind": ["error"], "reason": ["because"]})


def _extra_metric(key: str, value: Any) -> Change:
    return lambda content: content.metric_records["metrics"].update({key: value})


def _probes(content: RecordDict) -> None:
    content.array_records["probes"]["fc1"] = Array(np.full((3, 2), np.nan))


def _controls(content: RecordDict) -> None:
    content["controls"] = ArrayRecord({"0/fc1.u": Array(np.zeros((2, 2)))})


NUMBERS = tuple(
    Hostile(f"{value} in a tensor", _put(value), "not-finite") for value in (math.nan, math.inf, -math.inf)
) + tuple(Hostile(f"{value:g} in a tensor", _put(value), "too-large") for value in (1e12, -1e12, 1e30, -1e38))

TRAINING: tuple[Hostile, ...] = (
    *NUMBERS,
    Hostile("every number NaN", _values(lambda x: x * math.nan, every=True), "not-finite"),
    Hostile("every number × 1e8", _values(lambda x: (x * 1e8).astype(x.dtype), every=True), "too-large"),
    Hostile("every number × -1e8", _values(lambda x: (x * -1e8).astype(x.dtype), every=True), "too-large"),
    Hostile("noise of norm 1e9", _values(lambda x: (x + 1e9).astype(x.dtype)), "too-large"),
    Hostile("a tensor renamed", _record(_rename), "tensors"),
    Hostile("a tensor missing", _record(_drop), "tensors"),
    Hostile("a tensor more", _record(_more), "tensors"),
    Hostile("two tensors swapped", _record(_swap), "tensors"),
    Hostile("no tensors", lambda content: content.array_records["sums"].clear(), "tensors"),
    Hostile("a state more", _state, "tensors"),
    Hostile("no state", _without("sums"), "tensors"),
    Hostile("a tensor transposed", _values(lambda x: np.ascontiguousarray(x.T)), "tensors"),
    Hostile("a row less", _values(lambda x: x[:-1]), "tensors"),
    Hostile("a row more", _values(lambda x: np.concatenate([x, x[:1]])), "tensors"),
    Hostile("one row, to be broadcast", _values(lambda x: x[:1]), "tensors"),
    Hostile("a scalar", _values(lambda x: x.reshape(-1)[0]), "tensors"),
    Hostile("one number", _values(lambda x: x.reshape(-1)[:1]), "tensors"),
    Hostile("nothing in a tensor", _values(lambda x: x[:0]), "tensors"),
    Hostile("a dimension more", _values(lambda x: x[None]), "tensors"),
    Hostile("flattened", _values(lambda x: x.reshape(-1)), "tensors"),
    *(
        Hostile(f"as {kind}", _values(lambda x, kind=kind: x.astype(kind)), "tensors")
        for kind in ("bool", "int8", "int64", "float16", "complex64")
    ),
    Hostile(
        "float64 for float32, or the reverse", _values(lambda x: x.astype("f4" if x.itemsize == 8 else "f8")), "tensors"
    ),
    Hostile("objects", _raw(lambda x: Array(x.dtype, x.shape, x.stype, _pickled())), "malformed"),
    Hostile(
        "half of the bytes", _raw(lambda x: Array(x.dtype, x.shape, x.stype, x.data[: len(x.data) // 2])), "malformed"
    ),
    Hostile("no bytes", _raw(lambda x: Array(x.dtype, x.shape, x.stype, b"")), "malformed"),
    Hostile("random bytes", _raw(lambda x: Array(x.dtype, x.shape, x.stype, b"\x00\x93NUM" * 40)), "malformed"),
    Hostile("a pickle", _raw(lambda x: Array(x.dtype, x.shape, x.stype, pickle.dumps([1, 2]))), "malformed"),
    Hostile("a shape of 2^60 numbers", _raw(lambda x: Array(x.dtype, x.shape, x.stype, _header(x))), "malformed"),
    Hostile("another serialisation", _raw(lambda x: Array(x.dtype, x.shape, "torch.tensor", x.data)), "malformed"),
    Hostile("characters", _values(lambda x: np.full(x.shape, "a")), "malformed"),
    Hostile("an empty reply", _clear, "malformed"),
    Hostile("no metrics", _without("metrics"), "malformed"),
    Hostile("metrics of another record", _as("metrics", ConfigRecord({"device": [1]})), "malformed"),
    Hostile("tensors in place of metrics", _as("metrics", ArrayRecord({})), "malformed"),
    Hostile("metrics in place of tensors", _as("sums", MetricRecord({"a": 1})), "tensors"),
    Hostile("no failures", _without("failures"), "malformed"),
    Hostile("failures of another record", _as("failures", MetricRecord({"device": [1]})), "malformed"),
    Hostile("no probes", _without("probes"), "malformed"),
    *(Hostile(f"no {key}", _no_metric(key), "malformed") for key in ("device", "loss", "norm", "seconds")),
    Hostile("a loss alone", _metric("loss", lambda x: x[0]), "malformed"),
    Hostile("losses as integers", _metric("loss", lambda x: [1] * len(x)), "malformed"),
    Hostile("devices as numbers", _metric("device", lambda x: [float(d) for d in x]), "malformed"),
    Hostile("a loss less", _metric("loss", lambda x: x[:-1]), "malformed"),
    Hostile("a loss more", _metric("loss", lambda x: [*x, 1.0]), "malformed"),
    Hostile("loss NaN", _metric("loss", lambda x: [math.nan, *x[1:]]), "not-finite"),
    Hostile("loss inf", _metric("loss", lambda x: [math.inf, *x[1:]]), "not-finite"),
    *(
        Hostile(f"norm {norm}", _metric("norm", lambda x, norm=norm: [norm, *x[1:]]), "too-large")
        for norm in (math.nan, math.inf, -1.0, 1e12)
    ),
    *(
        Hostile(f"seconds {seconds}", _metric("seconds", lambda _, seconds=seconds: seconds), "malformed")
        for seconds in (math.nan, math.inf, -1.0, 3)
    ),
    Hostile("10,000 devices", _rows(lambda own: list(range(10_000))), "devices"),
    Hostile("no device", _rows(lambda _: []), "devices"),
    Hostile("a device less", _rows(lambda own: own[:-1]), "devices"),
    Hostile("a device twice", _rows(lambda own: [own[0], *own]), "devices"),
    Hostile("another device", _rows(lambda own: [999, *own[1:]]), "devices"),
    Hostile("a negative device", _rows(lambda own: [-1, *own[1:]]), "devices"),
    Hostile("a device of 2^62", _rows(lambda own: [2**62, *own[1:]]), "devices"),
    Hostile("a device that trained and failed", _fail_first, "devices"),
    Hostile("failures of others", _failures(device=[999], kind=["error"], reason=["x"]), "devices"),
    Hostile("a failure without a reason", _failures(device=[999], kind=["error"], reason=[]), "malformed"),
    Hostile("failures as text", _failures(device=["1"], kind=["error"], reason=["x"]), "malformed"),
    Hostile("probes that nobody asked for", _probes, "tensors"),
    Hostile("control variates that nobody asked for", _controls, "devices"),
    # Nothing that the server would believe.
    *(
        Hostile(f"a weight of {weight}", _extra_metric("weight", weight), "")
        for weight in (-1.0, 0.0, math.nan, 1e30, 100.0)
    ),
    Hostile("examples", _extra_metric("examples", [-5, 10**12]), ""),
)


def _sums(change: Callable[[np.ndarray], Any]) -> Change:
    def edit(content: RecordDict) -> None:
        record = content.array_records["sums"]
        for name in list(record):
            record[name] = Array(np.asarray(change(record[name].numpy().copy())))

    return edit


def _rename_sums(content: RecordDict) -> None:
    record = content.array_records["sums"]
    for name in list(record):
        record[f"{name}-other"] = record.pop(name)


EVALUATION: tuple[tuple[str, Change], ...] = (
    ("no targets", _metric("examples", lambda _: 0)),
    ("a negative number of targets", _metric("examples", lambda _: -5)),
    ("more targets than there are", _metric("examples", lambda n: n + 1)),
    ("targets as a number with a point", _metric("examples", float)),
    ("a loss as an integer", _metric("loss-sum", lambda _: 3)),
    ("no loss", _no_metric("loss-sum")),
    ("no seconds", _no_metric("seconds")),
    ("seconds NaN", _metric("seconds", lambda _: math.nan)),
    ("more right than there are", _sums(lambda x: x + 10**6)),
    ("fewer right than none", _sums(lambda x: x - 10**6)),
    ("sums of another shape", _sums(lambda x: np.stack([x, x]))),
    ("sums of another type", _sums(lambda x: x.astype("float32"))),
    ("other sums", _rename_sums),
    ("no sums", _without("sums")),
    ("sums without content", lambda content: content.array_records["sums"].clear()),
    ("no metrics", _without("metrics")),
    ("an empty reply", _clear),
)

DEVICE_TESTS: tuple[tuple[str, Change], ...] = (
    ("a device less", _metric("device", lambda x: x[:-1])),
    ("a device twice", _metric("device", lambda x: [x[1], *x[1:]])),
    ("another device", _metric("device", lambda x: [999, *x[1:]])),
    ("no devices", _no_metric("device")),
    ("no metric", _no_metric("value.accuracy")),
    ("no share", _metric("value.accuracy", lambda x: [1.5, *x[1:]])),
    ("a negative share", _metric("value.accuracy", lambda x: [-0.1, *x[1:]])),
    ("values as integers", _metric("value.accuracy", lambda x: [1] * len(x))),
    ("an empty reply", _clear),
)
