"""What a LoD training step costs at a rank prefix, against its share of the MACs: ResNet-18 and VGG-19 on a CPU.

Target: time(ρ) ≤ 1.3 · MACs(ρ) / MACs(1) · time(1) + 10 % of time(1). One step is forward, backward and SGD with
momentum on a batch of 32 images of 32×32; fractions are measured in turn within one run, ``--repeats`` times, and the
table shows medians. A prefix runs on the whole model (``lod.set_ranks``), as in training; ``cut`` is the same prefix
as a model of its own (``lod.truncate``), as on a device.

    python experiments/lod_step_cost.py [--threads N] [--repeats 5] [--models resnet18 vgg19]
"""

import argparse
import statistics
import time
from fractions import Fraction

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from fedmaestro import lod
from fedmaestro.fleet.cost import cost, trace
from fedmaestro.models.architecture import Architecture

FRACTIONS = [Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(1, 16)]
BATCH = 32


def step_seconds(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the wall seconds of one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    started = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - started


def measure(name: str, repeats: int) -> list[dict[str, float]]:
    """Return one row per fraction: its share of the training MACs, and its times relative to the full step."""
    architecture = Architecture(name=name, input_shape=(3, 32, 32), num_classes=10)
    model = architecture.with_state(architecture.initial_state(0)).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    traced = trace(architecture.full, architecture.input_shape)
    sizes = {fraction: architecture.size_at(fraction).ranks or {} for fraction in FRACTIONS}
    cut = {f: lod.truncate(model, ranks).to(memory_format=torch.channels_last) for f, ranks in sizes.items()}
    prefix_seconds: dict[Fraction, list[float]] = {fraction: [] for fraction in FRACTIONS}
    cut_seconds: dict[Fraction, list[float]] = {fraction: [] for fraction in FRACTIONS}
    for repeat in range(repeats + 1):
        for fraction, ranks in sizes.items():
            lod.set_ranks(model, ranks)
            seconds = step_seconds(model, images, labels), step_seconds(cut[fraction], images, labels)
            if repeat > 0:  # the first one warms up
                prefix_seconds[fraction].append(seconds[0])
                cut_seconds[fraction].append(seconds[1])
    macs = {f: cost(traced, ranks, batch_size=BATCH).train_macs_per_example for f, ranks in sizes.items()}
    full = statistics.median(prefix_seconds[Fraction(1)])
    return [
        {
            "fraction": float(fraction),
            "share": macs[fraction] / macs[Fraction(1)],
            "seconds": statistics.median(prefix_seconds[fraction]),
            "ratio": statistics.median(prefix_seconds[fraction]) / full,
            "cut": statistics.median(cut_seconds[fraction]) / full,
            "limit": 1.3 * macs[fraction] / macs[Fraction(1)] + 0.1,
        }
        for fraction in FRACTIONS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg19"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console()
    for name in arguments.models:
        table = Table(title=f"{name}, batch {BATCH}, {arguments.threads} threads, median of {arguments.repeats}")
        for heading in ("rank fraction", "share of MACs", "seconds", "time / full", "limit", "ok", "cut / full"):
            table.add_column(heading, justify="right")
        for row in measure(name, arguments.repeats):
            table.add_row(
                f"{row['fraction']:.4g}",
                f"{row['share']:.3f}",
                f"{row['seconds']:.3f}",
                f"{row['ratio']:.3f}",
                f"{row['limit']:.3f}",
                "yes" if row["ratio"] <= row["limit"] else "NO",
                f"{row['cut']:.3f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
