"""The loop over rounds: one run on the hosts behind a grid, with its records, checkpoints and observers.

It is our own because Flower's has no resume, no checkpoint and no per-round history.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmaestro.errors import UserError
from fedmaestro.fleet.clock import device_timing
from fedmaestro.fleet.plan import Plan, TierPlan
from fedmaestro.flower.hosts import exchange, find_hosts
from fedmaestro.flower.tiered_strategy import TieredStrategy
from fedmaestro.flower.watchdog import watched
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.rounds import storage
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.observer import Observer
from fedmaestro.rounds.server import (
    ServerState,
    control_bytes,
    device_facts,
    evaluation_facts,
    from_checkpoint,
    norm_statistics,
    rank_facts,
    start,
    to_checkpoint,
    upload_bytes,
)
from fedmaestro.runs.checkpoint import load_checkpoint, remove_unused, save_checkpoint
from fedmaestro.runs.code import write_code
from fedmaestro.runs.folder import RunFolder, write_atomically, write_record
from fedmaestro.runs.history import HistoryHash, kept_rounds, seal_of
from fedmaestro.runs.model import ModelCard, write_model
from fedmaestro.runs.records import DeviceRecord, RoundRecord, Summary, TierFigures
from fedmaestro.runs.summary import summarize
from fedmaestro.runs.writer import Writer
from fedmaestro.tasks.task import metric_facts

log = logging.getLogger("fedmaestro")


FREE_ON_RESUME = {"out", "data.dir"}
"""Settings that may differ between a run and its continuation: they name places, not the experiment."""

LOSABLE = 1
"""The last round that may be there before the first checkpoint is: that is written beside the next round's work."""


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
        self._history = HistoryHash()

    def run(self) -> Summary:
        """Run from the checkpoint, or from round 0, to the last round or to ``stop``; return the summary.

        Raises:
            UserError: unfit hosts (nothing was written then), a folder in use, or one of another experiment.
            InterruptedRunError: ``stop`` was set before round 0 was complete.
        """
        find_hosts(self.grid, self.env, self.stop)
        with self.folder.claim(self.resume), log_to(self.folder):
            server = self._server()
            self.folder.summary.unlink(missing_ok=True)
            self._tell(Observer.on_start, self.env, self.folder, server.round + 1)
            for record in self.records:
                self._tell(Observer.on_round, record)
            interrupted = False
            self.stopped: str | None = None
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
            if any(record.round > LOSABLE for record in self.folder.read_rounds()):
                raise UserError(f"the checkpoint of {self.folder.path} is gone: restore it, or start a new run")
            write_code(self.folder.path, self.env.code)
            write_atomically(self.folder.config, self.env.config.to_toml())
            self.records, self._history = kept_rounds(self.folder, -1, None)
            return start(self.env)
        if checkpoint.fingerprint != self.env.fingerprint:
            raise UserError(
                f"{self.folder.path} was run on other data or another fleet: resume with those, or start a new run"
            )
        written = checkpoint.facts.get("written", {})
        if written.get("config", self._settings) != self._settings:
            raise UserError(
                f"{self.folder.config} was changed since the run was started: restore it, or start a new run"
            )
        self.records, self._history = kept_rounds(self.folder, checkpoint.number, written.get("history"))
        remove_unused(self.folder.checkpoint)
        return from_checkpoint(self.env, checkpoint)

    @cached_property
    def _settings(self) -> str:
        """Return the hash of all settings that a continuation must share."""
        settings = {key: value for key, value in self.env.config.flat().items() if key not in FREE_ON_RESUME}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _rounds(self, server: ServerState) -> ServerState:
        """Run the rounds that are left; the evaluation of each overlaps with the training of the next."""
        strategy, rounds = TieredStrategy(self.env, server), self.env.config.train.rounds
        pending = _Pending()
        self._completed = time.monotonic()
        idle = idle_rounds(self.records)
        with Writer() as writer:
            for number in range(server.round + 1, rounds + 1):
                facts: dict[str, Any] = {"metric": metric_facts(self.env.task)}
                if number == 0:
                    strategy.server = replace(strategy.server, round=0)
                else:
                    messages = strategy.train_messages(number, self.grid, pending.messages)
                    self._exchange(strategy, pending, messages, number, writer)
                    facts = strategy.trained(number)
                idle = idle + 1 if number and not facts["devices"] else 0
                self.stopped = self._why_stop(idle, number, facts) if number < rounds else None
                last = number == rounds or self.stopped is not None
                pending = self._pending(strategy, number, facts, last=last)
                if not pending.messages:
                    self._complete(strategy, pending, writer)
                if last:
                    break
            self._exchange(strategy, pending, [], rounds, writer)
        return strategy.server

    def _why_stop(self, idle: int, number: int, facts: dict[str, Any]) -> str | None:
        """Return why the run should not go on after a round; None: it should."""
        limit = self.env.config.train.max_idle_rounds
        if self.env.privacy is not None:  # how many rounds there are would say who took part
            return None
        if not limit or idle < limit:
            return None
        why = ", ".join(f"{count} × {kind}" for kind, count in facts["failed_by"].items())
        lost = "; ".join(x for x in (why, f"{facts['dropped']} dropped" if facts["dropped"] else "") if x)
        return (
            f"stopped after round {number}: no update counted in {idle} rounds in a row "
            f"(train.max-idle-rounds; in the last one: {lost or 'no device was sampled'})"
        )

    def _pending(self, strategy: TieredStrategy, number: int, facts: dict[str, Any], *, last: bool) -> "_Pending":
        """Return what there is of a round once it has trained; the last one is evaluated."""
        train = self.env.config.train
        messages = []
        if number % train.evaluate_every == 0 or last:
            messages = strategy.evaluate_messages(number, self.grid) + strategy.device_messages(number, self.grid)
        return _Pending(server=strategy.server, facts={"tiers": {}} | facts, messages=messages, missing=len(messages))

    def _exchange(
        self, strategy: TieredStrategy, pending: "_Pending", messages: list[Message], number: int, writer: Writer
    ) -> None:
        """Let the hosts evaluate what is pending and train the next round; complete the former as soon as it can be."""
        evaluations = {id(message) for message in pending.messages}
        trained = 0
        timeout = self.env.config.train.reply_timeout_seconds
        everything = [*pending.messages, *messages]
        predicted = strategy.predicted_seconds(everything, self.grid)
        with watched(f"round {number}", len(everything), predicted) as watch:
            for sent, reply in exchange(self.grid, everything, self.stop, timeout):
                watch.replied()
                strategy.take(sent, reply)
                if id(sent) in evaluations:
                    pending.missing -= 1
                    assert pending.server is not None
                    done, total = len(evaluations) - pending.missing, len(evaluations)
                    self._tell(Observer.on_progress, pending.server.round, "evaluate", done, total)
                else:
                    trained += 1
                    self._tell(Observer.on_progress, number, "train", trained, len(messages))
                if not pending.missing and not pending.complete:
                    self._complete(strategy, pending, writer)
        if not pending.complete:
            self._complete(strategy, pending, writer)

    def _complete(self, strategy: TieredStrategy, pending: "_Pending", writer: Writer) -> None:
        """Write the record and the checkpoint of a round, all of whose replies are there or come too late."""
        pending.complete = True
        server, facts = pending.server, pending.facts
        assert server is not None
        tested: Mapping[int, Mapping[str, float]] = {}
        if pending.messages:
            facts |= evaluation_facts(self.env.task, server, strategy.scores(server.round))
            tested = strategy.device_values(server.round)
            facts["device_test"] = device_facts(self.env, tested)
        now = time.monotonic()
        seconds, self._completed = now - self._completed, now
        devices = DeviceRecord.of(server.round, server.history, tested)
        facts |= rank_facts(self.env, server)
        record = RoundRecord(round=server.round, wall_seconds=round(seconds, 4), **facts)
        told = bool(devices.loss or devices.test)
        if told:
            self.folder.append_devices(devices)
            self._history.add(devices)
        self.folder.append(record)
        self._history.add(record)
        written = {"config": self._settings, "history": self._history.digest}
        writer.write(save_checkpoint, self.folder.checkpoint, to_checkpoint(self.env, server, written))
        self.records.append(record)
        if told:
            self._tell(Observer.on_devices, devices)
        self._tell(Observer.on_round, record)

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
            split="validation" if env.config.data.validation else "test",
            interrupted=interrupted,
            stopped=self.stopped,
            delta=None if env.privacy is None else env.privacy.delta,
        )
        summary = summary.model_copy(update={"seal": seal_of(summary, self._history)})
        if self.stopped:
            log.warning("%s", self.stopped)
        write_record(self.folder.summary, summary)
        self._tell(Observer.on_finish, self.folder, summary)
        return summary

    def _tell(self, what: Callable[..., None], *about: Any) -> None:
        """Tell every observer by the method of this name."""
        for observer in self.observers:
            getattr(observer, what.__name__)(*about)


