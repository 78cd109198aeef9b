"""A row of ``STRATEGIES`` as a Flower strategy: messages out, replies in, arithmetic in the pure core.

It works in FedMaestro's own loop (``federation``) and in Flower's (``strategy.start(grid, arrays, num_rounds=…)``).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import BYTES_PER_SCALAR
from fedmaestro.fleet.learned import Ranked, count_updates, no_updates, rederive, tails
from fedmaestro.fleet.plan import Submodel, TierPlan, encode_ranks
from fedmaestro.flower import wire
from fedmaestro.flower.hosts import one_line
from fedmaestro.rounds import spectrum, storage
from fedmaestro.rounds.device import CohortResult, rank_segments
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.schedule import Cohort, Schedule, schedule_round
from fedmaestro.runs.checkpoint import Checkpoint
from fedmaestro.strategies.base import WEIGHTED_SUMS, Partial, Signature
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.reordered import reorder, without_factors
from fedmaestro.strategies.tail_decay import decay_tails
from fedmaestro.submodel import State, num_elements
from fedmaestro.tasks.evaluate import Score
from fedmaestro.threads import one_thread

log = logging.getLogger("fedmaestro")

T = TypeVar("T")
Job = dict[str, bool | bytes | float | int | str | list[int] | list[float] | list[bool] | list[bytes] | list[str]]

TEST_PART = 2500
"""Test examples per evaluation message: fixed, so that sums do not depend on the number of hosts."""


class TieredStrategy(FlowerStrategy):
    """Sample devices, send each cohort its tier's submodel, merge partial sums in cohort order.

    Args:
        env: the experiment.
        checkpoint: what to go on from; by default, the start of a run.

    Attributes:
        plan: who trains and is served what; its ranks follow the model where the experiment wants that.
        server_memory: the server optimiser's state.
        updates: device updates that have trained each column, where ranks can change.
    """

    def __init__(self, env: Environment, checkpoint: Checkpoint | None = None) -> None:
        self.env = env
        self.plan = env.plan_at(checkpoint.ranks if checkpoint else "")
        self.server_memory: State = checkpoint.server_memory if checkpoint else {}
        self.updates: State = checkpoint.updates if checkpoint else {}
        if env.rederivation.active and not self.updates:
            self.updates = no_updates(self.plan)
        self._experiment: Job = {"experiment": env.config.to_json(), "fingerprint": env.fingerprint}
        self._global: State = {}
        self._records: dict[int, ArrayRecord] = {}
        self._schedule: Schedule | None = None
        self._messages: list[tuple[Message, Cohort]] = []
        self._parts: list[tuple[Message, TierPlan]] = []

    @property
    def ranks(self) -> str:
        """The current ranks for a message or a checkpoint: empty while they are those of the run's start."""
        return "" if self.plan is self.env.plan else encode_ranks(self.plan)

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,
    ) -> Iterable[Message]:
        """Return one message per cohort, the one with the most work first (the shortest makespan)."""
        env, train, fleet = self.env, self.env.config.train, self.env.config.fleet
        self._load(arrays)
        self._schedule = schedule_round(
            plan=self.plan,
            tier_of=env.tier_of,
            examples=[len(part) for part in env.parts],
            seed=env.config.seed,
            server_round=server_round,
            devices_per_round=train.devices_per_round,
            cohort_size=train.cohort_size,
            local_epochs=train.local_epochs,
            over_commit=fleet.over_commit,
            deadline_seconds=fleet.deadline_seconds,
            upload_bytes=lambda submodel: self._upload_bytes(submodel, server_round),
        )
        cohorts = sorted(self._schedule.cohorts, key=lambda cohort: -cohort.work)
        self._messages = [
            (self._train_message(cohort, server_round, node), cohort)
            for cohort, node in zip(cohorts, _nodes(grid), strict=False)
        ]
        return [message for message, _ in self._messages]

    def _train_message(self, cohort: Cohort, server_round: int, node: int) -> Message:
        job: Job = {"round": server_round, "tier": cohort.tier.tier.name, "devices": list(cohort.devices)}
        if self.env.config.train.group_lasso and not self.plan.setting.rule.separate:
            job["tails"] = [x for tail in tails(self._global, cohort.submodel.size.ranks or {}) for x in tail]
        return self._message(cohort.submodel, job, MessageType.TRAIN, node)

    def _message(self, submodel: Submodel, job: Job, kind: str, node: int) -> Message:
        if ranks := self.ranks:
            job["ranks"] = ranks
        # Messages of one tier share one record, which is serialised once.
        if submodel.cost.params not in self._records:
            self._records[submodel.cost.params] = wire.to_arrays(storage.download(self.plan, self._global, submodel))
        content = RecordDict(
            {
                wire.SUBMODEL: self._records[submodel.cost.params],
                wire.JOB: ConfigRecord({**self._experiment, **job}),
            }
        )
        return Message(content=content, dst_node_id=node, message_type=kind)

    def _load(self, arrays: ArrayRecord) -> None:
        self._global = wire.to_state(arrays)
        self._records = {}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Merge what came back, in cohort order; devices of missing or erroneous replies count as failed."""
        assert self._schedule is not None
        results = _matched(self._messages, replies)
        aggregation = self.env.strategy.aggregation
        partial = aggregation.init(self._global, list(self._signatures(server_round).values()))
        probes: State = {}
        failures: dict[int, str] = {}
        losses: list[tuple[float, int]] = []
        upload_bytes = 0
        for cohort, reply in sorted(results, key=lambda pair: pair[0].index):
            result = _read(cohort, reply)
            failures |= result.failures
            losses += [(report.loss, report.examples) for report in result.reports]
            upload_bytes += self._upload_bytes(cohort.submodel, server_round) * len(result.reports)
            if self.updates:
                self.updates = count_updates(self.updates, cohort.submodel.size.ranks or {}, len(result.reports))
            if result.mean:
                key = self._signatures(server_round)[cohort.submodel.cost.params]
                partial = aggregation.receive(partial, key, result.mean, result.weight, len(result.reports))
            for name, tensor in result.probes.items():
                probes[name] = result.weight * tensor.double() + probes.get(name, 0.0)
        for reason in dict.fromkeys(failures.values()):
            devices = ", ".join(str(device) for device in sorted(failures) if failures[device] == reason)
            log.warning("round %d: failed: device %s: %s", server_round, devices, reason)
        metrics: dict[str, Any] = {
            "devices": len(losses),
            "failed": len(failures),
            "dropped": len(self._schedule.dropped),
            "download_bytes": self._schedule.download_bytes,
            "upload_bytes": upload_bytes,
            "virtual_seconds": self._schedule.virtual_seconds,
        }
        if losses:
            examples = sum(n for _, n in losses)
            metrics["train_loss"] = sum(loss * n for loss, n in losses) / examples
            if (bias := self._factor_bias(partial, probes)) is not None:
                metrics["factor_bias"] = bias
            aggregated, devices_of = storage.aggregate(self.plan, aggregation, partial, self._global)
            state, memory = self.env.strategy.server.step(self._global, aggregated, self.server_memory, devices_of)
            state = decay_tails(state, partial, self.env.strategy.tail_decay)
            if (every := self.env.strategy.reorder_every) and server_round % every == 0:
                state, memory = reorder(state), without_factors(memory)
            self._global, self.server_memory = storage.advance(self.plan, state, memory)
        if self.env.rederivation.due(server_round, self.env.config.train.rounds):
            self._rederive(server_round)
        return wire.to_arrays(self._global), MetricRecord(metrics)

    def _signatures(self, server_round: int) -> dict[int, Signature]:
        """Return what devices send back, for every size that tiers train, by parameters."""
        signatures: dict[int, Signature] = {}
        for tier in self.plan.tiers:
            if tier.trains is not None:
                shapes = tier.trains.shapes
                frozen = self.env.strategy.frozen(shapes, server_round)
                signatures[tier.trains.cost.params] = tuple((n, s) for n, s in shapes.items() if n not in frozen)
        return signatures

    def _upload_bytes(self, submodel: Submodel, server_round: int) -> int:
        sent = self._signatures(server_round)[submodel.cost.params]
        kept = num_elements(submodel.shapes) - num_elements(dict(sent))
        return submodel.cost.upload_bytes - BYTES_PER_SCALAR * kept

    def _factor_bias(self, partial: Partial, probes: State) -> float | None:
        """Return the round's factor bias; None for rules that do not average factors."""
        averages = self.env.strategy.aggregation.reduction is WEIGHTED_SUMS
        if not probes or not averages or self.plan.setting.rule.separate:
            return None
        means = COVERAGE_MEAN.finish(partial, self._global)
        with one_thread():
            return spectrum.factor_bias(probes, partial, means, self._global, rank_segments(self.plan))

    def _rederive(self, server_round: int) -> None:
        now = Ranked(plan=self.plan, state=self._global, memory=self.server_memory, updates=self.updates)
        new = rederive(self.env.plan, now, self.env.rederivation)
        self.plan, self._global, self.server_memory, self.updates = new.plan, new.state, new.memory, new.updates
        if new.plan.full is not now.plan.full:
            log.info("round %d: the whole model's ranks are %s", server_round, new.plan.full.size.ranks)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,
    ) -> Iterable[Message]:
        """Return messages that evaluate every distinct submodel that serves a tier, in parts of the test set."""
        self._load(arrays)
        nodes = _nodes(grid)
        examples = len(self.env.dataset.test_labels)
        self._parts = []
        for tier in self._distinct():
            for first in range(0, examples, TEST_PART):
                job: Job = {
                    "round": server_round,
                    "tier": tier.tier.name,
                    "first": first,
                    "last": min(first + TEST_PART, examples),
                }
                message = self._message(tier.serves, job, MessageType.EVALUATE, next(nodes))
                self._parts.append((message, tier))
        return [message for message, _ in self._parts]

    def _distinct(self) -> Sequence[TierPlan]:
        """Return one tier for each distinct serving submodel."""
        return list({tier.serves.cost.params: tier for tier in self.plan.tiers}.values())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return ``accuracy.TIER`` and ``loss.TIER``; a tier whose evaluation failed somewhere is left out."""
        scores: dict[int, Score] = {}
        broken: set[int] = set()
        for tier, reply in _matched(self._parts, replies):
            params = tier.serves.cost.params
            if reply is None or reply.has_error():
                reason = "no reply" if reply is None else one_line(reply)
                log.warning("round %d: evaluation of tier %s failed: %s", server_round, tier.tier.name, reason)
                broken.add(params)
                continue
            m: dict[str, Any] = dict(reply.content.metric_records[wire.METRICS])
            part = Score(m["correct"], m["loss-sum"], m["examples"])
            scores[params] = scores.get(params, Score(0, 0.0, 0)) + part
        metrics: dict[str, Any] = {}
        for tier in self.plan.tiers:
            if (params := tier.serves.cost.params) in scores and params not in broken:
                metrics[f"accuracy.{tier.tier.name}"] = scores[params].accuracy
                metrics[f"loss.{tier.tier.name}"] = scores[params].loss
        return MetricRecord(metrics)

    def summary(self) -> None:
        """Log what this strategy does (Flower calls it at the start of its own loop)."""
        row = self.env.strategy
        log.info("%s: %s; objective %s", row.name, row.summary, self.env.objective.name)


def _nodes(grid: Grid) -> Iterator[int]:
    """Deal out the hosts in turn, without end."""
    nodes = sorted(grid.get_node_ids())
    if not nodes:
        raise UserError("no host is connected any more: start hosts and go on with --resume")
    return cycle(nodes)


def _matched(sent: list[tuple[Message, T]], replies: Iterable[Message]) -> list[tuple[T, Message | None]]:
    """Pair what was sent with its reply, in the order of sending; None where none came."""
    by_id = {reply.metadata.reply_to_message_id: reply for reply in replies}
    return [(subject, by_id.get(message.metadata.message_id)) for message, subject in sent]


def _read(cohort: Cohort, reply: Message | None) -> CohortResult:
    if reply is not None and not reply.has_error():
        return wire.read_cohort_reply(reply.content)
    reason = "no reply" if reply is None else f"host error: {one_line(reply)}"
    return CohortResult(reports=(), failures=dict.fromkeys(cohort.devices, reason))
