"""A row of ``STRATEGIES`` as a Flower strategy: a round's messages, and what their replies mean.

The arithmetic is that of ``rounds.server``. Our own loop (``federation``) drives it, and Flower's can
(``strategy.start(grid, arrays, num_rounds=…)``).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedmaestro.errors import UserError
from fedmaestro.fleet.learned import tails
from fedmaestro.fleet.plan import Submodel, TierPlan, encode_ranks
from fedmaestro.flower.arrays import to_arrays, to_state
from fedmaestro.flower.client_app import (
    CONTROL,
    CONTROLS,
    by_device,
    message,
    read_cohort,
    read_device_values,
    read_score,
    seconds_of,
)
from fedmaestro.flower.direct_grid import reason_of
from fedmaestro.rounds import storage
from fedmaestro.rounds.admission import Admission
from fedmaestro.rounds.cohorts import Cohort, Pace, cut
from fedmaestro.rounds.device import CohortResult
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.failure import Failure, RejectedError
from fedmaestro.rounds.server import (
    Gathering,
    ServerState,
    control_of,
    evaluation_facts,
    opened,
    schedule,
    start,
    step,
    with_controls,
)
from fedmaestro.submodel import State
from fedmaestro.tasks.task import Score

log = logging.getLogger("fedmaestro")

TEST_PART = 2500
"""Test examples per evaluation message: fixed, so that sums do not depend on the number of hosts."""


@dataclass
class _Part:
    """A message that evaluates something, and what came of it."""

    message: Message
    tier: TierPlan
    examples: int
    job: Mapping[str, Any]
    score: Score | None = None
    values: Mapping[int, Mapping[str, float]] | None = None
    failure: str = "no reply"
    """Why there is neither a score nor values."""

    @property
    def kind(self) -> tuple[str, Submodel]:
        """What it is to the pace."""
        return "evaluate", self.tier.serves

    @property
    def work(self) -> int:
        """MACs."""
        return self.examples * self.tier.serves.cost.macs_per_example


class TieredStrategy(FlowerStrategy):
    """Sample devices, send each cohort its tier's submodel, add up partial sums along the tiers' trees.

    Args:
        env: the experiment.
        server: what to go on from; by default, the start of a run.

    Attributes:
        server: the server's state; ``aggregate_train`` replaces it by that after the round.
    """

    def __init__(self, env: Environment, server: ServerState | None = None) -> None:
        self.env = env
        self.server = start(env) if server is None else server
        self._opened = self.server
        self._pace = Pace()
        self._records: dict[tuple[Submodel, bool], ArrayRecord] = {}
        self._gathering: Gathering | None = None
        self._cohorts: dict[int, tuple[Message, Cohort]] = {}
        self._parts: dict[int, _Part] = {}
        self._device_parts: dict[int, _Part] = {}
        self._admission = Admission(env)

    def train_messages(self, server_round: int, grid: Grid, other: Sequence[Message] = ()) -> list[Message]:
        """Return one message per cohort, the one with the most work first (the shortest makespan).

        Args:
            server_round: from 1 on.
            grid: the hosts.
            other: messages that the hosts work on at the same time.
        """
        self._opened = opened(self.server, server_round)
        planned = schedule(self.env, self._opened, server_round)
        self._gathering = Gathering(self.env, self._opened, planned, server_round)
        nodes = sorted(grid.get_node_ids())
        parts = self._parts | self._device_parts
        alone = self.env.method.aggregation.alone
        cohorts = cut(
            planned.groups,
            lambda cohort: self._pace.seconds(("train", cohort.submodel), cohort.work),
            workers=len(nodes),
            limit=1 if alone else self.env.config.train.cohort_size,
            stack=1 if alone else self.server.stack,
            other_seconds=sum(self._pace.seconds(part.kind, part.work) for x in other if (part := parts.get(id(x)))),
        )
        messages = [
            (self._train_message(cohort, server_round, node), cohort)
            for cohort, node in zip(cohorts, _dealt(nodes), strict=False)
        ]
        self._cohorts = {id(message): (message, cohort) for message, cohort in messages}
        return [message for message, _ in messages]

    def _train_message(self, cohort: Cohort, server_round: int, node: int) -> Message:
        assert self._gathering is not None
        job: dict[str, Any] = {
            "round": server_round,
            "devices": list(cohort.devices),
            "stack": self.server.stack,
            "bound": self._gathering.bound_of(cohort.submodel),
        }
        if self.env.config.train.group_lasso and None in self.server.models:
            lacking = tails(self.server.models[None], cohort.submodel.size.ranks or {})
            job["tails"] = [x for tail in lacking for x in tail]
        more: dict[str, ArrayRecord] = {}
        if self.env.method.correction == "scaffold":
            known = self.server.controls
            own = {device: known[device] for device in cohort.devices if device in known}
            more = {
                CONTROL: to_arrays(control_of(self.server, cohort.submodel)),
                CONTROLS: to_arrays(by_device(own)),
            }
        return self._message(MessageType.TRAIN, node, self._opened, cohort.submodel, cohort.tier, job, more)

    def _message(
        self,
        kind: str,
        node: int,
        server: ServerState,
        submodel: Submodel,
        tier: TierPlan,
        job: dict[str, Any],
        more: dict[str, ArrayRecord] | None = None,
    ) -> Message:
        plan = server.plan
        if plan is not self.env.plan:
            job["ranks"] = encode_ranks(plan)
        # Messages of one size share one record, which is serialised once.
        key = submodel, server is self.server
        if key not in self._records:
            self._records[key] = to_arrays(storage.download(plan, server.models, submodel))
        return message(kind, node, self.env, self._records[key], more, tier=tier.tier.name, **job)

    def predicted_seconds(self, messages: Iterable[Message], grid: Grid) -> float | None:
        """Return what the hosts will take for messages that this object has made; None before anything was measured."""
        if not self._pace.known:
            return None
        total, parts = 0.0, self._parts | self._device_parts
        for one in messages:
            if (sent := self._cohorts.get(id(one))) is not None:
                total += self._pace.seconds(("train", sent[1].submodel), sent[1].work)
            elif (part := parts.get(id(one))) is not None:
                total += self._pace.seconds(part.kind, part.work)
        return total / max(1, len(list(grid.get_node_ids())))

    def take(self, message: Message, reply: Message) -> None:
        """Take the reply to one of the messages that this object has made."""
        failed = reply.has_error()
        if (sent := self._cohorts.pop(id(message), None)) is not None:
            assert self._gathering is not None
            _, cohort = sent
            if failed:
                self._gathering.receive(cohort, _failed(cohort, Failure("host", f"host error: {reason_of(reply)}")))
                return
            try:
                result = self._admission.cohort(self._gathering.asked(cohort), read_cohort(reply))
            except RejectedError as error:
                log.warning("a reply is rejected (%s): %s", error.failure.kind, error)
                self._gathering.receive(cohort, _failed(cohort, error.failure))
                return
            if len(result.reports) == len(cohort.devices):
                self._pace.measure(("train", cohort.submodel), cohort.work, result.seconds)
            self._gathering.receive(cohort, result)
        elif (part := self._parts.get(id(message)) or self._device_parts.get(id(message))) is not None:
            job = part.job
            try:
                if failed:
                    part.failure = reason_of(reply)
                elif id(message) in self._parts:
                    part.score = self._admission.score(read_score(reply), job["first"], job["last"])
                else:
                    values = read_device_values(reply)
                    self._admission.device_values(values, job["devices"])
                    part.values = values
                if not failed:
                    self._pace.measure(part.kind, part.work, seconds_of(reply))
            except RejectedError as error:
                part.failure = f"rejected ({error.failure.kind}): {error}"

    def trained(self, server_round: int) -> dict[str, Any]:
        """Take the server's step of a round; return what the round's record says.

        Devices of missing or erroneous replies count as failed.
        """
        gathering, self._gathering = self._gathering, None
        assert gathering is not None
        for _, cohort in self._cohorts.values():
            gathering.receive(cohort, _failed(cohort, Failure("late", "no reply")))
        self._cohorts = {}
        failures = gathering.failures
        for failure in dict.fromkeys(failures[device] for device in sorted(failures)):
            devices = ", ".join(str(device) for device in sorted(failures) if failures[device] == failure)
            log.warning("round %d: failed: device %s: %s (%s)", server_round, devices, failure.reason, failure.kind)
        facts = gathering.facts()
        before, self.server = self.server, step(self.env, self._opened, gathering.partials, server_round)
        self.server = replace(self.server, norms=gathering.norms)
        losses = {report.device: report.loss for report in gathering.reports}
        self.server = replace(self.server, history=self.server.history.after(server_round, losses))
        if gathering.controls:
            self.server = with_controls(self.env, self.server, gathering.controls)
        self._records = {}
        if self.server.plan.full is not before.plan.full:
            log.info("round %d: the whole model's ranks are %s", server_round, self.server.plan.full.size.ranks)
        return facts

    def evaluate_messages(self, server_round: int, grid: Grid) -> list[Message]:
        """Return messages that evaluate every distinct submodel that serves a tier, in parts of the test set."""
        nodes, examples = _dealt(sorted(grid.get_node_ids())), self.env.task.test_examples
        self._parts = {}
        for submodel, (tier, *_) in self.server.plan.serving.items():
            for first in range(0, examples, TEST_PART):
                last = min(first + TEST_PART, examples)
                job = {"round": server_round, "first": first, "last": last}
                message = self._message(MessageType.EVALUATE, next(nodes), self.server, submodel, tier, job)
                self._parts[id(message)] = _Part(message, tier, last - first, job)
        return [part.message for part in self._parts.values()]

    def device_messages(self, server_round: int, grid: Grid) -> list[Message]:
        """Return messages that evaluate every tier's submodel on what its devices are tested on."""
        nodes, tests = _dealt(sorted(grid.get_node_ids())), self.env.device_tests.examples
        self._device_parts = {}
        for tier in self.server.plan.tiers if len(tests) else ():
            devices = np.nonzero((self.env.tier_of == tier.index) & (tests.sizes > 0))[0].tolist()
            for some in _chunks(devices, tests.sizes[devices].tolist()):
                job = {"round": server_round, "devices": some}
                message = self._message(MessageType.EVALUATE, next(nodes), self.server, tier.serves, tier, job)
                self._device_parts[id(message)] = _Part(message, tier, int(tests.sizes[some].sum()), job)
        return [part.message for part in self._device_parts.values()]

    def device_values(self, server_round: int) -> dict[int, Mapping[str, float]]:
        """Return every metric of every device whose evaluation succeeded."""
        values: dict[int, Mapping[str, float]] = {}
        for part in self._device_parts.values():
            if part.values is None:
                name = part.tier.tier.name
                log.warning("round %d: test of tier %s's devices failed: %s", server_round, name, part.failure)
            else:
                values |= part.values
        return dict(sorted(values.items()))

    def scores(self, server_round: int) -> dict[Submodel, Score]:
        """Return the score of every serving submodel whose evaluation succeeded everywhere."""
        scores: dict[Submodel, Score] = {}
        broken: set[Submodel] = set()
        for part in self._parts.values():
            submodel = part.tier.serves
            if part.score is None:
                name = part.tier.tier.name
                log.warning("round %d: evaluation of tier %s failed: %s", server_round, name, part.failure)
                broken.add(submodel)
            else:
                scores[submodel] = scores[submodel] + part.score if submodel in scores else part.score
        return {submodel: score for submodel, score in scores.items() if submodel not in broken}

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,
    ) -> list[Message]:
        """Return ``train_messages`` of the state in ``arrays``."""
        self._load(arrays)
        return self.train_messages(server_round, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Return the next state, and what the round's record says as numbers."""
        self._take_all(replies)
        facts = self.trained(server_round)
        numbers: dict[str, Any] = {key: value for key, value in facts.items() if isinstance(value, int | float)}
        return to_arrays(self._shared()), MetricRecord(numbers)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,
    ) -> list[Message]:
        """Return ``evaluate_messages`` of the state in ``arrays``."""
        self._load(arrays)
        return self.evaluate_messages(server_round, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Return ``accuracy.TIER`` and ``loss.TIER``; a tier whose evaluation failed somewhere is left out."""
        self._take_all(replies)
        tiers = evaluation_facts(self.env.task, self.server, self.scores(server_round))["tiers"]
        return MetricRecord(
            {
                f"{metric}.{tier}": value
                for tier, row in tiers.items()
                for metric, value in row.items()
                if value is not None
            }
        )

    def summary(self) -> None:
        """Log what this strategy does (Flower calls it at the start of its own loop)."""
        method = self.env.method
        log.info("%s: %s; objective %s", method.name, method.summary, method.objective.name)

    def _take_all(self, replies: Iterable[Message]) -> None:
        sent = [*(message for message, _ in self._cohorts.values()), *(part.message for part in self._parts.values())]
        by_id = {message.metadata.message_id: message for message in sent}
        for reply in replies:
            if (message := by_id.get(reply.metadata.reply_to_message_id)) is not None:
                self.take(message, reply)

    def _shared(self) -> State:
        if None not in self.server.models:
            raise UserError("separate models do not fit into the one record that Flower's own loop keeps")
        return self.server.models[None]

    def _load(self, arrays: ArrayRecord) -> None:
        """Take the state that Flower's own loop keeps."""
        self._shared()
        self.server, self._records = replace(self.server, models={**self.server.models, None: to_state(arrays)}), {}


def _chunks(devices: Sequence[int], examples: Sequence[int]) -> Iterator[list[int]]:
    """Yield devices in groups of at least ``TEST_PART`` test examples, but for the last one."""
    some: list[int] = []
    total = 0
    for device, count in zip(devices, examples, strict=True):
        some.append(device)
        total += count
        if total >= TEST_PART:
            yield some
            some, total = [], 0
    if some:
        yield some


def _dealt(nodes: Sequence[int]) -> Iterator[int]:
    """Deal out the hosts in turn, without end."""
    if not nodes:
        raise UserError("no host is connected any more: start hosts and go on with --resume")
    return cycle(nodes)


def _failed(cohort: Cohort, failure: Failure) -> CohortResult:
    return CohortResult(reports=(), failures=dict.fromkeys(cohort.devices, failure))