def idle_rounds(records: Sequence[RoundRecord]) -> int:
    """Return how many rounds at the end had no update that counts."""
    idle = 0
    for record in reversed(records):
        if record.round == 0 or record.devices:
            break
        idle += 1
    return idle


@dataclass(kw_only=True)
class _Pending:
    """A round that has trained; its record is complete once its evaluation is."""

    server: ServerState | None = None
    """After the round; None: there is no such round."""
    facts: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    missing: int = 0
    """Replies to them that are not there yet."""
    complete: bool = False

    def __post_init__(self) -> None:
        self.complete = self.server is None


def model_card(env: Environment, server: ServerState) -> ModelCard:
    """Return the card of a run's model."""
    plan, architecture = server.plan, server.plan.architecture
    separate = plan.setting.rule.separate
    return ModelCard(
        model=env.config.model.name,
        form=architecture.form,
        keep_dense=env.config.model.keep_dense,
        norm=architecture.norm,
        width=architecture.width,
        scales=architecture.scales,
        exits=architecture.exits,
        input_shape=list(env.task.input_shape),
        num_classes=env.task.num_classes,
        inputs=architecture.inputs,
        size=plan.full.size,
        tiers={tier.tier.name: tier.serves.size for tier in plan.tiers},
        per_tier=sorted(plan.setting.own),
        separate={x.tier.name: storage.owner_of(plan, x.serves) or "" for x in plan.tiers} if separate else {},
        round=server.round,
        **({"kept_dense": architecture.kept_dense} if architecture.own else {}),
        **env.task.facts,
    )


