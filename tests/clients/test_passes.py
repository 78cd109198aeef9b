"""What an objective says it runs is what it runs: its passes against a FLOP counter."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro.clients import OBJECTIVES
from fedmaestro.config.experiment import load_config
from fedmaestro.rounds.device import resident_prefixes
from fedmaestro.rounds.environment import open_environment


class Draws:
    """Stands for a generator: returns one given draw, and remembers how many there could have been."""

    def __init__(self, draw: int) -> None:
        self.draw, self.choices = draw, 1

    def integers(self, high: int) -> int:
        self.choices = high
        return self.draw


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("strategy", ["nested", "heterofl", "fedavg-small", "fedavg-full"])
def test_step_macs_are_the_mean_over_all_draws(objective: str, strategy: str) -> None:
    env = open_environment(load_config(None, {"train.objective": objective, "train.strategy": strategy}))
    images, labels = torch.zeros(3, *env.task.input_shape), torch.zeros(3, dtype=torch.long)
    for tier in env.plan.tiers:
        assert tier.trains is not None
        prefixes = resident_prefixes(env, env.plan, tier.trains)
        flops, draw, choices = [], 0, 1
        while draw < choices:
            draws = Draws(draw)
            with FlopCounterMode(display=False) as counter:
                env.method.objective.loss(prefixes, images, labels, cast(np.random.Generator, draws)).backward()  # type: ignore[no-untyped-call]
            flops.append(counter.get_total_flops())
            draw, choices = draw + 1, draws.choices
        assert np.mean(flops) / 2 / 3 == pytest.approx(tier.step_macs, abs=0.5)


@pytest.mark.parametrize("objective", ["own-prefix", "self-distillation"])
@pytest.mark.parametrize(("freeze", "server_round"), [("alternating", 1), ("alternating", 2), ("v", 2)])
def test_frozen_factors_cost_no_gradients(objective: str, freeze: str, server_round: int) -> None:
    env = open_environment(load_config(None, {"train.objective": objective, "train.freeze": freeze}))
    images, labels = torch.zeros(3, *env.task.input_shape), torch.zeros(3, dtype=torch.long)
    for tier in env.plan.tiers:
        assert tier.trains is not None
        prefixes = resident_prefixes(env, env.plan, tier.trains)
        frozen = env.method.frozen(tier.trains.shapes, server_round)
        for name, parameter in prefixes.parameters.items():
            parameter.requires_grad_(name not in frozen)
        flops, draw, choices = [], 0, 1
        while draw < choices:
            draws = Draws(draw)
            with FlopCounterMode(display=False) as counter:
                env.method.objective.loss(prefixes, images, labels, cast(np.random.Generator, draws)).backward()  # type: ignore[no-untyped-call]
            flops.append(counter.get_total_flops())
            draw, choices = draw + 1, draws.choices
        for parameter in prefixes.parameters.values():
            parameter.requires_grad_(True)
        assert np.mean(flops) / 2 / 3 == pytest.approx(env.method.step_macs(tier, server_round), abs=1)
        assert env.method.step_macs(tier, server_round) < tier.step_macs


def test_two_levels_at_once_need_the_memory_of_both() -> None:
    def memory(objective: str, **more: Any) -> list[int]:
        env = open_environment(load_config(None, {"train.objective": objective, **more}))
        return [tier.step_memory_bytes for tier in env.plan.tiers]

    env = open_environment(load_config(None))
    one, two = memory("own-prefix"), memory("self-distillation")
    extra = [tier.serves.cost.activation_bytes for tier in env.plan.tiers[1:]] + [0]
    assert two == [a + b for a, b in zip(one, extra, strict=True)]
    assert memory("ordered-prefixes") == one
