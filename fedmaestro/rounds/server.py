"""The server's side of a round: one pure step from what it has and what came back to what the next round starts from.

``start`` makes the state before round 0; a ``Gathering`` adds up what the cohorts of a round bring back, along the
tiers' trees; ``step`` is the aggregation, the chain of server steps, and whatever the storage and the ranks ask for.
Arrays are encoded and decoded outside, at the edge to Flower and to the checkpoint.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmaestro import rng
from fedmaestro.clients.scaffold import Control
from fedmaestro.config.experiment import FleetConfig, TrainConfig
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import BYTES_PER_SCALAR
from fedmaestro.fleet.holders import expected_holders
from fedmaestro.fleet.learned import Ranked, count_updates, no_updates, rederive
from fedmaestro.fleet.plan import Plan, Submodel, encode_ranks
from fedmaestro.fleet.selection import History
from fedmaestro.models.static_norm import calibrate, statistics
from fedmaestro.rounds import spectrum, storage
from fedmaestro.rounds.admission import Asked
from fedmaestro.rounds.cohorts import Cohort
from fedmaestro.rounds.device import (
    CohortResult,
    DeviceReport,
    Node,
    join,
    measured_stack,
    read_node,
    sent_back,
    sizes_of,
)
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.failure import Failure
from fedmaestro.rounds.norms import UpdateNorms, scale_of
from fedmaestro.rounds.privacy import expected_devices
from fedmaestro.rounds.schedule import Schedule, schedule_round
from fedmaestro.rounds.storage import Models, Owner
from fedmaestro.rounds.tree import Tree
from fedmaestro.runs.checkpoint import Checkpoint, Key, below
from fedmaestro.runs.code import user_code
from fedmaestro.runs.records import Updates
from fedmaestro.strategies.base import WEIGHTED_SUMS, AnyPartial, add_to_leading_block
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
from fedmaestro.strategies.server_step import ChainMemory, Round, run_chain
from fedmaestro.submodel import State, cut, load, num_elements
from fedmaestro.tasks.task import CALIBRATION, Score, Task
from fedmaestro.threads import one_thread


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """Everything that the server carries from round to round."""

    round: int
    """The last complete one; -1 at the start, before the evaluation that is round 0."""
    models: Models
    """The global state: usually one model, which all tiers share."""
    memory: Mapping[Owner, ChainMemory] = field(default_factory=dict)
    """Of the chain's steps, for each model."""
    updates: State = field(default_factory=dict)
    """Device updates that have trained each column, ``(R,)`` int64 by layer; empty where ranks cannot change."""
    plan: Plan
    """Who trains and is served what, at the current ranks."""
    history: History
    """What is known of the devices, for their selection."""
    control: State = field(default_factory=dict)
    """SCAFFOLD's control variate of the server; a tensor that is not there is zero."""
    controls: Mapping[int, State] = field(default_factory=dict)
    """Those of the devices that have trained."""
    norms: UpdateNorms = field(default_factory=UpdateNorms)
    """What bounds the next updates."""
    stack: int = 1
    """Devices of a tier that train as one stacked model at most."""


def start(env: Environment) -> ServerState:
    """Return the server's state at the start of a run."""
    seed = rng.derived_seed(env.config.seed, "init")
    models = storage.stored(env.plan, env.plan.architecture.initial_state(seed))
    holders = expected_holders(env.plan, env.devices_of, env.config.train.devices_per_round)
    for owner in models:
        for link in env.method.server:
            # A model of its own is held by all of its devices.
            models[owner] = link.start(models[owner], holders if owner is None else {})
    updates = no_updates(env.plan) if env.rederivation.active else {}
    history = History.empty(len(env.parts))
    stack = measured_stack(env, models) if env.config.train.stack is None else env.config.train.stack
    return ServerState(round=-1, models=models, updates=updates, plan=env.plan, history=history, stack=stack)


