"""Maestro's training step and everything that a resumed run needs of it (ICML 2024, Algorithm 1).

Each step runs one sampled set of rank prefixes; the loss is ``CE(sampled, y) + λ · group lasso``, or with a full pass
``CE(full, y) + CE(sampled, softmax(full)) + λ · group lasso``. After each epoch the columns without importance are cut.
A dense model is trained by the same code without any of that.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmaestro import lod, rng
from fedmaestro.config.training import Optimisation, TrainingConfig
from fedmaestro.errors import DivergedError, UserError
from fedmaestro.lod import sampling
from fedmaestro.models.architecture import Architecture
from fedmaestro.runs.checkpoint import Key, below
from fedmaestro.submodel import State, state_of
from fedmaestro.tasks.task import Batch, Task

ADVICE = "lower train.lr, or set train.clip-norm or train.warmup-epochs"
"""What to do about a loss that is not finite."""


class Trainer:
    """A model, its optimiser, and the position in the run.

    Attributes:
        model: at its full current ranks between steps.
        step: steps done since the start of the run.
        loss_sum: of the current epoch's steps, weighted by examples; ``examples`` of them.
    """

    def __init__(self, config: TrainingConfig, task: Task, architecture: Architecture) -> None:
        self.settings, self.task, self.seed = config.train, task, config.seed
        self.device = torch.device(config.train.device)
        self.steps_per_epoch = task.steps(config.train.batch_size)
        self._architecture = architecture
        self._place(architecture.with_state(architecture.initial_state(rng.derived_seed(config.seed, "init"))))
        self.step = 0
        self.loss_sum, self.examples = 0.0, 0
        self._since, self._cuts = 0, 0
        self._resample()

    @property
    def epoch(self) -> int:
        """Complete epochs."""
        return self.step // self.steps_per_epoch

    @property
    def ranks(self) -> dict[str, int]:
        """The current full ranks."""
        return lod.max_ranks(self.model)

    def train_step(self, batch: Batch) -> float:
        """Take one step; return its cross-entropy.

        Raises:
            DivergedError: it is not finite; the model is as before.
        """
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(settings, self.step, self.steps_per_epoch)
        # Dropout draws from PyTorch's global generator: seeded by step, a resumed run draws the same.
        torch.manual_seed(rng.derived_seed(self.seed, "dropout", self.step))
        self.optimizer.zero_grad(set_to_none=True)
        task_loss = self._task_loss(batch.to(self.device))
        value = float(task_loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} in step {self.step + 1} (epoch {self.epoch + 1}): {ADVICE}")
        loss = task_loss
        if settings.group_lasso:
            loss = loss + settings.group_lasso * lod.group_lasso(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        count = len(batch.targets)
        self.step, self.loss_sum, self.examples = self.step + 1, self.loss_sum + value * count, self.examples + count
        return value

    def _task_loss(self, batch: Batch) -> Tensor:
        bfloat16 = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            outputs = self.task.goal.outputs
            teacher = outputs(self.model(*batch.inputs)).float() if self.settings.full_pass and self.ranks else None
            lod.set_ranks(self.model, self._sample(self.step - self._since))
            sampled = outputs(self.model(*batch.inputs)).float()
        lod.set_ranks(self.model, self.ranks)
        if teacher is None:
            return self._loss(sampled, batch.targets)
        return self._loss(teacher, batch.targets) + self.task.goal.distillation(sampled, teacher, batch.targets)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        smoothing, goal = self.settings.label_smoothing, self.task.goal
        if not smoothing:
            return goal.loss(outputs, targets)
        if goal.smoothed is None:
            raise UserError(f"train.label-smoothing={smoothing}: task {goal.name!r} has no classes: set it to 0")
        return goal.smoothed(outputs, targets, smoothing)

    def end_epoch(self) -> float:
        """Shrink the model and return the epoch's mean loss."""
        mean, self.loss_sum, self.examples = self.loss_sum / self.examples, 0.0, 0
        threshold = self.settings.shrink_threshold
        kept = lod.kept_ranks(lod.importance(self.model), threshold) if threshold else self.ranks
        if kept != self.ranks:
            lod.shrink(self.model, kept, self.optimizer)
            self._since, self._cuts = self.step, self._cuts + 1
            self._resample()
        return mean

    def _resample(self) -> None:
        rule, ranks = self.settings.sampling, self.ranks
        samplers = {"pairs": sampling.pairs, "independent": sampling.independent}
        self._sample = samplers[rule](ranks, self.seed, self._cuts) if rule in samplers else lambda _step: ranks

    def _place(self, model: nn.Module) -> None:
        """Take ``model`` to the device and give it a fresh optimiser."""
        self.model = model.to(self.device).train()
        if len(self.task.input_shape) == 3:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.settings, self.model)

    def state(self) -> dict[Key, Tensor]:
        """Return the tensors of the model, of the optimiser, and the position in the run."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors: dict[Key, Tensor] = {("model", name): tensor for name, tensor in self.model_state().items()}
        for parameter, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors["optimizer", slot, names[parameter]] = value.detach().cpu().clone()
        position = {
            "step": self.step,
            "since": self._since,
            "cuts": self._cuts,
            "loss_sum": self.loss_sum,
            "examples": self.examples,
        }
        return tensors | {("progress", k): torch.tensor(value, dtype=torch.float64) for k, value in position.items()}

    def model_state(self) -> State:
        """Return the model's tensors on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in state_of(self.model).items()}

    def restore(self, tensors: Mapping[Key, Tensor]) -> None:
        """Take up what ``state`` returned."""
        self._place(self._architecture.with_state({name: x for (name,), x in below(tensors, "model").items()}))
        slots: dict[str, State] = {}
        for (slot, name), value in below(tensors, "optimizer").items():
            slots.setdefault(name, {})[slot] = value
        for name, parameter in self.model.named_parameters():
            if name in slots:
                self.optimizer.state[parameter] = {
                    slot: value.to(self.device) if value.shape == parameter.shape else value
                    for slot, value in slots[name].items()
                }
        position = {key: float(value) for (key,), value in below(tensors, "progress").items()}
        self.step, self._since, self._cuts = (int(position[key]) for key in ("step", "since", "cuts"))
        self.loss_sum, self.examples = position["loss_sum"], int(position["examples"])
        self._resample()


def make_optimizer(settings: Optimisation, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of ``settings`` over all parameters of ``model``."""
    parameters = list(model.parameters())
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def lr_factor(settings: Optimisation, step: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rate in the given step (0 is the first)."""
    epoch = step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return (step + 1) / (settings.warmup_epochs * steps_per_epoch + 1)
    if settings.schedule == "steps":
        return 0.1 ** ((epoch >= 0.5 * settings.epochs) + (epoch >= 0.75 * settings.epochs))
    if settings.schedule == "cosine":
        done = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
        return (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return 1.0
