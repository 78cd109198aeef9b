"""Hosts on GPUs: what can be known without one."""

from pathlib import Path

import pytest
import torch

import fedmaestro
from fedmaestro.errors import UserError
from fedmaestro.flower import ray_runtime
from fedmaestro.flower.ray_runtime import check_gpus
from fedmaestro.rounds.placement import placed, placed_on


@pytest.mark.parametrize("actors", [0, 2])
def test_a_gpu_that_is_not_there_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actors: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"--gpus-per-actor 0\.25: this machine has 0 GPUs .*: lower it"):
        fedmaestro.run(out=tmp_path / "run", actors=actors, gpus_per_actor=0.25)
    assert not (tmp_path / "run").exists()


def test_actors_are_as_many_as_cpus_and_gpus_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ray_runtime, "available_cpus", lambda: 16)
    assert check_gpus(0.25, None) == 8
    assert check_gpus(0.1, None) == 16
    assert check_gpus(0.25, 3) == 3
    with pytest.raises(UserError, match="room for 8 actors"):
        check_gpus(0.25, 9)


def test_where_a_process_trains_comes_back() -> None:
    assert placed().type == "cpu"
    with placed_on("meta"):
        assert placed().type == "meta"
    assert placed().type == "cpu"
