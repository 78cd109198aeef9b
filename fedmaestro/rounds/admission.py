"""What the server takes from hosts: every reply is held against what was asked for, before any arithmetic.

A host says who has trained and with which loss, and sends tensors. The server knows the rest: how many examples a
device has, so there is no weight to believe; names, shapes and types of what comes, from the aggregation's own
functions on tensors without memory (``meta``); how long an update may be (``norms``). A reply that differs raises
RejectedError with its kind, and costs the devices that it is about.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedmaestro.clients.scaffold import Control
from fedmaestro.fleet.plan import Plan, Submodel
from fedmaestro.rounds import spectrum
from fedmaestro.rounds.device import CohortResult, sent_back, sizes_of
from fedmaestro.rounds.environment import Environment
from fedmaestro.rounds.failure import KINDS, Failure, RejectedError
from fedmaestro.rounds.norms import checked_norm, longer, scale_of
from fedmaestro.rounds.storage import owner_of
from fedmaestro.rounds.training import local_training
from fedmaestro.rounds.tree import Span, reduced
from fedmaestro.strategies.base import SUMS, WEIGHTED_SUMS, AnyAggregation, AnyPartial, Block, Partial, Parts, Sizes
from fedmaestro.submodel import Signature, State
from fedmaestro.tasks.metrics import Metric
from fedmaestro.tasks.task import Score, scored

LAYOUTS = 256
"""That are remembered."""

SLACK = 1 + 1e-4
"""What rounding may add to a norm between a device and the server."""

Kind = tuple[tuple[int, ...], torch.dtype]
Layout = Mapping[str, Mapping[str, Kind | Tensor]]
"""By kind of state and name: shape and type of a tensor, or the tensor itself where its numbers are known."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a message asks a host to train."""

    env: Environment
    plan: Plan
    submodel: Submodel
    devices: Sequence[int]
    """By number, ascending."""
    start: State
    """The submodel as it is sent."""
    round: int
    bound: float
    """Of each device's update."""
    controls: Mapping[int, Control] | None = None
    """What each device corrects its steps by; each sends its new control variate then. None: none does."""


def _check_devices(asked: Asked, result: CohortResult) -> None:
    named = [report.device for report in result.reports] + list(result.failures)
    if sorted(named) != list(asked.devices):
        raise RejectedError(
            "devices", f"{_some(asked.devices)} were asked to train, the reply is about {_some(sorted(named))}"
        )


def _check_parts(asked: Asked, result: CohortResult, start: State, layout: Layout | None) -> None:
    aggregation = asked.env.method.aggregation
    count = len(result.reports)
    weight = aggregation.weight_of(report.examples for report in result.reports)
    check_layout(result.parts, layout, "the update")
    # A norm that is finite is one of finite numbers.
    if len(asked.devices) == 1:
        checked_norm(result.parts[SUMS], start, asked.bound * SLACK)
    elif aggregation.reduction is WEIGHTED_SUMS:
        mean = {name: x / weight for name, x in result.parts[SUMS].items()} if weight else {}
        checked_norm(mean, start, asked.bound * SLACK)
    else:
        check_finite(result.parts, "the update")
        if not math.isfinite(asked.bound):
            return
        # Sums of columns, of products, of rows: nothing that devices within the bound can add up to is longer.
        radius = max(1.0, scale_of(start) + asked.bound) * SLACK
        largest = max(weight, count) * radius**2
        for state in result.parts.values():
            for name, x in state.items():
                if x.is_floating_point() and float(torch.linalg.vector_norm(x.double())) > largest:
                    raise RejectedError("too-large", f"the sum of {name!r} is longer than devices could have made it")
        if (reason := aggregation.reduction.why_not(result.parts, weight, radius)) is not None:
            raise RejectedError("too-large", reason)


def _check_probes(asked: Asked, result: CohortResult) -> None:
    recorded = spectrum.is_recorded(asked.env.config, asked.submodel)
    expected = spectrum.probe(asked.start, spectrum.rank_segments(asked.plan)) if recorded else {}
    check_layout({"probes": result.probes}, {"probes": _kinds(expected)}, "the probes")
    check_finite({"probes": result.probes}, "the probes")


def _check_controls(asked: Asked, result: CohortResult) -> None:
    trained = [report.device for report in result.reports] if asked.controls is not None else []
    if sorted(result.controls) != trained:
        raise RejectedError("devices", f"control variates are of {_some(sorted(result.controls))}")
    for device, control in result.controls.items():
        frozen = asked.env.method.frozen(asked.start, asked.round)
        for name, x in control.items():
            start = asked.start.get(name)
            if start is None or name in frozen or x.shape != start.shape or x.dtype != start.dtype:
                raise RejectedError("tensors", f"the control variate of device {device} has another {name!r}")
        check_finite({"controls": control}, f"the control variate of device {device}")
        # What algorithm 1 makes of an update within the bound is not longer.
        assert asked.controls is not None
        settings = local_training(asked.env, asked.round)
        steps = settings.epochs * math.ceil(int(asked.env.parts.sizes[device]) / settings.batch_size)
        known = asked.controls[device]
        limit = _length(known.own) + _length(known.server) + asked.bound / (steps * settings.lr)
        if not (norm := _length(control)) <= limit * SLACK:
            raise RejectedError(
                "too-large", f"the control variate of device {device} has norm {norm:.3g}, it can have {limit:.3g}"
            )


