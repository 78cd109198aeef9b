"""The server's end: a row of ``STRATEGIES`` as a Flower strategy, and our own loop over rounds.

Messages out, replies in, arithmetic in ``rounds.server``. The loop is our own because Flower's has no resume, no
checkpoint and no per-round history; ``TieredStrategy`` works in Flower's too
(``strategy.start(grid, arrays, num_rounds=…)``).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedmaestro.errors import UserError
from fedmaestro.fleet.learned import tails
from fedmaestro.fleet.plan import Plan, Submodel, TierPlan, encode_ranks
from fedmaestro.flower.client_app import (
    CONTROL,
    CONTROLS,
    by_device,
    message,
    read_cohort,
    read_device_values,
    read_score,
    to_arrays,
    to_state,
)
from fedmaestro.flower.hosts import InterruptedRunError, exchange, find_hosts, one_line
from fedmaestro.rounds import storage
from fedmaestro.rounds.device import CohortResult
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.rounds.schedule import Cohort, Schedule
from fedmaestro.rounds.server import (
    Gathering,
    ServerState,
    control_of,
    device_facts,
    evaluation_facts,
    from_checkpoint,
    norm_statistics,
    rank_facts,
    schedule,
    start,
    step,
    to_checkpoint,
    with_controls,
)
from fedmaestro.runs.checkpoint import load_checkpoint, save_checkpoint
from fedmaestro.runs.code import write_code
from fedmaestro.runs.folder import RunFolder, write_atomically, write_record
from fedmaestro.runs.model import ModelCard, write_model
from fedmaestro.runs.records import DeviceRecord, RoundRecord, Summary, TierFigures
from fedmaestro.runs.summary import summarize
from fedmaestro.submodel import State
from fedmaestro.tasks.task import Score, metric_facts

log = logging.getLogger("fedmaestro")

T = TypeVar("T")

TEST_PART = 2500
"""Test examples per evaluation message: fixed, so that sums do not depend on the number of hosts."""


class TieredStrategy(FlowerStrategy):
    """Sample devices, send each cohort its tier's submodel, merge partial sums in cohort order.

    Args:
        env: the experiment.
        server: what to go on from; by default, the start of a run.

    Attributes:
        server: the server's state; ``aggregate_train`` replaces it by that after the round.
    """

    def __init__(self, env: Environment, server: ServerState | None = None) -> None:
        self.env = env
        self.server = start(env) if server is None else server
        self._records: dict[Submodel, ArrayRecord] = {}
        self._schedule: Schedule | None = None
        self._cohorts: list[tuple[Message, Cohort]] = []
        self._parts: list[tuple[Message, Submodel]] = []
        self._device_parts: list[tuple[Message, TierPlan]] = []

    def train_messages(self, server_round: int, grid: Grid) -> list[Message]:
        """Return one message per cohort, the one with the most work first (the shortest makespan)."""
        self._schedule = schedule(self.env, self.server, server_round)
        cohorts = sorted(self._schedule.cohorts, key=lambda cohort: -cohort.work)
        self._cohorts = [
            (self._train_message(cohort, server_round, node), cohort)
            for cohort, node in zip(cohorts, _nodes(grid), strict=False)
        ]
        return [message for message, _ in self._cohorts]

    def _train_message(self, cohort: Cohort, server_round: int, node: int) -> Message:
        job: dict[str, Any] = {"round": server_round, "devices": list(cohort.devices)}
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
        return self._message(MessageType.TRAIN, node, cohort.submodel, cohort.tier, job, more)

    def _message(
        self,
        kind: str,
        node: int,
        submodel: Submodel,
        tier: TierPlan,
        job: dict[str, Any],
        more: dict[str, ArrayRecord] | None = None,
    ) -> Message:
        plan = self.server.plan
        if plan is not self.env.plan:
            job["ranks"] = encode_ranks(plan)
        # Messages of one size share one record, which is serialised once.
        if submodel not in self._records:
            self._records[submodel] = to_arrays(storage.download(plan, self.server.models, submodel))
        return message(kind, node, self.env, self._records[submodel], more, tier=tier.tier.name, **job)

    def receive(self, server_round: int, replies: Iterable[Message]) -> dict[str, Any]:
        """Merge what came back, in cohort order, and take the server's step; return what the round's record says.

        Devices of missing or erroneous replies count as failed.
        """
        assert self._schedule is not None
        gathering = Gathering(self.env, self.server, self._schedule, server_round)
        results = _matched(self._cohorts, replies)
        for cohort, reply in sorted(results, key=lambda pair: pair[0].index):
            gathering.receive(cohort, _read(cohort, reply))
        failures = gathering.failures
        for reason in dict.fromkeys(failures.values()):
            devices = ", ".join(str(device) for device in sorted(failures) if failures[device] == reason)
            log.warning("round %d: failed: device %s: %s", server_round, devices, reason)
        facts = gathering.facts()
        before, self.server = self.server, step(self.env, self.server, gathering.partials, server_round)
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
        nodes, examples = _nodes(grid), self.env.task.test_examples
        self._parts = []
        for submodel, (tier, *_) in self.server.plan.serving.items():
            for first in range(0, examples, TEST_PART):
                job = {"round": server_round, "first": first, "last": min(first + TEST_PART, examples)}
                self._parts.append((self._message(MessageType.EVALUATE, next(nodes), submodel, tier, job), submodel))
        return [message for message, _ in self._parts]

    def device_messages(self, server_round: int, grid: Grid) -> list[Message]:
        """Return messages that evaluate every tier's submodel on what its devices are tested on."""
        nodes, tests = _nodes(grid), self.env.device_tests.examples
        self._device_parts = []
        for tier in self.server.plan.tiers if tests else ():
            devices = [d for d, index in enumerate(self.env.tier_of) if index == tier.index and len(tests[d])]
            for some in _chunks(devices, [len(tests[d]) for d in devices]):
                job = {"round": server_round, "devices": some}
                message = self._message(MessageType.EVALUATE, next(nodes), tier.serves, tier, job)
                self._device_parts.append((message, tier))
        return [message for message, _ in self._device_parts]

    def device_values(self, server_round: int, replies: Iterable[Message]) -> dict[int, dict[str, float]]:
        """Return every metric of every device whose evaluation succeeded."""
        values: dict[int, dict[str, float]] = {}
        for tier, reply in _matched(self._device_parts, replies):
            if reply is None or reply.has_error():
                reason = "no reply" if reply is None else one_line(reply)
                log.warning("round %d: test of tier %s's devices failed: %s", server_round, tier.tier.name, reason)
            else:
                values |= read_device_values(reply)
        return dict(sorted(values.items()))

    def scores(self, server_round: int, replies: Iterable[Message]) -> dict[Submodel, Score]:
        """Return the score of every serving submodel whose evaluation succeeded everywhere."""
        scores: dict[Submodel, Score] = {}
        broken: set[Submodel] = set()
        for submodel, reply in _matched(self._parts, replies):
            if reply is None or reply.has_error():
                reason = "no reply" if reply is None else one_line(reply)
                tier = self.server.plan.serving[submodel][0].tier.name
                log.warning("round %d: evaluation of tier %s failed: %s", server_round, tier, reason)
                broken.add(submodel)
            else:
                part = read_score(reply)
                scores[submodel] = scores[submodel] + part if submodel in scores else part
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
        facts = self.receive(server_round, replies)
        numbers = {key: value for key, value in facts.items() if value is not None}
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
        tiers = evaluation_facts(self.env.task, self.server, self.scores(server_round, replies))["tiers"]
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

    def _shared(self) -> State:
        if None not in self.server.models:
            raise UserError("separate models do not fit into the one record that Flower's own loop keeps")
        return self.server.models[None]

    def _load(self, arrays: ArrayRecord) -> None:
        """Take the state that Flower's own loop keeps."""
        self._shared()
        self.server, self._records = replace(self.server, models={None: to_state(arrays)}), {}


