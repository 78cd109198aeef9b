"""Flower ClientApp: a host runs cohorts of simulated devices, and evaluates submodels.

Both ends of the conversation are here: what a message to a host holds, what the host does with it, and what its reply
means. Handlers hold no state between messages; models and data stay resident per process (Ray actor or SuperNode).

Tensors travel as Flower Arrays (``arrays``): their bytes are what the closed form of ``fleet.cost`` predicts, and each
adds the 128 bytes of NumPy's header.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedmaestro.clients.scaffold import Control
from fedmaestro.fleet.plan import Plan
from fedmaestro.flower.arrays import to_arrays, to_state
from fedmaestro.memory import keep_freed_memory
from fedmaestro.rounds.device import CohortResult, DeviceReport, evaluate_devices, evaluate_part, train_cohort
from fedmaestro.rounds.environment import Environment, environment_of
from fedmaestro.rounds.failure import Failure, RejectedError
from fedmaestro.runs.code import received
from fedmaestro.submodel import State
from fedmaestro.tasks.task import Score

app = ClientApp()

DESCRIBE = f"{MessageType.QUERY}.describe"
CONTROL, CONTROLS = "control", "controls"
JOB, SUBMODEL, PROBES, METRICS, FAILURES, SUMS = "job", "submodel", "probes", "metrics", "failures", "sums"


def message(
    kind: str,
    node: int,
    env: Environment,
    submodel: ArrayRecord | None = None,
    more: Mapping[str, ArrayRecord] | None = None,
    **job: Any,
) -> Message:
    """Return a message to a host.

    Args:
        kind: message type.
        node: the host.
        env: the experiment, which the host opens too.
        submodel: the tensors that it is about; messages of one size share them, so they are serialised once.
        more: other records of tensors, by their names.
        job: what to do, by the parameters of the handler's function; ``ranks`` names the plan where it has changed.
    """
    content = RecordDict({JOB: ConfigRecord({**env.about, **job})})
    if submodel is not None:
        content[SUBMODEL] = submodel
    content.update(more or {})
    return Message(content=content, dst_node_id=node, message_type=kind)


def _opened(message: Message) -> tuple[Environment, Plan, dict[str, Any]]:
    """Return what a message is about: the experiment, the plan of this moment, the job."""
    # One thread per Ray actor: PyTorch would start one per core in each of them.
    torch.set_num_threads(1)
    keep_freed_memory()
    job: dict[str, Any] = dict(message.content.config_records[JOB])
    env = environment_of(job.pop("experiment"), received(job), job.pop("data"))
    if job.pop("fingerprint") != env.fingerprint and message.metadata.message_type != DESCRIBE:
        raise RuntimeError("the data, the partition or the fleet file changed during the run")
    return env, env.plan_at(job.pop("ranks", "")), job


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say which of how many hosts this is and what data it sees."""
    env, _, _ = _opened(message)
    record = ConfigRecord(
        {
            "partition-id": int(context.node_config.get("partition-id", 0)),
            "num-partitions": int(context.node_config.get("num-partitions", 1)),
            "fingerprint": env.fingerprint,
            "data": env.task.fingerprint,
        }
    )
    return Message(RecordDict({JOB: record}), reply_to=message)


def read_description(reply: Message) -> tuple[int, str, str]:
    """Return how many hosts there are, and the fingerprints of the experiment and of the data that this one sees."""
    record: dict[str, Any] = dict(reply.content.config_records[JOB])
    return int(record["num-partitions"]), str(record["fingerprint"]), str(record["data"])


@app.train()
def train(message: Message, _context: Context) -> Message:
    """Train the devices of a cohort and reply with their partial sum and one metrics row each.

    The upload of one device is its submodel bit for bit; that of several, their exact partial sum in float64. Probes of
    the factor bias are instruments of the simulation, no part of an upload.
    """
    env, plan, job = _opened(message)
    start = to_state(message.content.array_records[SUBMODEL])
    controls = _controls(message.content, job["devices"]) if CONTROL in message.content.array_records else None
    result = train_cohort(
        env,
        plan,
        job["tier"],
        job["devices"],
        start,
        job["round"],
        job.get("tails", ()),
        controls,
        stack=job["stack"],
        bound=job["bound"],
    )
    rows, failed = result.reports, result.failures
    metrics: dict[str, Any] = {
        "seconds": result.seconds,
        "device": [row.device for row in rows],
        "loss": [row.loss for row in rows],
        "norm": [row.norm for row in rows],
    }
    failures: dict[str, Any] = {
        "device": list(failed),
        "kind": [failure.kind for failure in failed.values()],
        "reason": [failure.reason for failure in failed.values()],
    }
    content = RecordDict({METRICS: MetricRecord(metrics), FAILURES: ConfigRecord(failures)})
    content.update({kind: to_arrays(state) for kind, state in {**result.parts, PROBES: result.probes}.items()})
    if result.controls:
        content[CONTROLS] = to_arrays(by_device(result.controls))
    return Message(content, reply_to=message)


def by_device(states: Mapping[int, Mapping[str, Tensor]]) -> State:
    """Return the states of devices as one; ``of_device`` takes it apart."""
    return {f"{device}/{name}": x for device, state in states.items() for name, x in state.items()}


