"""From a finished run to a model for deployment: a tier's submodel, or the best one within a budget.

The function behind ``fedmaestro extract``. Layers become dense where that has no more weights. Units: MACs per example
(forward), scalars, milliseconds per forward pass of ``latency_batch`` examples with one thread.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedmaestro import lod
from fedmaestro.config.base import flatten, read
from fedmaestro.config.training import TrainingConfig
from fedmaestro.deploy.latency import latency_ms
from fedmaestro.deploy.rank_search import Candidate, search, within, within_latency
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import cost, trace
from fedmaestro.fleet.traces import trace_of
from fedmaestro.models.architecture import Architecture, Size, dense_layers
from fedmaestro.models.static_norm import statistics
from fedmaestro.places import file_name
from fedmaestro.runs.code import read_code, write_code
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.model import ModelCard, load_model, read_card, write_model
from fedmaestro.runs.reader import read_toml
from fedmaestro.runs.trust import honoured
from fedmaestro.submodel import state_of
from fedmaestro.tasks.opening import open_task
from fedmaestro.tasks.task import Batch, Task, evaluate, metric_facts

Note = Callable[[str], None]
_DATA_KEYS = ("seed", "data.name", "data.dir")
_ASKED = ("data.task", "data.metrics", "data.file", "data.columns")
"""Settings of the data that older runs do not have."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to extract: exactly one of these."""

    tier: str | None = None
    max_macs: float | None = None
    max_params: float | None = None
    max_latency_ms: float | None = None

    def describe(self) -> str:
        """Return the name of the default folder: ``tier-low``, ``macs-100000``."""
        if self.tier is not None:
            return f"tier-{file_name(self.tier)}"
        names = {"macs": self.max_macs, "params": self.max_params, "latency-ms": self.max_latency_ms}
        return next(f"{name}-{value:.15g}" for name, value in names.items() if value is not None)

    def check(self) -> None:
        """Raise UserError unless exactly one target is given, and a positive one."""
        given = {
            "--tier": self.tier,
            "--max-macs": self.max_macs,
            "--max-params": self.max_params,
            "--max-latency-ms": self.max_latency_ms,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            raise UserError(f"give exactly one of {', '.join(given)}, got {', '.join(chosen) or 'none'}")
        name, value = next(iter(chosen.items()))
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise UserError(f"{name} {value:g}: the budget must be a positive number")


@dataclass(frozen=True)
class Extraction:
    """A folder with ``model.safetensors`` and its card ``model.json``."""

    path: Path
    card: dict[str, Any]

    def model(self) -> nn.Module:
        """Return the model, ready to use."""
        return load_model(self.path)


@honoured
def extract(
    run_dir: str | Path,
    target: Target,
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    calibration: int = 2048,
    latency_batch: int = 1,
    note: Note = lambda _text: None,
    trust: bool = False,  # noqa: ARG001 - ``honoured`` reads it
) -> Extraction:
    """Write the submodel for ``target`` and its card.

    Args:
        run_dir: folder of a federation's run or of a training.
        target: a tier of a federation, or a budget; for a budget, ranks are searched on a calibration batch.
        out: a new folder; ``RUN_DIR/extracted/…`` by default.
        data_dir: folder of local data; by default that of the run.
        calibration: training examples of the search.
        latency_batch: examples of a measured forward pass.
        note: is told what goes on.
        trust: run the code that the folder holds, also where somebody else has written it.

    Raises:
        UserError: no readable model or data, an unknown tier, a budget below the smallest possible model, a taken
            folder. Nothing is written then.
    """
    run_dir = Path(run_dir)
    target.check()
    folder = Path(out) if out is not None else run_dir / "extracted" / target.describe()
    RunFolder(folder).check_usable()
    if any((folder / name).exists() for name in ("model.json", "model.safetensors")):
        raise UserError(f"{folder} already holds a model: choose another --out")
    card = read_card(run_dir)
    architecture = card.architecture(run_dir)
    card.check_tier(target.tier, run_dir)
    source = load_model(run_dir, target.tier)
    config = _training_config(run_dir, data_dir)
    task = _as_taken(open_task(config), run_dir, architecture)
    facts: dict[str, Any] = {}
    if target.tier is not None:
        size, model = card.tiers[target.tier], source
    else:
        architecture, factors = _as_factors(architecture, source)
        note(f"searching ranks on {min(calibration, task.examples)} training examples")
        batches = task.calibration(config.seed, calibration)
        path = _path(config, task, architecture, factors, batches)
        chosen = _within(target, path, task, factors, latency_batch)
        size, model = Size(ranks=chosen.ranks), lod.truncate(factors, chosen.ranks)
        facts = {"calibration_examples": min(calibration, task.examples), "calibration_loss": chosen.loss}
    deployed = lod.recompose(model).eval()
    note("scoring on the test set and measuring the latency")
    facts |= _figures(deployed, task, latency_batch)
    kept = {key: value for key, value in (card.model_extra or {}).items() if key not in ("round", "epoch")}
    new_card = ModelCard(
        model=card.model,
        form=architecture.form,
        keep_dense=card.keep_dense,
        norm=card.norm,
        width=card.width,
        scales=card.scales,
        exits=card.exits,
        input_shape=card.input_shape,
        num_classes=card.num_classes,
        inputs=card.inputs,
        size=size,
        recomposed=True,
        extracted_for={key: value for key, value in asdict(target).items() if value is not None},
        layers={name: _describe(module) for name, module in deployed.named_modules() if _is_weighted(module)},
        **{**kept, **facts},
    )
    write_code(folder, read_code(run_dir))
    # Scoring has calibrated the norms that need it.
    write_model(folder, {None: state_of(deployed)}, new_card, {None: statistics(deployed)})
    return Extraction(folder, read_card(folder).to_dict())


def _training_config(run_dir: Path, data_dir: str | Path | None) -> TrainingConfig:
    """Return the configuration of a training, or one with the data of a federation."""
    path = RunFolder(run_dir).config
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a run")
    given = flatten(read_toml(path))
    if missing := [key for key in _DATA_KEYS if key not in given]:
        raise UserError(f"{path} names no {missing[0]}: give the folder of a run")
    if "model.form" not in given:  # of a federation, which uses all training examples
        given = {key: given[key] for key in (*_DATA_KEYS, *_ASKED) if key in given}
    if data_dir is not None:
        given["data.dir"] = str(data_dir)
    return read(TrainingConfig, None, {**given, "train.device": "cpu"}, str(path))


def _as_taken(task: Task, run_dir: Path, architecture: Architecture) -> Task:
    """Return the task with its examples as the model takes them."""
    with_channel = task.with_channel()
    if with_channel is not None and with_channel.input_shape == architecture.input_shape:
        task = with_channel
    _check_data(task, architecture, run_dir)
    return task


def _check_data(task: Task, architecture: Architecture, run_dir: Path) -> None:
    if (task.input_shape, task.num_classes) != (architecture.input_shape, architecture.num_classes):
        raise UserError(
            f"the data have inputs {task.input_shape} and {task.num_classes} classes, the model in {run_dir} was "
            f"trained on {architecture.input_shape} and {architecture.num_classes}: give the run's own data"
        )


def _as_factors(architecture: Architecture, model: nn.Module) -> tuple[Architecture, nn.Module]:
    """Return the LoD architecture and the model as factors (a dense model by truncated SVD)."""
    if architecture.form == "lod":
        return architecture, model
    factors = lod.factorize(model, dense_layers(model, architecture.keep_dense))
    return replace(architecture, form="lod"), factors


def _path(
    config: TrainingConfig, task: Task, architecture: Architecture, factors: nn.Module, batches: list[Batch]
) -> list[Candidate]:
    """Return the searched models, largest first."""
    start = lod.max_ranks(factors)

    def loss_of(ranks: dict[str, int]) -> float:
        lod.set_ranks(factors, ranks)
        loss = evaluate(factors, task, batches).loss
        lod.set_ranks(factors, start)
        return loss

    traced = trace_of(architecture)
    return search(traced, start, loss_of, level_ratio=config.curve.level_ratio)


def _within(target: Target, path: list[Candidate], task: Task, factors: nn.Module, latency_batch: int) -> Candidate:
    if target.max_latency_ms is None:
        return within(path, max_macs=target.max_macs or math.inf, max_params=target.max_params or math.inf)

    def measure(point: Candidate) -> float:
        return latency_ms(lod.recompose(lod.truncate(factors, point.ranks)), task.inputs, latency_batch)

    return within_latency(path, target.max_latency_ms, measure)[0]


def _figures(deployed: nn.Module, task: Task, latency_batch: int) -> dict[str, Any]:
    traced = trace(deployed, task.inputs)
    result = evaluate(deployed, task, task.split("test"))
    figures = cost(traced, lod.max_ranks(deployed), batch_size=1)
    return {
        "params": figures.params,
        "macs_per_example": figures.macs_per_example,
        "latency_ms": latency_ms(deployed, task.inputs, latency_batch),
        "latency_batch": latency_batch,
        "data": task.name,
        "metric": metric_facts(task).to_dict(),
        "test_loss": result.loss,
        f"test_{task.metric}": task.value(result),
    }


def _is_weighted(module: nn.Module) -> bool:
    return isinstance(module, lod.LoDLayer | nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _describe(module: nn.Module) -> str:
    return f"rank {module.max_rank}" if isinstance(module, lod.LoDLayer) else "dense"
