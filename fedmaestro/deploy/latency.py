"""Measured latency of models' forward passes on this machine."""

import statistics
from collections.abc import Sequence

from torch import nn
from torch.utils import benchmark

from fedmaestro.models.shape import Inputs, InputShape, example_inputs

ROUNDS = 5
ROUND_SECONDS = 0.1


def latency_ms(model: nn.Module, inputs: Inputs | InputShape, batch: int, *, device: str = "cpu") -> float:
    """Return the milliseconds of one forward pass of ``batch`` examples; see ``latencies_ms``."""
    return latencies_ms([model], inputs, batch, device=device)[0]


def latencies_ms(
    models: Sequence[nn.Module], inputs: Inputs | InputShape, batch: int, *, device: str = "cpu", threads: int = 1
) -> list[float]:
    """Return the milliseconds of one forward pass of ``batch`` examples in inference mode, for every model.

    The models are measured in turn, five times over, and the median is taken: what else happens on the machine then
    meets all of them. ``torch.utils.benchmark`` warms up, synchronises the accelerator and repeats each measurement for
    a tenth of a second. Values of the inputs do not matter.
    """
    examples = tuple(x.to(device) for x in example_inputs(inputs, batch))
    modes = [model.training for model in models]
    timers = [
        benchmark.Timer(
            "with torch.inference_mode():\n    model(*inputs)",
            globals={"model": model.eval(), "inputs": examples},
            num_threads=threads,
        )
        for model in models
    ]
    rounds = [[timer.blocked_autorange(min_run_time=ROUND_SECONDS).median for timer in timers] for _ in range(ROUNDS)]
    for model, training in zip(models, modes, strict=True):
        model.train(training)
    return [1000 * statistics.median(of_model) for of_model in zip(*rounds, strict=True)]
