"""The training step against plain PyTorch and formulas by hand, shrinking, and bit-exact continuation."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro import lod, rng
from fedmaestro.config.base import read
from fedmaestro.config.training import TrainingConfig
from fedmaestro.errors import DivergedError
from fedmaestro.lod import sampling
from fedmaestro.models import MODELS, InputShape, ModelSpec
from fedmaestro.models.architecture import Architecture
from fedmaestro.models.width import Scale
from fedmaestro.runs.checkpoint import Checkpoint, Key, load_checkpoint, save_checkpoint
from fedmaestro.submodel import State
from fedmaestro.tasks.opening import open_task
from fedmaestro.tasks.task import Batch, Task
from fedmaestro.training.trainer import Trainer, lr_factor

EPOCHS, STEPS, BATCH = 4, 5, 20
SMALL = {"data.limit": STEPS * BATCH, "train.batch-size": BATCH, "train.epochs": EPOCHS, "seed": 3}
Ranks = dict[str, int]


def configured(**changes: Any) -> TrainingConfig:
    """Settings in Python's spelling: ``train__clip_norm=1``."""
    dotted = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return read(TrainingConfig, None, SMALL | dotted)


def architecture_of(config: TrainingConfig, task: Task) -> Architecture:
    return Architecture(
        name=config.model.name,
        input_shape=task.input_shape,
        num_classes=task.num_classes,
        form=config.model.form,
        keep_dense=config.model.keep_dense,
    )


def trainer_of(config: TrainingConfig) -> Trainer:
    task = open_task(config)
    return Trainer(config, task, architecture_of(config, task))