def of_device(state: Mapping[str, Tensor]) -> dict[int, State]:
    """Return what ``by_device`` put together."""
    states: dict[int, State] = {}
    for key, tensor in state.items():
        device, _, name = key.partition("/")
        states.setdefault(int(device), {})[name] = tensor
    return states


def _controls(content: RecordDict, devices: Sequence[int]) -> dict[int, Control]:
    """Return the control variates of a message: the server's, and each device's own."""
    server = to_state(content.array_records[CONTROL])
    own = of_device(to_state(content.array_records[CONTROLS]))
    return {device: Control(server=server, own=own.get(device, {})) for device in devices}


T = TypeVar("T")


def _reading(read: Callable[[Message], T]) -> Callable[[Message], T]:
    """Let whatever a reply lacks, or has of another type, be a RejectedError."""

    @wraps(read)
    def checked(reply: Message) -> T:
        try:
            return read(reply)
        except Exception as error:
            # Whatever a peer may have sent: the run goes on.
            raise RejectedError("malformed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    return checked


def _column(record: Mapping[str, Any], key: str, kind: type[T]) -> list[T]:
    values = record[key]
    if not isinstance(values, list) or not all(type(x) is kind for x in values):
        raise TypeError(f"{key!r} is no list of {kind.__name__}")
    return values


def _seconds(record: Mapping[str, Any]) -> float:
    seconds = record["seconds"]
    if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r:.40}")
    return seconds


@_reading
def read_cohort(reply: Message) -> CohortResult:
    """Return what ``train`` replied, as it is; ``rounds.admission`` says whether it can be so."""
    content = reply.content
    metrics, failed = content.metric_records[METRICS], content.config_records[FAILURES]
    arrays = {kind: to_state(record) for kind, record in content.array_records.items()}
    columns = _column(metrics, "device", int), _column(metrics, "loss", float), _column(metrics, "norm", float)
    reasons = _column(failed, "kind", str), _column(failed, "reason", str)
    why = [Failure(kind, reason) for kind, reason in zip(*reasons, strict=True)]
    # Lists, in which a device may come twice; ``admission`` counts them.
    failures = list(zip(_column(failed, "device", int), why, strict=True))
    if len(dict(failures)) != len(failures):
        raise ValueError("a device has failed twice")
    probes = arrays.pop(PROBES)
    controls = of_device(arrays.pop(CONTROLS, {}))
    return CohortResult(
        parts=arrays,
        seconds=_seconds(metrics),
        controls=controls,
        probes=probes,
        reports=tuple(
            DeviceReport(device=device, examples=0, loss=loss, norm=norm)
            for device, loss, norm in zip(*columns, strict=True)
        ),
        failures=dict(failures),
    )


@app.evaluate()
def evaluate(message: Message, _context: Context) -> Message:
    """Evaluate a tier's submodel on a part of the test set, or on what some devices are tested on."""
    began = time.perf_counter()
    env, plan, job = _opened(message)
    state = to_state(message.content.array_records[SUBMODEL])
    if "devices" in job:
        found = evaluate_devices(env, plan, job["tier"], state, job["devices"])
        rows: dict[str, Any] = {
            "seconds": time.perf_counter() - began,
            "device": list(found),
            "loss": [score.loss for score in found.values()],
            **{f"value.{metric.name}": [x.value(metric) for x in found.values()] for metric in env.task.metrics},
        }
        return Message(RecordDict({METRICS: MetricRecord(rows)}), reply_to=message)
    part = evaluate_part(env, plan, job["tier"], state, job["first"], job["last"])
    sums = to_arrays({f"{metric}/{name}": x for metric, own in part.sums.items() for name, x in own.items()})
    seconds = time.perf_counter() - began
    numbers = MetricRecord({"loss-sum": part.loss_sum, "examples": part.examples, "seconds": seconds})
    return Message(RecordDict({METRICS: numbers, SUMS: sums}), reply_to=message)


@_reading
def read_device_values(reply: Message) -> dict[int, dict[str, float]]:
    """Return what ``evaluate`` replied of devices: every metric, and the loss."""
    rows = reply.content.metric_records[METRICS]
    devices = _column(rows, "device", int)
    names = {key: key.removeprefix("value.") for key in rows if key == "loss" or key.startswith("value.")}
    columns = {name: _column(rows, key, float) for key, name in names.items()}
    if len(set(devices)) != len(devices) or any(len(column) != len(devices) for column in columns.values()):
        raise ValueError("a device came twice, or without a value")
    return {device: {name: values[i] for name, values in columns.items()} for i, device in enumerate(devices)}


@_reading
def seconds_of(reply: Message) -> float:
    """Return how long the host worked on what it replied."""
    return _seconds(reply.content.metric_records[METRICS])


@_reading
def read_score(reply: Message) -> Score:
    """Return what ``evaluate`` replied."""
    metrics: dict[str, Any] = dict(reply.content.metric_records[METRICS])
    if type(metrics["examples"]) is not int or type(metrics["loss-sum"]) is not float:
        raise TypeError("examples is no int, or loss-sum no float")
    sums: dict[str, State] = {}
    for key, tensor in to_state(reply.content.array_records[SUMS]).items():
        metric, _, name = key.partition("/")
        sums.setdefault(metric, {})[name] = tensor
    return Score(metrics["examples"], metrics["loss-sum"], sums)
