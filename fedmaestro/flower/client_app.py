"""Flower ClientApp: a host runs cohorts of simulated devices, and evaluates submodels.

Both ends of the conversation are here: what a message to a host holds, what the host does with it, and what its reply
means. Handlers hold no state between messages; models and data stay resident per process (Ray actor or SuperNode).

Tensors travel as Flower Arrays (``arrays``): their bytes are what the closed form of ``fleet.cost`` predicts, and each
adds the 128 bytes of NumPy's header.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

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
    )
    rows = result.reports
    metrics: dict[str, Any] = {
        "seconds": result.seconds,
        "weight": result.weight,
        "device": [row.device for row in rows],
        "examples": [row.examples for row in rows],
        "loss": [row.loss for row in rows],
    }
    failures: dict[str, Any] = {"device": list(result.failures), "reason": list(result.failures.values())}
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


def read_cohort(reply: Message) -> CohortResult:
    """Return what ``train`` replied."""
    content = reply.content
    metrics: dict[str, Any] = dict(content.metric_records[METRICS])
    failures: dict[str, Any] = dict(content.config_records[FAILURES])
    rows = zip(metrics["device"], metrics["examples"], metrics["loss"], strict=True)
    arrays = {kind: to_state(record) for kind, record in content.array_records.items()}
    probes = arrays.pop(PROBES)
    controls = of_device(arrays.pop(CONTROLS, {}))
    return CohortResult(
        parts=arrays,
        weight=metrics["weight"],
        seconds=metrics["seconds"],
        controls=controls,
        probes=probes,
        reports=tuple(DeviceReport(device=d, examples=n, loss=x) for d, n, x in rows),
        failures=dict(zip(failures["device"], failures["reason"], strict=True)),
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


def read_device_values(reply: Message) -> dict[int, dict[str, float]]:
    """Return what ``evaluate`` replied of devices: every metric, and the loss."""
    rows: dict[str, Any] = dict(reply.content.metric_records[METRICS])
    columns = {key.removeprefix("value."): rows[key] for key in rows if key == "loss" or key.startswith("value.")}
    return {device: {name: values[i] for name, values in columns.items()} for i, device in enumerate(rows["device"])}


def seconds_of(reply: Message) -> float:
    """Return how long the host worked on what it replied."""
    seconds = dict(reply.content.metric_records[METRICS]).get("seconds", 0.0)
    return seconds if isinstance(seconds, float) else 0.0


def read_score(reply: Message) -> Score:
    """Return what ``evaluate`` replied."""
    metrics: dict[str, Any] = dict(reply.content.metric_records[METRICS])
    sums: dict[str, State] = {}
    for key, tensor in to_state(reply.content.array_records[SUMS]).items():
        metric, _, name = key.partition("/")
        sums.setdefault(metric, {})[name] = tensor
    return Score(metrics["examples"], metrics["loss-sum"], sums)