def batches_from(trainer: Trainer, step: int = 0) -> Iterator[Batch]:
    """All batches of the run from ``step`` on."""
    for epoch in range(step // STEPS, EPOCHS):
        yield from trainer.task.epoch(trainer.seed, epoch, BATCH, step % STEPS if epoch == step // STEPS else 0)


def first_batch(trainer: Trainer) -> Batch:
    return next(batches_from(trainer))


def train_steps(trainer: Trainer, count: int) -> list[float]:
    """Take steps from where the trainer is, and end the epochs that they complete."""
    losses = []
    for batch in islice(batches_from(trainer, trainer.step), count):
        losses.append(trainer.train_step(batch))
        if trainer.step % STEPS == 0:
            losses.append(trainer.end_epoch())
    return losses


def gradients(model: nn.Module) -> State:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(left: Mapping[Any, Tensor], right: Mapping[Any, Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=str(name))


def cosine(step: int) -> float:
    return (1 + math.cos(math.pi * step / (EPOCHS * STEPS))) / 2


# Against plain PyTorch


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("form", ["lod", "dense"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_training_without_sampling_is_a_plain_loop(model: str, form: str, optimizer: str) -> None:
    config = configured(
        model__name=model,
        model__form=form,
        train__optimizer=optimizer,
        train__sampling="none",
        train__shrink_threshold=0,
        train__lr=0.01,
        train__label_smoothing=0.1,
        train__clip_norm=0.5,
        train__weight_decay=0.02,
    )
    trainer = trainer_of(config)
    losses = train_steps(trainer, 2 * STEPS)

    start = architecture_of(config, trainer.task)
    plain = start.with_state(start.initial_state(rng.derived_seed(3, "init"))).train()
    plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=0.02)
        if optimizer == "sgd"
        else torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.02)
    )
    expected: list[float] = []
    for step, batch in enumerate(islice(batches_from(trainer), 2 * STEPS)):
        optimiser.param_groups[0]["lr"] = 0.01 * cosine(step)
        loss = F.cross_entropy(plain(*batch.inputs), batch.targets, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimiser.step()
        expected.append(float(loss.detach()))
        if step % STEPS == STEPS - 1:
            expected.append(sum(expected[-STEPS:]) / STEPS)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert_close(dict(trainer.model.state_dict()), dict(plain.state_dict()))


def test_bfloat16_is_only_the_arithmetic_of_the_forward_pass() -> None:
    exact, rounded = (trainer_of(configured(train__precision=p)) for p in ("float32", "bfloat16"))
    losses = [trainer.train_step(first_batch(trainer)) for trainer in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}


# Sampling


def ranks_seen(trainer: Trainer) -> list[Ranks]:
    """Note the ranks of every forward pass from now on."""
    seen: list[Ranks] = []
    trainer.model.register_forward_pre_hook(
        lambda model, _: seen.append({name: layer.rank for name, layer in lod.layers(model).items()})
    )
    return seen


def test_a_step_of_pairs_trains_the_sampled_prefix_only() -> None:
    trainer = trainer_of(configured(train__clip_norm=0))
    full = trainer.ranks
    assert full == {"fc1": 64, "fc2": 128, "fc3": 10}
    draw = sampling.pairs(full, 3, 0)
    sampled_layers = set()
    for step, batch in enumerate(islice(batches_from(trainer), 12)):
        ranks = draw(step)
        prefix = lod.truncate(trainer.model, ranks)
        expected = F.cross_entropy(prefix(*batch.inputs), batch.targets)
        assert trainer.train_step(batch) == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()  # type: ignore[no-untyped-call]
        own, cut = gradients(trainer.model), gradients(prefix)
        for name, layer in lod.layers(trainer.model).items():
            rank = ranks[name]
            assert layer.rank == layer.max_rank == full[name]
            torch.testing.assert_close(own[f"{name}.u"][:, :rank], cut[f"{name}.u"])
            torch.testing.assert_close(own[f"{name}.v"][:rank], cut[f"{name}.v"])
            assert own[f"{name}.u"][:, rank:].eq(0).all()
            assert own[f"{name}.v"][rank:].eq(0).all()
            sampled_layers |= {name} if rank < full[name] else set()
    assert len(sampled_layers) > 1


def test_pairs_come_once_per_cycle_and_start_anew_after_a_cut() -> None:
    trainer = trainer_of(configured(model__keep_dense="fc1 fc2", train__shrink_threshold=1e-5))
    seen = ranks_seen(trainer)
    train_steps(trainer, 2 * STEPS)
    assert Counter(ranks["fc3"] for ranks in seen) == dict.fromkeys(range(1, 11), 1)
    seen.clear()
    train_steps(trainer, STEPS - 1)
    zero_tail(trainer, "fc3", 4)
    train_steps(trainer, 1)
    assert trainer.ranks == {"fc3": 4}
    seen.clear()
    train_steps(trainer, 4)
    assert Counter(ranks["fc3"] for ranks in seen) == dict.fromkeys(range(1, 5), 1)


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_full_pass_teaches_the_sampled_one(smoothing: float) -> None:
    config = configured(train__full_pass=True, train__clip_norm=0, train__label_smoothing=smoothing)
    trainer = trainer_of(config)
    batch = first_batch(trainer)
    ranks = sampling.pairs(trainer.ranks, 3, 0)(0)
    assert ranks != trainer.ranks
    whole = copy.deepcopy(trainer.model)
    sampled = copy.deepcopy(trainer.model)
    lod.set_ranks(sampled, ranks)

    def log_softmax(logits: Tensor) -> Tensor:
        return logits - logits.exp().sum(1, keepdim=True).log()

    teacher = log_softmax(whole(*batch.inputs))
    chosen = teacher[torch.arange(BATCH), batch.targets]
    full_loss = -(1 - smoothing) * chosen.mean() - smoothing * teacher.mean()
    soft = teacher.detach().exp()
    distilled = -(soft * log_softmax(sampled(*batch.inputs))).sum(1).mean()
    full_loss.backward()  # type: ignore[no-untyped-call]
    distilled.backward()  # type: ignore[no-untyped-call]

    assert trainer.train_step(batch) == pytest.approx(float(full_loss.detach() + distilled.detach()), rel=1e-5)
    own, a, b = (gradients(model) for model in (trainer.model, whole, sampled))
    assert_close(own, {name: a[name] + b[name] for name in own}, rtol=1e-4, atol=1e-6)


def test_the_group_lasso_adds_its_gradient_but_not_to_the_reported_loss() -> None:
    without, with_lasso = (trainer_of(configured(train__clip_norm=0, train__group_lasso=x)) for x in (0.0, 0.03))
    batch = first_batch(without)
    penalty = torch.zeros(())
    by_hand = copy.deepcopy(without.model)
    for layer in lod.layers(by_hand).values():
        for b in range(layer.max_rank):
            penalty = penalty + layer.u[:, b:].norm() + layer.v[b:].norm()
    penalty.backward()  # type: ignore[no-untyped-call]
    pull = gradients(by_hand)
    assert with_lasso.train_step(batch) == without.train_step(batch)
    expected = gradients(without.model)
    for name, gradient in pull.items():
        expected[name] = expected[name] + 0.03 * gradient
    assert_close(gradients(with_lasso.model), expected, rtol=1e-4, atol=1e-6)


# Learning rate

W = 4 / 11
"""Warm-up over one epoch of ten steps: the fourth step's factor."""


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0.0, {0: 1.0, 39: 1.0}),
        ("constant", 1.0, {0: 1 / 11, 3: W, 9: 10 / 11, 10: 1.0, 39: 1.0}),
        ("cosine", 0.0, {0: 1.0, 10: 0.8535533905932737, 20: 0.5, 39: 0.0015413331334360176}),
        ("cosine", 1.0, {3: W, 10: 1.0, 25: 0.5, 39: 0.0027390523158632995}),
        ("cosine", 0.25, {0: 1 / 3.5, 1: 2 / 3.5, 2: 3 / 3.5, 3: (1 + math.cos(math.pi * 0.05 / 3.75)) / 2}),
        ("cosine", 9.0, {0: 1 / 91, 39: 40 / 91}),
        ("steps", 0.0, {0: 1.0, 19: 1.0, 20: 0.1, 29: 0.1, 30: 0.01, 39: 0.01}),
        ("steps", 1.0, {3: W, 10: 1.0, 20: 0.1, 30: 0.01}),
    ],
)
def test_learning_rate(schedule: str, warmup: float, factors: dict[int, float]) -> None:
    settings = configured(train__schedule=schedule, train__warmup_epochs=warmup).train
    assert {step: lr_factor(settings, step, 10) for step in factors} == pytest.approx(factors, rel=1e-12)


