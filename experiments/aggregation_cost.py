"""Measure what aggregation costs the server, one thread: rules per round, and one reply against copying its bytes.

    python experiments/aggregation_cost.py

Replies are those of cohorts of one device; CPU time, the best of three repeats. Units: seconds a round of 100 devices
in five tiers (ranks 1 to 1/16), and multiples of the time that copying the reply's tensors into new memory takes.
"""

import time
from collections.abc import Callable
from fractions import Fraction

import torch

from fedmaestro.memory import keep_freed_memory
from fedmaestro.models.architecture import Architecture
from fedmaestro.rounds.tree import Span, joined, reduced
from fedmaestro.strategies import AGGREGATIONS
from fedmaestro.strategies.base import AnyPartial
from fedmaestro.submodel import State, cut, signature

DEVICES, REPEATS = 100, 3
SETTINGS = {"train.assumed-attackers": 0.3}
MODELS = {"lenet": (1, 28, 28), "cnn": (3, 32, 32)}


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the least CPU time of ``work``."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def random_state(architecture: Architecture) -> State:
    """Return normal noise in the shapes of the whole model."""
    generator = torch.Generator().manual_seed(0)
    shapes = architecture.shapes(architecture.full_size)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def round_seconds(model: str, rule: str) -> float:
    """Return the time to add the replies of ``DEVICES`` devices, along their tiers' trees, and to finish."""
    architecture = Architecture(name=model, input_shape=MODELS[model], num_classes=10)
    state, aggregation = random_state(architecture), AGGREGATIONS[rule].of(SETTINGS.get)
    tiers = [architecture.shapes(architecture.size_at(Fraction(1, 2**i))) for i in range(5)]
    sizes = [signature(tier) for tier in tiers]
    starts = [cut(state, tier) for tier in tiers]
    replies = [{name: x + 0.01 * (1 + k) for name, x in starts[k % 5].items()} for k in range(DEVICES)]

    def work() -> None:
        empty = aggregation.init(state, sizes)
        whole = empty
        for tier, start in enumerate(starts):
            own = replies[tier::5]

            def leaf(k: int, own: list[State] = own, start: State = start) -> AnyPartial:
                return aggregation.add(empty, own[k], 100 + k, start=start)

            whole = joined(whole, reduced(Span(0, len(own)), leaf, aggregation.merge), aggregation.merge)
        aggregation.finish(whole, state)

    return seconds(work)


def reply_ratio() -> float:
    """Return the time to add one reply of the whole ResNet-18 under the coverage mean, over copying it."""
    architecture = Architecture(name="resnet18", input_shape=(3, 32, 32), num_classes=10)
    reply, aggregation = random_state(architecture), AGGREGATIONS["coverage-mean"]
    partial = aggregation.add(aggregation.init(reply), reply, 3.0)

    def merge() -> None:
        aggregation.merge(partial, aggregation.add(aggregation.init(reply), reply, 7.0))

    return seconds(merge, 7) / seconds(lambda: {name: x.clone() for name, x in reply.items()}, 7)


def main() -> None:
    """Print both as Markdown."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a run
    print(f"| rule | {' | '.join(f'{model}, s per round' for model in MODELS)} |\n|---|{'---|' * len(MODELS)}")
    for rule in AGGREGATIONS:
        print(f"| {rule} | {' | '.join(f'{round_seconds(model, rule):.3f}' for model in MODELS)} |", flush=True)
    print(f"\nResNet-18, coverage mean: one reply costs {reply_ratio():.1f} × copying its bytes")


if __name__ == "__main__":
    main()