class Federation:
    """One run on the hosts behind ``grid``.

    Args:
        grid: Flower's connection to the hosts.
        env: the experiment.
        folder: where everything goes; ``check_folder`` has checked it.
        stop: set from outside to end the run after what is complete.
        observers: are told about the progress, in this order.
        resume: go on with the run in ``folder``; without it, a folder that holds one is refused.
    """

    def __init__(
        self,
        grid: Grid,
        env: Environment,
        folder: RunFolder,
        stop: threading.Event,
        observers: Sequence[Observer] = (),
        *,
        resume: bool = False,
    ) -> None:
        self.grid, self.env, self.folder, self.stop, self.observers = grid, env, folder, stop, observers
        self.resume = resume
        self.records: list[RoundRecord] = []

    def run(self) -> Summary:
        """Run from the checkpoint, or from round 0, to the last round or to ``stop``; return the summary.

        Raises:
            UserError: unfit hosts (nothing was written then), a folder in use, or one of another experiment.
            InterruptedRunError: ``stop`` was set before round 0 was complete.
        """
        find_hosts(self.grid, self.env, self.stop)
        with self.folder.claim(self.resume), log_to(self.folder):
            server = self._server()
            self.records = self.folder.keep_rounds(server.round)
            self.folder.summary.unlink(missing_ok=True)
            self._tell(lambda observer: observer.on_start(self.env, self.folder, server.round + 1))
            for record in self.records:
                self._tell_round(record)
            interrupted = False
            try:
                server = self._rounds(server)
            except InterruptedRunError:
                if not self.records:
                    raise
                interrupted, server = True, self._server()
            return self._finish(server, interrupted)

    def _server(self) -> ServerState:
        """Return the state of the checkpoint, or that of a run's start, which is written down then."""
        if (checkpoint := load_checkpoint(self.folder.checkpoint)) is None:
            write_code(self.folder.path, self.env.code)
            write_atomically(self.folder.config, self.env.config.to_toml())
            return start(self.env)
        if checkpoint.fingerprint != self.env.fingerprint:
            raise UserError(
                f"{self.folder.path} was run on other data or another fleet: resume with those, or start a new run"
            )
        return from_checkpoint(self.env, checkpoint)

    def _rounds(self, server: ServerState) -> ServerState:
        strategy = TieredStrategy(self.env, server)
        for server_round in range(server.round + 1, self.env.config.train.rounds + 1):
            started = time.monotonic()
            facts, devices = self._round(strategy, server_round)
            record = RoundRecord(round=server_round, wall_seconds=round(time.monotonic() - started, 4), **facts)
            if devices.loss or devices.test:
                self.folder.append_devices(devices)
            self.folder.append(record)
            save_checkpoint(self.folder.checkpoint, to_checkpoint(self.env, strategy.server))
            self.records.append(record)
            if devices.loss or devices.test:
                self._tell(lambda observer, devices=devices: observer.on_devices(devices))  # type: ignore[misc]
            self._tell_round(record)
        return strategy.server

    def _round(self, strategy: TieredStrategy, server_round: int) -> tuple[dict[str, Any], DeviceRecord]:
        """Run a round; return what its record and that of its devices say."""
        train = self.env.config.train
        facts: dict[str, Any] = {"tiers": {}}
        tested: dict[int, dict[str, float]] = {}
        if server_round == 0:
            strategy.server = replace(strategy.server, round=0)
            facts["metric"] = metric_facts(self.env.task)
        else:
            messages = strategy.train_messages(server_round, self.grid)
            facts |= strategy.receive(server_round, self._exchange(messages, server_round, "train"))
        if server_round % train.evaluate_every == 0 or server_round == train.rounds:
            messages = strategy.evaluate_messages(server_round, self.grid)
            messages += strategy.device_messages(server_round, self.grid)
            replies = self._exchange(messages, server_round, "evaluate")
            facts |= evaluation_facts(self.env.task, strategy.server, strategy.scores(server_round, replies))
            tested = strategy.device_values(server_round, replies)
            facts["device_test"] = device_facts(self.env, tested)
        devices = DeviceRecord.of(server_round, strategy.server.history, tested)
        return facts | rank_facts(self.env, strategy.server), devices

    def _exchange(self, messages: list[Message], server_round: int, phase: str) -> list[Message]:
        done = 0

        def on_reply() -> None:
            nonlocal done
            done += 1
            self._tell(lambda observer: observer.on_progress(server_round, phase, done, len(messages)))

        return exchange(self.grid, messages, self.stop, on_reply, self.env.config.train.reply_timeout_seconds)

    def _finish(self, server: ServerState, interrupted: bool) -> Summary:
        env = self.env
        statistics = norm_statistics(env, server)
        sha256 = write_model(self.folder.path, server.models, model_card(env, server), statistics)
        summary = summarize(
            self.records,
            tier_figures(env, server.plan),
            sha256,
            metric_facts(env.task),
            strategy=env.method.name,
            objective=env.method.objective.name,
            settings=dict(env.method.settings),
            seed=env.config.seed,
            dataset=env.task.name,
            model=env.config.model.name,
            interrupted=interrupted,
        )
        write_record(self.folder.summary, summary)
        self._tell(lambda observer: observer.on_finish(self.folder, summary))
        return summary

    def _tell_round(self, record: RoundRecord) -> None:
        self._tell(lambda observer: observer.on_round(record))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            what(observer)