# Shrinking


@torch.no_grad()
def zero_tail(trainer: Trainer, name: str, rank: int) -> None:
    """Take all importance from the columns beyond ``rank``, also from the pull of momentum and decay."""
    layer = lod.layers(trainer.model)[name]
    for factor, tail in ((layer.u, (slice(None), slice(rank, None))), (layer.v, (slice(rank, None),))):
        factor[tail] = 0
        for slot in trainer.optimizer.state.get(factor, {}).values():
            if slot.shape == factor.shape:
                slot[tail] = 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_columns_without_importance_are_cut_with_what_the_optimiser_keeps(optimizer: str) -> None:
    trainer = trainer_of(configured(train__optimizer=optimizer, train__lr=0.01))
    train_steps(trainer, STEPS - 1)
    trainer.train_step(list(islice(batches_from(trainer), STEPS))[-1])
    zero_tail(trainer, "fc2", 30)
    zero_tail(trainer, "fc3", 0)
    batch = first_batch(trainer)
    before = trainer.model_state()
    logits = trainer.model(*batch.inputs)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    slots = {names[p]: dict(state) for p, state in trainer.optimizer.state.items()}
    trainer.end_epoch()

    assert trainer.ranks == {"fc1": 64, "fc2": 30, "fc3": 0}
    shapes = {name: tuple(tensor.shape) for name, tensor in trainer.model.state_dict().items()}
    assert shapes == {
        "fc1.u": (128, 64),
        "fc1.v": (64, 64),
        "fc1.bias": (128,),
        "fc2.u": (128, 30),
        "fc2.v": (30, 128),
        "fc2.bias": (128,),
        "fc3.u": (10, 0),
        "fc3.v": (0, 128),
        "fc3.bias": (10,),
    }
    torch.testing.assert_close(trainer.model(*batch.inputs), logits)
    assert {id(p) for p in trainer.model.parameters()} == {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"]
    }
    moments = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq"}}[optimizer]
    for name, parameter in trainer.model.named_parameters():
        block = tuple(slice(n) for n in parameter.shape)
        assert parameter.detach().equal(before[name][block])
        now = trainer.optimizer.state[parameter]
        assert now.keys() == slots[name].keys() >= moments
        for key in now:
            assert now[key].equal(slots[name][key][block] if key in moments else slots[name][key])
    # Rank 0 is "bias only", and training goes on.
    assert trainer.model(*batch.inputs).equal(before["fc3.bias"].expand(BATCH, 10))
    losses = train_steps(trainer, STEPS)
    assert all(map(math.isfinite, losses))