def tier_figures(env: Environment, plan: Plan) -> dict[str, TierFigures]:
    """Return the figures of each tier under ``plan``, largest first."""
    return {tier.tier.name: _figures(env, plan, tier) for tier in plan.tiers}


def _figures(env: Environment, plan: Plan, tier: TierPlan) -> TierFigures:
    serves, trained = tier.serves, plan.trained_by(tier)
    submodels = [part.trains for part in trained if part.trains is not None]
    # Where factors alternate, the mean of two rounds.
    uploads = [upload_bytes(env, submodel, number) for submodel in submodels for number in (1, 2)]
    return TierFigures(
        devices=env.devices_of[tier.index],
        ranks=serves.size.describe(),
        params=serves.cost.params,
        macs_per_example=serves.cost.macs_per_example,
        train_macs_per_example=round(sum(env.method.step_macs(x, number) for x in trained for number in (1, 2)) / 2),
        train_memory_bytes=tier.step_memory_bytes,
        download_bytes=sum(x.cost.download_bytes + control_bytes(env, x) for x in submodels),
        upload_bytes=round(sum(uploads) / 2),
        round_seconds=sum(_seconds(env, tier, part, number) for part in trained for number in (1, 2)) / 2,
    )


def _seconds(env: Environment, tier: TierPlan, part: TierPlan, server_round: int) -> float:
    """Return what a device of ``tier`` with a mean number of examples takes for the submodel of ``part``."""
    assert part.trains is not None
    examples = round(env.config.train.local_epochs * float(env.parts.sizes.mean()))
    more = control_bytes(env, part.trains)
    cost = replace(
        part.trains.cost,
        download_bytes=part.trains.cost.download_bytes + more,
        upload_bytes=upload_bytes(env, part.trains, server_round),
    )
    return device_timing(tier.tier, cost, examples, env.method.step_macs(part, server_round)).total


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