def _length(state: Mapping[str, Tensor]) -> float:
    return math.sqrt(math.fsum(float(x.double().square().sum()) for x in state.values()))


def layout_of(
    aggregation: AnyAggregation,
    size: Signature,
    types: Sequence[str],
    sizes: Sequence[Signature],
    trained: Sequence[bool],
) -> Layout | None:
    """Return what a host sends of several devices; None for a rule that cannot say so before it has numbers.

    Args:
        aggregation: the rule.
        size: of the devices.
        types: of the tensors.
        sizes: all that devices send in this round.
        trained: whether each device of the cohort has.
    """
    reduction = aggregation.reduction
    start = {
        name: torch.empty(shape, dtype=getattr(torch, kind), device="meta")
        for (name, shape), kind in zip(size, types, strict=True)
    }
    known = Sizes(tuple(dict.fromkeys((*sizes, size))), complete=bool(sizes))

    def leaf(position: int) -> AnyPartial | None:
        block = Block(reduction.lift(start, 1.0, start), 1.0, 1)
        return Partial({size: block}, known) if trained[position] else None

    def packed(partial: AnyPartial | None) -> Layout:
        return {} if partial is None else {k: _layout_of(x) for k, x in aggregation.pack(partial).items()}

    try:
        one = leaf(trained.index(True))
        assert one is not None
        alone = packed(one)
        if _same(alone, packed(aggregation.merge(one, one))):
            return alone
        return packed(reduced(Span(0, len(trained)), leaf, aggregation.merge))
    except Exception:
        # A rule of the user's that looks at numbers.
        return None


def _kinds(state: Mapping[str, Tensor]) -> dict[str, Kind]:
    return {name: (tuple(x.shape), x.dtype) for name, x in state.items()}


def _layout_of(state: Mapping[str, Tensor]) -> dict[str, Kind | Tensor]:
    return {name: (tuple(x.shape), x.dtype) if x.is_meta else x for name, x in state.items()}


def _same(left: Layout, right: Layout) -> bool:
    kinds = all(isinstance(x, tuple) for states in (left, right) for state in states.values() for x in state.values())
    return kinds and left == right


def check_layout(parts: Mapping[str, Mapping[str, Tensor]], layout: Layout | None, what: str) -> None:
    """Raise RejectedError unless ``parts`` have exactly the states, names, shapes and types of ``layout``."""
    if layout is None:
        return
    if parts.keys() != layout.keys():
        raise RejectedError("tensors", f"{what} has the states {_some(sorted(parts))}, not {_some(sorted(layout))}")
    for kind, expected in layout.items():
        state = parts[kind]
        if state.keys() != expected.keys():
            odd = sorted(state.keys() ^ expected.keys())
            raise RejectedError("tensors", f"{what} lacks, or should not have, the tensors {_some(odd)}")
        for name, x in expected.items():
            got = state[name]
            shape, dtype = x if isinstance(x, tuple) else (tuple(x.shape), x.dtype)
            if tuple(got.shape) != shape or got.dtype != dtype:
                raise RejectedError(
                    "tensors",
                    f"{what} has {name!r} as {_named(got.dtype)} {tuple(got.shape)}, not {_named(dtype)} {shape}",
                )
            if isinstance(x, Tensor) and not torch.equal(got, x):
                raise RejectedError("tensors", f"{what} has other numbers in {name!r} than can be")


def check_finite(parts: Parts, what: str) -> None:
    """Raise RejectedError where a number is infinite or none."""
    for state in parts.values():
        for name, x in state.items():
            if x.is_floating_point() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                raise RejectedError("not-finite", f"{what} has a number in {name!r} that is not finite")


