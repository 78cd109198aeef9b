"""Flower ClientApp: a host runs cohorts of simulated devices, and evaluates submodels.

Handlers hold no state between messages; models and data stay resident per process (Ray actor or SuperNode).
"""

from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmaestro.fleet.plan import Plan
from fedmaestro.flower import wire
from fedmaestro.rounds.device import evaluate_part, train_cohort
from fedmaestro.rounds.environment import Environment, environment_of

app = ClientApp()

DESCRIBE = "describe"


def _environment(message: Message) -> tuple[Environment, Plan, dict[str, Any]]:
    """Return what a message is about: the experiment, the plan of this moment, the job."""
    # One thread per Ray actor: PyTorch would start one per core in each of them.
    torch.set_num_threads(1)
    job: dict[str, Any] = dict(message.content.config_records[wire.JOB])
    env = environment_of(job["experiment"])
    if job.get("fingerprint", env.fingerprint) != env.fingerprint:
        raise RuntimeError("the data, the partition or the fleet file changed during the run")
    return env, env.plan_at(job.get("ranks", "")), job


@app.query(DESCRIBE)
def describe(message: Message, context: Context) -> Message:
    """Say which of how many hosts this is and what data it sees."""
    env, _, _ = _environment(message)
    record = ConfigRecord(
        {
            "partition-id": int(context.node_config.get("partition-id", 0)),
            "num-partitions": int(context.node_config.get("num-partitions", 1)),
            "fingerprint": env.fingerprint,
        }
    )
    return Message(RecordDict({wire.JOB: record}), reply_to=message)


@app.train()
def train(message: Message, _context: Context) -> Message:
    """Train the devices of a cohort and reply with their partial sum and one metrics row each."""
    env, plan, job = _environment(message)
    start = wire.to_state(message.content.array_records[wire.SUBMODEL])
    result = train_cohort(env, plan, job["tier"], job["devices"], start, job["round"], job.get("tails", ()))
    return Message(wire.cohort_reply(result), reply_to=message)


@app.evaluate()
def evaluate(message: Message, _context: Context) -> Message:
    """Evaluate a tier's submodel on a part of the test set."""
    env, plan, job = _environment(message)
    state = wire.to_state(message.content.array_records[wire.SUBMODEL])
    part = evaluate_part(env, plan, job["tier"], state, job["first"], job["last"])
    metrics = MetricRecord({"correct": part.correct, "loss-sum": part.loss_sum, "examples": part.examples})
    return Message(RecordDict({wire.METRICS: metrics}), reply_to=message)
