import math

import pytest
import torch
from torch import nn

from fedmaestro.models.architecture import Architecture
from fedmaestro.models.init import initialize
from fedmaestro.models.width import group_norm


def initialized(seed: int) -> nn.Module:
    with torch.device("meta"):  # construction itself would draw from the global generator
        model = nn.Sequential(nn.Conv2d(7, 40, (3, 5)), group_norm(40), nn.Flatten(), nn.Linear(300, 90))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize(("layer", "fan_in"), [(0, 7 * 3 * 5), (3, 300)])
def test_weights_have_two_over_fan_in_as_variance_and_biases_are_zero(layer: int, fan_in: int) -> None:
    module = initialized(0).get_submodule(str(layer))
    scaled = module.weight.detach() / math.sqrt(2 / fan_in)
    n = scaled.numel()
    assert abs(float(scaled.mean())) < 5 / math.sqrt(n)  # 5 σ
    assert abs(float(scaled.var()) - 1) < 5 * math.sqrt(2 / n)
    assert 0.6 < float((scaled.abs() < 1).double().mean()) < 0.76  # normal: 0.683
    assert not module.bias.any()


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = initialized(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = initialized(5), initialized(6)
    for index in (0, 3):
        weight = first.get_submodule(str(index)).weight
        assert torch.equal(weight, second.get_submodule(str(index)).weight)
        assert not torch.equal(weight, other.get_submodule(str(index)).weight)


def test_the_number_of_threads_does_not_matter_and_is_kept() -> None:
    arch = Architecture(name="mlp", input_shape=(1, 9, 8), num_classes=7)
    threads = torch.get_num_threads()
    states = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            states.append(arch.initial_state(0))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