def opened(server: ServerState, server_round: int) -> ServerState:
    """Return the state as a round (from 1 on) starts from it: windows of channels move on (``storage``).

    Between rounds the window lies where it was trained, so that is what tiers are served and evaluated on.
    """
    if not server.plan.setting.rule.rolls or server_round == 1:
        return server

    def moved(state: State) -> State:
        return _contiguous(storage.advanced(server.plan, state))

    memory = {
        owner: {name: {slot: moved(state) for slot, state in slots.items()} for name, slots in chain.items()}
        for owner, chain in server.memory.items()
    }
    return replace(server, models={owner: moved(state) for owner, state in server.models.items()}, memory=memory)


def step(env: Environment, server: ServerState, partials: Mapping[Owner, AnyPartial], server_round: int) -> ServerState:
    """Return the server's state after a round.

    Args:
        env: the experiment: aggregation, chain, and when ranks change.
        server: before the round, ``opened``; not changed.
        partials: what the devices of each model amount to. When nobody trained, only ranks may change.
        server_round: from 1 on.
    """
    models, memory = dict(server.models), dict(server.memory)
    # With privacy, noise says nothing about whether anybody trained.
    if env.privacy is not None or any(partial.devices for partial in partials.values()):
        for owner, before in server.models.items():
            aggregation, expected = env.method.aggregation, expected_of(env, server, owner, server_round)
            whole = storage.whole(server.plan, server.models, owner)
            partial = partials[owner]
            this = Round(
                number=server_round,
                before=before,
                # What the steps of the chain could see of the devices would not be private.
                partial=partial if env.privacy is None else aggregation.init(before),
                aggregation=aggregation,
                expected=expected,
            )
            with user_code(f"aggregation {aggregation.name!r} in round {server_round}"):
                if env.privacy is None or expected is None:
                    aggregated = aggregation.finish(partial, whole)
                else:
                    aggregated = env.privacy.released(partial, before, expected, server_round, owner)
                aggregated = _same_shapes(aggregated, whole, aggregation.name)
            aggregated = {name: aggregated[name] for name in before}
            with user_code(f"server.steps in round {server_round}"):
                state, kept = run_chain(env.method.server, aggregated, memory.get(owner, {}), this)
            _same_shapes(state, before, "server.steps")
            models[owner], memory[owner] = _contiguous(state), kept
    updates = server.updates
    if updates:
        for shapes, block in partials[None]:
            ranks = {layer: shapes[f"{layer}.v"][0] for layer in updates}
            updates = count_updates(updates, ranks, block.devices)
    after = replace(server, round=server_round, models=models, memory=memory, updates=updates)
    return _rederived(env, after) if env.rederivation.due(server_round, env.config.train.rounds) else after


def expected_of(env: Environment, server: ServerState, owner: Owner, server_round: int) -> State | None:
    """Return how many devices hold each entry of a model in expectation, with privacy; None without."""
    if env.privacy is None:
        return None
    sizes = {
        tier.index: sent_back(env, tier.trains, server_round)
        for tier in server.plan.tiers
        if tier.trains is not None and storage.owner_of(server.plan, tier.trains) == owner
    }
    return expected_devices(server.plan, env.devices_of, env.privacy.rate, sizes, server.models[owner])


