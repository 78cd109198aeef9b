"""What is measured: experiments without evaluation, so that a round is its training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ONE_TIER = str(Path(__file__).parent / "one_tier.toml")
LINEAR = str(Path(__file__).parent / "linear.py")

Settings = dict[str, Any]


def _mnist(model: str, **more: Any) -> Settings:
    return {
        "data.name": "mnist",
        "data.devices": 100,
        "data.partition": "iid",
        "model.name": model,
        "fleet.file": ONE_TIER,
        "train.strategy": "nested",
        "train.objective": "own-prefix",
        "train.devices-per-round": 10,
        "train.local-epochs": 1,
        "train.batch-size": 32,
        "train.lr": 0.05,
        "train.lr-final-factor": 1.0,
        "train.clip-norm": 0.0,
        "train.logit-adjustment": 0.0,
    } | {key.replace("_", "-"): value for key, value in more.items()}


@dataclass(frozen=True)
class Workload:
    """An experiment, and who can run it."""

    settings: Settings
    flower: bool = True
    """Whether plain Flower can: it has no tiers."""
    about: str = field(default="", kw_only=True)


FIVE = {"fleet.file": "", "fleet.preset": "five-tiers"}

WORKLOADS: dict[str, Workload] = {
    "lenet-10": Workload(_mnist("lenet"), about="LeNet, 10 devices a round"),
    "lenet-100": Workload(_mnist("lenet") | {"train.devices-per-round": 100}, about="LeNet, 100 devices a round"),
    "lenet-100-single": Workload(
        _mnist("lenet") | {"train.devices-per-round": 100, "train.cohort-size": 1},
        about="LeNet, 100 devices a round, messages of one device",
    ),
    "cnn-10": Workload(_mnist("cnn"), about="small CNN, 10 devices a round"),
    "linear-100": Workload(
        _mnist("linear")
        | {"use": LINEAR, "data.name": "cifar10", "train.devices-per-round": 100, "data.devices": 1000},
        about="linear model, 100 devices of 50 examples a round",
    ),
    "mlp-100": Workload(
        _mnist("mlp") | {"train.devices-per-round": 100, "data.devices": 1000},
        about="small MLP, 100 devices of 60 examples a round",
    ),
    "lenet-10-tiers": Workload(_mnist("lenet") | FIVE, flower=False, about="LeNet, five tiers, 10 devices a round"),
    "lenet-100-tiers": Workload(
        _mnist("lenet") | FIVE | {"train.devices-per-round": 100},
        flower=False,
        about="LeNet, five tiers, 100 devices a round",
    ),
    "resnet-2": Workload(
        _mnist("resnet18")
        | {
            "data.name": "cifar10",
            "train.devices-per-round": 2,
            "data.devices": 500,
        },
        about="CIFAR ResNet-18, 2 devices of 100 examples a round",
    ),
}