def model_card(env: Environment, server: ServerState) -> ModelCard:
    """Return the card of a run's model."""
    plan, architecture = server.plan, server.plan.architecture
    separate = plan.setting.rule.separate
    return ModelCard(
        model=env.config.model.name,
        form=architecture.form,
        keep_dense=env.config.model.keep_dense,
        norm=architecture.norm,
        input_shape=list(env.task.input_shape),
        num_classes=env.task.num_classes,
        inputs=architecture.inputs,
        size=plan.full.size,
        tiers={tier.tier.name: tier.serves.size for tier in plan.tiers},
        separate={x.tier.name: storage.owner_of(plan, x.serves) or "" for x in plan.tiers} if separate else {},
        round=server.round,
        **({"kept_dense": architecture.kept_dense} if architecture.own else {}),
        **env.task.facts,
    )


def tier_figures(env: Environment, plan: Plan) -> dict[str, TierFigures]:
    """Return the figures of each tier's submodel under ``plan``, largest first."""
    return {
        tier.tier.name: TierFigures(
            devices=env.tier_of.count(tier.index),
            ranks=tier.serves.size.describe(),
            params=tier.serves.cost.params,
            macs_per_example=tier.serves.cost.macs_per_example,
            train_macs_per_example=tier.step_macs,
            train_memory_bytes=tier.step_memory_bytes,
            download_bytes=tier.serves.cost.download_bytes,
            upload_bytes=tier.serves.cost.upload_bytes,
        )
        for tier in plan.tiers
    }


@contextmanager
def log_to(folder: RunFolder) -> Iterator[None]:
    """Write FedMaestro's log (failed devices with their reasons) to ``run.log`` in the run folder."""
    handler = logging.FileHandler(folder.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fedmaestro")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


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
        return read_cohort(reply)
    reason = "no reply" if reply is None else f"host error: {one_line(reply)}"
    return CohortResult(reports=(), failures=dict.fromkeys(cohort.devices, reason))