def _same_shapes(state: Any, before: State, what: str) -> State:
    """Return ``state``; UserError unless it has the tensors of the model before, by name and shape."""
    if not isinstance(state, Mapping) or state.keys() != before.keys():
        got = sorted(state)[:5] if isinstance(state, Mapping) else type(state).__name__
        raise UserError(f"{what} must return every tensor of the model by its name, returned {got}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != tuple(before[name].shape):
            raise UserError(
                f"{what} returned {name!r} of shape {tuple(tensor.shape)}, it was {tuple(before[name].shape)}"
            )
    return dict(state)


def _rederived(env: Environment, server: ServerState) -> ServerState:
    """Return the state at the ranks that follow from the model, which all tiers share."""
    now = Ranked(
        plan=server.plan, state=server.models[None], memory=server.memory.get(None, {}), updates=server.updates
    )
    new = rederive(env.plan, now, env.rederivation)
    # Tensors of the tiers' own are no factors: their shapes are those of any ranks.
    models, memory = {**server.models, None: new.state}, {**server.memory, None: new.memory}
    return replace(server, models=models, memory=memory, updates=new.updates, plan=new.plan)


def _contiguous(state: State) -> State:
    # As a checkpoint gives them back: a resumed run must not meet other strides.
    return {name: tensor.contiguous() for name, tensor in state.items()}


def schedule(env: Environment, server: ServerState, server_round: int) -> Schedule:
    """Return who trains in a round."""
    train, fleet = env.config.train, env.config.fleet
    with user_code(f"selection {train.selection!r} in round {server_round}"):
        return _scheduled(env, server, server_round, train, fleet)


def _scheduled(
    env: Environment, server: ServerState, server_round: int, train: TrainConfig, fleet: FleetConfig
) -> Schedule:
    return schedule_round(
        plan=server.plan,
        tier_of=env.tiers_in(server_round),
        examples=env.parts.sizes,
        seed=env.config.seed,
        server_round=server_round,
        devices_per_round=train.devices_per_round,
        local_epochs=train.local_epochs,
        over_commit=fleet.over_commit,
        deadline_seconds=fleet.deadline_seconds,
        step_macs=lambda tier: env.method.step_macs(tier, server_round),
        upload_bytes=lambda submodel: upload_bytes(env, submodel, server_round),
        more_download_bytes=lambda submodel: control_bytes(env, submodel),
        selection=env.method.selection,
        history=server.history,
    )


def upload_bytes(env: Environment, submodel: Submodel, server_round: int) -> int:
    """Return the bytes of a device's upload."""
    kept = num_elements(submodel.shapes) - num_elements(dict(sent_back(env, submodel, server_round)))
    return submodel.cost.upload_bytes - BYTES_PER_SCALAR * kept + control_bytes(env, submodel)


def control_bytes(env: Environment, submodel: Submodel) -> int:
    """Return the bytes that control variates add to a device's download, and to its upload."""
    return BYTES_PER_SCALAR * num_elements(submodel.shapes) if env.method.correction == "scaffold" else 0


def control_of(server: ServerState, submodel: Submodel) -> State:
    """Return the server's control variate of a submodel."""
    shapes = {name: shape for name, shape in submodel.shapes.items() if name in server.control}
    return cut(server.control, shapes)


def with_controls(env: Environment, server: ServerState, new: Mapping[int, State]) -> ServerState:
    """Return the state after devices have sent their new control variates (``clients.scaffold``)."""
    whole = server.models[None]
    holders = {name: torch.zeros_like(whole[name], dtype=torch.float64) for name in whole}
    for tier in server.plan.tiers:
        if tier.trains is not None:
            for name, shape in tier.trains.shapes.items():
                add_to_leading_block(holders[name], env.devices_of[tier.index], shape)
    change = {name: torch.zeros_like(whole[name], dtype=torch.float64) for name in whole}
    for device in sorted(new):
        known = server.controls.get(device, {})
        for name, tensor in new[device].items():
            moved = tensor.double() - (known[name].double() if name in known else 0.0)
            add_to_leading_block(change[name], moved, tuple(tensor.shape))
    names = {name for state in new.values() for name in state} | {*server.control}
    control = {
        name: (
            (server.control[name].double() if name in server.control else 0.0)
            + change[name] / holders[name].clamp(min=1)
        )
        .to(whole[name].dtype)
        .contiguous()
        for name in whole
        if name in names
    }
    return replace(server, control=control, controls={**server.controls, **new})


class Gathering:
    """What the cohorts of one round bring back, added up as it comes, in any order.

    Attributes:
        reports: of the devices that trained, ascending within a tier once all are there.
        failures: by device.
        controls: new control variates by device.
    """

    def __init__(self, env: Environment, server: ServerState, schedule: Schedule, server_round: int) -> None:
        self._env, self._server, self._schedule, self._round = env, server, schedule, server_round
        add = join(env.method.aggregation)
        self._trees = {group.tier.index: Tree(len(group.devices), add) for group in schedule.groups}
        self._starts: dict[Submodel, State] = {}
        self._scales: dict[Submodel, float] = {}
        self._norms: list[float] = []
        self.reports: list[DeviceReport] = []
        self.failures: dict[int, Failure] = {}
        self.controls: dict[int, State] = {}
        self._upload_bytes = 0

    def start_of(self, submodel: Submodel) -> State:
        """Return the submodel as it is sent in this round."""
        if submodel not in self._starts:
            self._starts[submodel] = storage.download(self._server.plan, self._server.models, submodel)
        return self._starts[submodel]

    def bound_of(self, submodel: Submodel) -> float:
        """Return the largest norm of the update of a device that trains ``submodel``."""
        if self._env.privacy is not None:
            # Public, and the sensitivity rests on it; a bound by others' norms would let devices depend on each other.
            return self._env.privacy.clip_norm
        factor = self._env.config.train.max_update_norm
        return self._server.norms.bound(factor, self._scale_of(submodel))

    def _scale_of(self, submodel: Submodel) -> float:
        if submodel not in self._scales:
            self._scales[submodel] = scale_of(self.start_of(submodel))
        return self._scales[submodel]

    def asked(self, cohort: Cohort) -> Asked:
        """Return what the hosts are asked about a cohort."""
        env, server = self._env, self._server
        return Asked(
            env=env,
            plan=server.plan,
            submodel=cohort.submodel,
            devices=cohort.devices,
            start=self.start_of(cohort.submodel),
            round=self._round,
            bound=self.bound_of(cohort.submodel),
            controls=self._controls_of(cohort) if env.method.correction == "scaffold" else None,
        )

    def _controls_of(self, cohort: Cohort) -> dict[int, Control]:
        ours = control_of(self._server, cohort.submodel)
        return {device: Control(server=ours, own=self._server.controls.get(device, {})) for device in cohort.devices}

    def receive(self, cohort: Cohort, result: CohortResult) -> None:
        """Add the result of a cohort, which ``admission`` has let in."""
        self._norms += [report.norm / self._scale_of(cohort.submodel) for report in result.reports]
        submodel = cohort.submodel
        self.failures |= result.failures
        self.reports += result.reports
        self.controls |= result.controls
        self._upload_bytes += upload_bytes(self._env, submodel, self._round) * len(result.reports)
        start, count = self.start_of(submodel), len(cohort.devices)
        node = read_node(self._env, self._server.plan, submodel, start, result, count, self._round)
        self._trees[cohort.tier.index].put(cohort.span, node)

    @property
    def norms(self) -> UpdateNorms:
        """What is known of updates after this round."""
        return self._server.norms.after(self._norms)

    @cached_property
    def _nodes(self) -> dict[Owner, Node]:
        """What the devices of each model amount to, the tiers' trees added up from the largest on."""
        add = join(self._env.method.aggregation)
        nodes: dict[Owner, Node] = {}
        for group in self._schedule.groups:
            if (node := self._trees[group.tier.index].root) is not None:
                owner = storage.owner_of(self._server.plan, group.submodel)
                nodes[owner] = add(nodes[owner], node) if owner in nodes else node
        return nodes

    @cached_property
    def partials(self) -> dict[Owner, AnyPartial]:
        """What the devices of each model amount to, without the probes; all cohorts must be there."""
        sizes = sizes_of(self._env, self._server.plan, self._round)
        nodes = self._nodes | self._own_nodes
        return {
            owner: nodes[owner].partial
            if owner in nodes
            else self._env.method.aggregation.init(model, sizes.get(owner, ()))
            for owner, model in self._server.models.items()
        }

    @property
    def _own_nodes(self) -> dict[Owner, Node]:
        """What the devices of each tier amount to, where tiers have tensors of their own."""
        tiers = self._server.plan.tiers if self._server.plan.setting.own else ()
        roots = {tier.tier.name: self._trees[tier.index].root for tier in tiers if tier.index in self._trees}
        return {name: node for name, node in roots.items() if node is not None}

    def facts(self) -> dict[str, Any]:
        """Return what ``RoundRecord`` says of the round's training."""
        examples, attackers = sum(report.examples for report in self.reports), self._env.attackers
        loss = math.fsum(report.loss * report.examples for report in self.reports)
        trained = self._trained()
        return {
            "train_loss": loss / examples if self.reports else None,
            "devices": len(trained),
            "failed": len(self.failures),
            "failed_by": dict(sorted(Counter(failure.kind for failure in self.failures.values()).items())),
            "dropped": len(self._schedule.dropped),
            "attackers": 0 if attackers is None else sum(device in attackers.devices for device in trained),
            "updates": self._updates(),
            "download_bytes": self._schedule.download_bytes,
            "upload_bytes": self._upload_bytes,
            "virtual_seconds": self._schedule.virtual_seconds,
            "epsilon": None if self._env.privacy is None else self._env.privacy.epsilon(self._round),
            "factor_bias": self._factor_bias(),
        }

    def _trained(self) -> set[int]:
        """Return the devices all of whose updates count: of one submodel, or of all that they train."""
        return {report.device for report in self.reports} - self.failures.keys()

    def _updates(self) -> dict[str, Updates]:
        tiers = self._server.plan.tiers
        of = self._env.tiers_in(self._round)
        trained = Counter(int(of[device]) for device in self._trained())
        failed = Counter(int(of[device]) for device in self.failures)
        dropped = Counter(int(of[device]) for device in self._schedule.dropped)
        return {
            tier.tier.name: Updates(
                sampled=sampled, trained=trained[tier.index], failed=failed[tier.index], dropped=dropped[tier.index]
            )
            for tier in tiers
            if (sampled := trained[tier.index] + failed[tier.index] + dropped[tier.index])
        }

    def _factor_bias(self) -> float | None:
        """Return the round's factor bias; None for rules that do not average factors."""
        averages = self._env.method.aggregation.reduction is WEIGHTED_SUMS
        probes = self._nodes[None].probes if None in self._nodes else {}
        if not probes or not averages:
            return None
        partial, before = self.partials[None], self._server.models[None]
        means = COVERAGE_MEAN.finish(partial, before)
        with one_thread():
            segments = spectrum.rank_segments(self._server.plan)
            return spectrum.factor_bias(probes, partial, means, before, segments)


def evaluation_facts(task: Task, server: ServerState, scores: Mapping[Submodel, Score]) -> dict[str, Any]:
    """Return what ``RoundRecord`` says of an evaluation.

    Args:
        task: what it was scored by.
        server: what was evaluated.
        scores: of the serving submodels whose evaluation succeeded.
    """
    tiers: dict[str, dict[str, float | None]] = {}
    for tier in server.plan.tiers:
        if (score := scores.get(tier.serves)) is not None:
            values = {name: finite(value) for name, value in task.values(score).items()}
            tiers[tier.tier.name] = {**values, "loss": finite(score.loss)}
    smallest = server.plan.tiers[-1].serves.size.ranks
    if not tiers or not smallest or None not in server.models:
        return {"tiers": tiers}
    return {"tiers": tiers, "tail_energy": spectrum.tail_energy(server.models[None], smallest)}


def device_facts(env: Environment, values: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Return what ``RoundRecord`` says of the devices' own tests: mean and spread of the main metric in each tier.

    Args:
        env: the experiment.
        values: every metric of the devices that were tested.
    """
    main = env.task.main
    facts: dict[str, dict[str, float | None]] = {}
    for tier in env.plan.tiers:
        own = [of_device[main.name] for d, of_device in values.items() if env.tier_of[d] == tier.index]
        known = np.sort([x for x in own if math.isfinite(x)])
        if len(known):
            worst = known if main.higher_is_better else known[::-1]
            facts[tier.tier.name] = {
                "devices": len(known),
                "mean": float(known.mean()),
                "std": float(known.std(ddof=1)) if len(known) > 1 else None,
                "worst_decile": float(worst[: math.ceil(len(known) / 10)].mean()),
            }
    return facts


def norm_statistics(env: Environment, server: ServerState) -> dict[str | None, State]:
    """Return what static norms evaluate by in each tier's model and, under None, in the whole one; often nothing."""
    architecture, plan = server.plan.architecture, server.plan
    if not architecture.needs_calibration:
        return {}
    sizes: dict[str | None, Submodel] = {tier.tier.name: tier.serves for tier in plan.tiers}
    if None in server.models:
        sizes[None] = plan.full
    examples = env.task.calibration(env.config.seed, CALIBRATION)[0]
    found: dict[str | None, State] = {}
    with one_thread():
        for name, submodel in sizes.items():
            model = architecture.materialize(submodel.size)
            load(model, storage.download(plan, server.models, submodel))
            calibrate(model, *examples.inputs)
            found[name] = statistics(model)
    return found


def finite(value: float) -> float | None:
    """Return a number that JSON can hold; None for one that it cannot."""
    return value if math.isfinite(value) else None


def rank_facts(env: Environment, server: ServerState) -> dict[str, Any]:
    """Return what ``RoundRecord`` says of ranks: nothing in most rounds, and where they cannot change."""
    rule, number = env.rederivation, server.round
    if not (rule.active and (number == 0 or rule.due(number, env.config.train.rounds))):
        return {}
    by_tier = {tier.tier.name: dict(tier.serves.size.ranks or {}) for tier in server.plan.tiers}
    return {"ranks": by_tier, "full_ranks": dict(server.plan.full.size.ranks or {})}


def to_checkpoint(env: Environment, server: ServerState, written: Mapping[str, str] | None = None) -> Checkpoint:
    """Return the checkpoint of a state; ``written`` are hashes of what else a run has written."""
    tensors: dict[Key, Tensor] = {
        ("global", owner or "", name): tensor
        for owner, state in server.models.items()
        for name, tensor in state.items()
    }
    tensors |= {
        ("memory", owner or "", step, slot, name): tensor.clone()
        for owner, memory in server.memory.items()
        for step, slots in memory.items()
        for slot, state in slots.items()
        for name, tensor in state.items()
    }
    tensors |= {("updates", layer): counts for layer, counts in server.updates.items()}
    tensors |= {("control", name): tensor for name, tensor in server.control.items()}
    tensors |= {("controls", str(d), name): x for d, state in server.controls.items() for name, x in state.items()}
    tensors |= {("history", name): tensor for name, tensor in server.history.tensors().items()}
    ranks = "" if server.plan is env.plan else encode_ranks(server.plan)
    facts = {"ranks": ranks, "stack": server.stack, "norms": asdict(server.norms), "written": dict(written or {})}
    return Checkpoint(number=server.round, tensors=tensors, facts=facts, fingerprint=env.fingerprint)


def from_checkpoint(env: Environment, checkpoint: Checkpoint) -> ServerState:
    """Return the state of a checkpoint that ``to_checkpoint`` made in the same environment."""
    plan = env.plan_at(checkpoint.facts["ranks"])
    stored: dict[Owner, State] = {}
    for (owner, name), tensor in below(checkpoint.tensors, "global").items():
        stored.setdefault(owner or None, {})[name] = tensor
    # In the model's order: a file gives its tensors back in any.
    models = {owner: {name: stored[owner][name] for name in shapes} for owner, shapes in storage.shapes(plan).items()}
    memory: dict[Owner, dict[str, dict[str, State]]] = {}
    for (owner, step_name, slot, name), tensor in below(checkpoint.tensors, "memory").items():
        memory.setdefault(owner or None, {}).setdefault(step_name, {}).setdefault(slot, {})[name] = tensor
    counts = below(checkpoint.tensors, "updates")
    updates = {layer: counts[layer,] for layer in plan.full.size.ranks or {} if counts}
    known = {name: tensor for (name,), tensor in below(checkpoint.tensors, "history").items()}
    history = History.of_tensors(known, len(env.parts))
    controls: dict[int, State] = {}
    for (device, name), tensor in below(checkpoint.tensors, "controls").items():
        controls.setdefault(int(device), {})[name] = tensor
    return ServerState(
        round=checkpoint.number,
        models=models,
        memory=memory,
        updates=updates,
        plan=plan,
        history=history,
        control={name: tensor for (name,), tensor in below(checkpoint.tensors, "control").items()},
        controls=controls,
        stack=int(checkpoint.facts["stack"]),
        norms=UpdateNorms(**checkpoint.facts.get("norms", {})),
    )
