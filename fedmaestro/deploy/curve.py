"""The accuracy–cost curve of a trained model: one model per budget, scored and measured.

Two ways to find each budget's ranks: a greedy search on a calibration batch (training examples) and one fraction of all
ranks. A LoD model trained by Maestro and a dense model cut by truncated SVD go through the same code.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedmaestro import lod
from fedmaestro.config.training import Curve, TrainingConfig
from fedmaestro.deploy.latency import latencies_ms
from fedmaestro.deploy.rank_search import Candidate, deployed_cost, search, uniform, within
from fedmaestro.errors import UserError
from fedmaestro.fleet.traces import trace_of
from fedmaestro.models.architecture import Architecture, dense_layers
from fedmaestro.runs.records import CostCurve, CostPoint
from fedmaestro.submodel import num_elements, shapes_of
from fedmaestro.tasks.task import Task, evaluate, metric_facts

Note = Callable[[str], None]
_DENSE = (("the dense model", 0),)


def budget_fractions(settings: Curve) -> list[float]:
    """Return the budgets of ``curve.fractions``, largest first."""
    try:
        fractions = sorted({float(word) for word in settings.fractions.replace(",", " ").split()}, reverse=True)
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"curve.fractions = {settings.fractions!r}: write numbers in (0, 1], separated by spaces")
    return fractions


def lod_form(architecture: Architecture, model: nn.Module) -> nn.Module:
    """Return ``model`` as factors: itself, or the balanced SVD of a dense model."""
    return model if architecture.form == "lod" else lod.factorize(model, dense_layers(model, architecture.keep_dense))


def accuracy_cost_curve(
    config: TrainingConfig, task: Task, architecture: Architecture, model: nn.Module, note: Note = lambda _text: None
) -> CostCurve:
    """Return the curve: for each budget (a part of the dense model's MACs) the largest model in it.

    Args:
        config: budgets, calibration and what to measure.
        task: scores on its test split.
        architecture: of ``model``.
        model: the trained model, dense or LoD; it stays as it is.
        note: is told what goes on.
    """
    model, device = model.eval(), torch.device(config.train.device)
    factors = lod_form(architecture, model)
    traced = trace_of(replace(architecture, form="lod"))
    full = lod.max_ranks(factors_of(architecture))
    dense_params, dense_macs = deployed_cost(traced, full)
    calibration = task.calibration(config.seed, config.curve.calibration)
    start = lod.max_ranks(factors)

    def loss_of(ranks: dict[str, int]) -> float:
        lod.set_ranks(factors, ranks)
        loss = evaluate(factors, task, calibration, device).loss
        lod.set_ranks(factors, start)
        return loss

    def within_budgets(points: list[Candidate]) -> list[tuple[float, Candidate]]:
        """Return the largest model within each budget, and the smallest one there is."""
        fractions = [f for f in budget_fractions(config.curve) if points[-1].macs <= f * dense_macs]
        return [(f, within(points, max_macs=f * dense_macs)) for f in fractions] + [
            (points[-1].macs / dense_macs, points[-1])
        ]

    who = "Maestro" if architecture.form == "lod" else "dense + SVD"
    chosen: dict[str, list[tuple[float, Candidate]]] = {}
    searched = partial(search, level_ratio=config.curve.level_ratio)
    for how, points_of in (("searched", searched), ("uniform", uniform)):
        note(f"{how} ranks on {min(config.curve.calibration, task.examples)} training examples")
        chosen[f"{who}, {how} ranks"] = within_budgets(points_of(traced, start, loss_of))
    models = {_key(p.ranks): lod.recompose(lod.truncate(factors, p.ranks)) for row in chosen.values() for _, p in row}
    models |= {} if architecture.form == "lod" else {_DENSE: model}
    note(f"scoring and timing {len(models)} models")
    known = dict(zip(models, figures(config, task, list(models.values())), strict=True))
    series = {
        name: [
            CostPoint(budget=f, ranks=p.ranks, macs=p.macs, calibration_loss=p.loss, **known[_key(p.ranks)])
            for f, p in row
        ]
        for name, row in chosen.items()
    }
    return CostCurve(
        metric=task.metric,
        facts=metric_facts(task),
        device=_describe(config),
        seed=config.seed,
        dense_params=dense_params,
        dense_macs=dense_macs,
        series=series,
        dense=CostPoint(macs=dense_macs, **known[_DENSE]) if _DENSE in known else None,
    )


def factors_of(architecture: Architecture) -> nn.Module:
    """Return the LoD form of the whole model on the ``meta`` device, also for a dense architecture."""
    return lod_form(architecture, architecture.full)


def figures(config: TrainingConfig, task: Task, models: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return what a curve shows of deployed models besides their MACs; latencies are measured in turn."""
    device, settings = config.train.device, config.curve
    latencies: Sequence[float | None] = [None] * len(models)
    if settings.latency:
        latencies = latencies_ms(models, task.inputs, settings.latency_batch, device=device)
    return [
        {"params": num_elements(shapes_of(model)), "latency_ms": latency, **_scores(task, model, torch.device(device))}
        for model, latency in zip(models, latencies, strict=True)
    ]


def _scores(task: Task, model: nn.Module, device: torch.device) -> dict[str, float]:
    result = evaluate(model, task, task.split("test"), device)
    scores = {"value": task.value(result), "loss": result.loss}
    if task.has_validation:
        scores["validation_value"] = task.value(evaluate(model, task, task.split("validation"), device))
    return scores


def _key(ranks: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(ranks.items())


def _describe(config: TrainingConfig) -> str:
    where = "1 thread" if config.train.device == "cpu" else torch.cuda.get_device_name()
    return f"{config.train.device}, {where}, batch {config.curve.latency_batch}"