# State


def dropping(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(math.prod(input_shape), scale(24)),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(scale(24), num_classes),
    )


CONTINUATIONS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"train__optimizer": "adamw", "train__lr": 0.003},
    "plain sgd": {"train__momentum": 0.0},
    "independent": {"train__sampling": "independent", "train__group_lasso": 1e-4},
    "full pass": {"train__full_pass": True, "train__warmup_epochs": 1.5},
    "augmented": {"data__augment": "crop-flip", "train__schedule": "steps"},
    "cnn": {"model__name": "cnn", "model__keep_dense": "first-conv head"},
    "dense": {"model__form": "dense"},
    "dropout": {"model__name": "dropping"},
    "dropout adamw": {"model__name": "dropping", "train__optimizer": "adamw", "train__lr": 0.01},
}


def through_disk(trainer: Trainer, folder: Path) -> Mapping[Key, Tensor]:
    save_checkpoint(folder, Checkpoint(number=trainer.step, tensors=trainer.state()))
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.tensors


@pytest.mark.parametrize(
    ("case", "cut"),
    [(case, False) for case in CONTINUATIONS]
    + [(case, True) for case in ("sgd", "adamw", "independent", "cnn", "dropout adamw")],
)
def test_continuation_from_the_middle_of_an_epoch_is_bit_identical(
    case: str, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "dropping", ModelSpec(build=dropping, summary=""))
    config = configured(**CONTINUATIONS[case])
    first = trainer_of(config)
    train_steps(first, STEPS - 1)
    if cut:
        layer = list(first.ranks)[-1]
        zero_tail(first, layer, 3)
        # Adam and momentum move zeroed columns again: cut at a threshold above what one step gives.
        first.settings = first.settings.model_copy(update={"shrink_threshold": 0.5})
    train_steps(first, 3)
    if cut:
        assert first.ranks[layer] < 10
    assert first.step == STEPS + 2
    kept = through_disk(first, tmp_path)
    losses = train_steps(first, 2 * STEPS)

    second = trainer_of(config)
    second.settings = first.settings
    second.restore(kept)
    assert (second.step, second.epoch, second.examples) == (STEPS + 2, 1, 2 * BATCH)
    assert train_steps(second, 2 * STEPS) == losses
    assert second.ranks == first.ranks
    assert_close(first.state(), second.state())


# Failures


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(optimizer: str, poison: float) -> None:
    trainer = trainer_of(configured(train__optimizer=optimizer))
    train_steps(trainer, STEPS + 2)
    before = {key: tensor.clone() for key, tensor in trainer.state().items()}
    good = next(batches_from(trainer, trainer.step))
    bad = Batch((torch.full_like(good.inputs[0], poison),), good.targets)
    with pytest.raises(DivergedError) as error:
        trainer.train_step(bad)
    message = str(error.value)
    assert "step 8 (epoch 2)" in message
    for advice in ("train.lr", "train.clip-norm", "train.warmup-epochs", "nan"):
        assert advice in message
    assert "\n" not in message
    assert_close(before, trainer.state())
    assert math.isfinite(trainer.train_step(good))


# Tasks