class Admission:
    """Holds replies against what was asked for.

    Args:
        env: the experiment.
    """

    def __init__(self, env: Environment) -> None:
        self._env, self._task = env, env.task
        self._layouts: dict[Hashable, Layout | None] = {}
        self._round = 0
        self._names: dict[Submodel, list[str]] = {}
        self._targets: dict[tuple[int, int], int] = {}

    def cohort(self, asked: Asked, result: CohortResult) -> CohortResult:
        """Return what a host replied, with what the server knows of its devices in place of what the host says of it.

        Raises:
            RejectedError: something differs from what it must be.
        """
        _check_devices(asked, result)
        by_device = {report.device: report for report in result.reports}
        sizes = asked.env.parts.sizes
        reports = tuple(
            replace(by_device[device], examples=int(sizes[device])) for device in asked.devices if device in by_device
        )
        failures = {
            device: Failure(x.kind if x.kind in KINDS else "error", " ".join(x.reason.split())[:300])
            for device, x in sorted(result.failures.items())
        }
        result = replace(result, reports=reports, failures=failures)
        if not reports:
            return replace(result, parts={}, probes={}, controls={})
        for report in reports:
            if not math.isfinite(report.loss):
                raise RejectedError("not-finite", f"the training loss of device {report.device} is {report.loss}")
            if not 0 <= report.norm <= asked.bound * SLACK:
                raise RejectedError("too-large", f"device {report.device}: {longer(report.norm, asked.bound)}")
        _check_parts(asked, result, self._sent(asked), self._layout(asked, result))
        _check_probes(asked, result)
        _check_controls(asked, result)
        return result

    def _sent(self, asked: Asked) -> State:
        """Return what devices were sent of what they send back."""
        if asked.round != self._round:
            self._round, self._names = asked.round, {}
        if asked.submodel not in self._names:
            self._names[asked.submodel] = [name for name, _ in sent_back(self._env, asked.submodel, asked.round)]
        return {name: asked.start[name] for name in self._names[asked.submodel]}

    def _layout(self, asked: Asked, result: CohortResult) -> Layout | None:
        env, plan, start = self._env, asked.plan, self._sent(asked)
        if len(asked.devices) == 1:
            return {SUMS: _kinds(start)}
        sent = sent_back(env, asked.submodel, asked.round)
        types = tuple(_named(x.dtype) for x in start.values())
        sizes = tuple(sizes_of(env, plan, asked.round)[owner_of(plan, asked.submodel)])
        reports = {report.device for report in result.reports}
        trained = tuple(device in reports for device in asked.devices)
        key = sent, types, sizes, trained
        if key not in self._layouts:
            if len(self._layouts) >= LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout_of(env.method.aggregation, sent, types, sizes, trained)
        return self._layouts[key]

    def score(self, score: Score, first: int, last: int) -> Score:
        """Return the score of test examples ``first … last - 1``; RejectedError unless it can be one."""
        task, part = self._task, (first, last)
        if part not in self._targets:
            self._targets[part] = sum(task.goal.count(batch.targets) for batch in task.scored("test", first, last))
        if score.examples != self._targets[part]:
            raise RejectedError("malformed", f"{score.examples} targets were scored, there are {self._targets[part]}")
        if self._score_layout is not None:
            # A metric that needs none sends none.
            check_layout(
                {name: sums for name, sums in score.sums.items() if sums}, self._score_layout, "the evaluation"
            )
        for metric in task.metrics:
            try:
                value = score.value(metric)
            except Exception as error:
                raise RejectedError("malformed", f"metric {metric.name!r} cannot be computed: {error}") from error
            _check_share(value, metric, "the evaluation")
        return score

    def device_values(self, values: Mapping[int, Mapping[str, float]], devices: Sequence[int]) -> None:
        """Raise RejectedError unless this can be what ``devices`` reached on their own tests."""
        if sorted(values) != sorted(devices):
            raise RejectedError(
                "devices", f"{_some(devices)} were asked for, the reply is about {_some(sorted(values))}"
            )
        for device, row in values.items():
            if lacking := {"loss", *(metric.name for metric in self._task.metrics)} - row.keys():
                raise RejectedError("malformed", f"there is no {_some(sorted(lacking))} of device {device}")
            for metric in self._task.metrics:
                _check_share(row[metric.name], metric, f"device {device}")

    @cached_property
    def _score_layout(self) -> Layout | None:
        task = self._task
        if (batch := next(iter(task.scored("test", 0, 1)), None)) is None:
            return None
        targets = batch.targets
        shape = targets.shape if task.goal.targets == "values" else (*targets.shape, task.num_classes)
        try:
            sums = scored(task, torch.zeros(shape), targets).sums
        except Exception:
            # A metric of the user's that needs more than one example.
            return None
        return {name: _kinds(own) for name, own in sums.items() if own}


def _check_share(value: float, metric: Metric, what: str) -> None:
    # What is not a number is that of a model that has diverged, and shown as missing.
    if metric.percent and math.isfinite(value) and not -1e-9 <= value <= 1 + 1e-9:
        raise RejectedError("malformed", f"{what} has {metric.name} {value:.4g}, which is no share")


def _some(names: Collection[Any], count: int = 5) -> str:
    shown = ", ".join(str(name)[:40] for name in list(names)[:count])
    return (shown + (f" and {len(names) - count} more" if len(names) > count else "")) or "nothing"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
