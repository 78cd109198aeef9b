"""The loop over rounds: own because Flower's has no resume, no checkpoint and no per-round history."""

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from fedmaestro.data import class_counts
from fedmaestro.errors import UserError
from fedmaestro.fleet.plan import Plan
from fedmaestro.flower import wire
from fedmaestro.flower.hosts import InterruptedRunError, exchange, find_hosts
from fedmaestro.flower.strategy import TieredStrategy
from fedmaestro.report import plot_partition, write_run_report
from fedmaestro.rounds import spectrum, storage
from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_model
from fedmaestro.runs.folder import RoundRecord, RunFolder, summarize, write_atomically
from fedmaestro.submodel import State


class Observer(Protocol):
    """What wants to know how a run goes; called from the server's thread."""

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:
        """The hosts are there; ``first_round`` is 1, or the one after the checkpoint."""

    def on_progress(self, server_round: int, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` messages of this phase (train, evaluate) are back."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is complete and written."""


class Federation:
    """One run on the hosts behind ``grid``.

    Args:
        grid: Flower's connection to the hosts.
        env: the experiment.
        folder: where everything goes; ``prepare_folder`` has checked it.
        stop: set from outside to end the run after what is complete.
        observer: is told about the progress.
        resume: go on with the run in ``folder``; without it, a folder that holds one is refused.
        report: also write plots and ``report.html``.
    """

    def __init__(
        self,
        grid: Grid,
        env: Environment,
        folder: RunFolder,
        stop: threading.Event,
        observer: Observer | None = None,
        *,
        resume: bool = False,
        report: bool = True,
    ) -> None:
        self.grid, self.env, self.folder, self.stop, self.observer = grid, env, folder, stop, observer
        self.resume, self.report = resume, report
        self.records: list[RoundRecord] = []

    def run(self) -> dict[str, Any]:
        """Run from the checkpoint, or from round 0, to the last round or to ``stop``; return the summary.

        Raises:
            UserError: unfit hosts (nothing was written then), a folder in use, or one of another experiment.
            InterruptedRunError: ``stop`` was set before round 0 was complete.
        """
        find_hosts(self.grid, self.env, self.stop)
        with self.folder.claim(self.resume), log_to(self.folder):
            checkpoint = load_checkpoint(self.folder.checkpoint) or self._start()
            if checkpoint.fingerprint != self.env.fingerprint:
                raise UserError(
                    f"{self.folder.path} was run on other data or another fleet: resume with those, or start a new run"
                )
            self.records = self.folder.keep_rounds(checkpoint.round)
            self.folder.summary.unlink(missing_ok=True)
            if self.observer is not None:
                self.observer.on_start(self.env, self.folder, checkpoint.round + 1)
                for record in self.records:
                    self.observer.on_round(record)
            interrupted = False
            try:
                checkpoint = self._rounds(checkpoint)
            except InterruptedRunError:
                interrupted = True
                checkpoint = load_checkpoint(self.folder.checkpoint) or checkpoint
                if not self.records:
                    raise
            return self._finish(checkpoint, interrupted)

    def _start(self) -> Checkpoint:
        """Write the configuration and the partition's picture; return the initial model, before round 0."""
        env = self.env
        write_atomically(self.folder.config, env.config.to_toml())
        if self.report:
            self._plot_partition()
        return Checkpoint(round=-1, global_state=env.initial_state(), server_memory={}, fingerprint=env.fingerprint)

    def _plot_partition(self) -> None:
        env = self.env
        self.folder.plots.mkdir(parents=True, exist_ok=True)
        plot_partition(
            class_counts(env.dataset.train_labels, env.parts, env.dataset.num_classes),
            self.folder.plots / "partition",
            tiers=[env.tier(device).tier.name for device in range(len(env.parts))],
            tier_order=[tier.tier.name for tier in env.plan.tiers],
            title=f"{env.dataset.name}: examples of each device by class",
        )

    def _rounds(self, checkpoint: Checkpoint) -> Checkpoint:
        train = self.env.config.train
        strategy = TieredStrategy(self.env, checkpoint)
        arrays = wire.to_arrays(checkpoint.global_state)
        for server_round in range(checkpoint.round + 1, train.rounds + 1):
            started = time.monotonic()
            arrays, record = self._round(strategy, server_round, arrays)
            record = replace(record, wall_seconds=round(time.monotonic() - started, 4))
            checkpoint = Checkpoint(
                round=server_round,
                global_state=wire.to_state(arrays),
                server_memory=strategy.server_memory,
                updates=strategy.updates,
                ranks=strategy.ranks,
                fingerprint=self.env.fingerprint,
            )
            self.folder.append(record)
            save_checkpoint(self.folder.checkpoint, checkpoint)
            self.records.append(record)
            if self.observer is not None:
                self.observer.on_round(record)
        return checkpoint

    def _round(
        self, strategy: TieredStrategy, server_round: int, arrays: ArrayRecord
    ) -> tuple[ArrayRecord, RoundRecord]:
        train, config = self.env.config.train, ConfigRecord()
        metrics = MetricRecord()
        if server_round > 0:
            messages = list(strategy.configure_train(server_round, arrays, config, self.grid))
            arrays, metrics = strategy.aggregate_train(server_round, self._exchange(messages, server_round, "train"))
        tiers: dict[str, dict[str, float | None]] = {}
        if server_round % train.evaluate_every == 0 or server_round == train.rounds:
            messages = list(strategy.configure_evaluate(server_round, arrays, config, self.grid))
            scores = strategy.aggregate_evaluate(server_round, self._exchange(messages, server_round, "evaluate"))
            tiers = _by_tier(scores or MetricRecord())
        facts = self._new_ranks(strategy.plan, server_round)
        if tiers:
            facts["tail_energy"] = _tail_energy(strategy.plan, wire.to_state(arrays))
        return arrays, RoundRecord(round=server_round, tiers=tiers, **facts, **metrics)  # type: ignore[arg-type]

    def _new_ranks(self, plan: Plan, server_round: int) -> dict[str, Any]:
        """Return what a round's record says about ranks: nothing in most rounds, and where they cannot change."""
        rule = self.env.rederivation
        if not (rule.active and (server_round == 0 or rule.due(server_round, self.env.config.train.rounds))):
            return {}
        by_tier = {tier.tier.name: dict(tier.serves.size.ranks or {}) for tier in plan.tiers}
        return {"ranks": by_tier, "full_ranks": dict(plan.full.size.ranks or {})}

    def _exchange(self, messages: list[Any], server_round: int, phase: str) -> list[Any]:
        done = 0

        def on_reply() -> None:
            nonlocal done
            done += 1
            if self.observer is not None:
                self.observer.on_progress(server_round, phase, done, len(messages))

        timeout = self.env.config.train.reply_timeout_seconds
        return exchange(self.grid, messages, self.stop, on_reply, timeout)

    def _finish(self, checkpoint: Checkpoint, interrupted: bool) -> dict[str, Any]:
        env, plan = self.env, self.env.plan_at(checkpoint.ranks)
        facts = run_facts(env) | ({"interrupted": True} if interrupted else {})
        tiers = tier_facts(env, plan)
        card = {
            "model": env.config.model.name,
            "form": plan.architecture.form,
            "keep_dense": env.config.model.keep_dense,
            "norm": plan.architecture.norm,
            "input_shape": list(env.dataset.image_shape),
            "num_classes": env.dataset.num_classes,
            "mean": list(env.dataset.mean),
            "std": list(env.dataset.std),
            "size": plan.full.size.to_json(),
            "tiers": {tier.tier.name: tier.serves.size.to_json() for tier in plan.tiers},
            "round": checkpoint.round,
        }
        if plan.setting.rule.separate:
            card["separate"] = {tier.tier.name: storage.owner_of(plan, tier.serves) for tier in plan.tiers}
        sha256 = write_model(self.folder.path, checkpoint.global_state, card)
        summary = summarize(self.records, tiers, facts, sha256)
        write_atomically(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        if self.report:
            write_run_report(self.folder.path)
        return summary


def _tail_energy(plan: Plan, state: State) -> float | None:
    smallest = plan.tiers[-1].serves.size.ranks
    return None if plan.setting.rule.separate or not smallest else spectrum.tail_energy(state, smallest)


def _by_tier(scores: MetricRecord) -> dict[str, dict[str, float | None]]:
    """Turn ``accuracy.TIER`` into ``{TIER: {"accuracy": …}}``; what is not finite becomes None (JSON has no NaN)."""
    tiers: dict[str, dict[str, float | None]] = {}
    for key, value in dict[str, Any](scores).items():
        metric, _, tier = key.partition(".")
        tiers.setdefault(tier, {})[metric] = value if math.isfinite(value) else None
    return tiers


def run_facts(env: Environment) -> dict[str, Any]:
    """Return what identifies a run in its summary."""
    return {
        "strategy": env.strategy.name,
        "objective": env.objective.name,
        "reorder_every": env.strategy.reorder_every,
        "tail_start": env.strategy.tail_start,
        "tail_decay": env.strategy.tail_decay,
        "logit_adjustment": env.strategy.logit_adjustment,
        "seed": env.config.seed,
        "dataset": env.dataset.name,
        "model": env.config.model.name,
    }


def tier_facts(env: Environment, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the figures of each tier's submodel under ``plan``, largest first."""
    return {
        tier.tier.name: {
            "devices": env.tier_of.count(tier.index),
            "ranks": tier.serves.size.describe(),
            "params": tier.serves.cost.params,
            "macs_per_example": tier.serves.cost.macs_per_example,
            "train_macs_per_example": tier.step_macs,
            "train_memory_bytes": tier.step_memory_bytes,
            "download_bytes": tier.serves.cost.download_bytes,
            "upload_bytes": tier.serves.cost.upload_bytes,
        }
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
