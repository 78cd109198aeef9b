"""A contender of ``benchmarks.compare``: plain FedAvg with pfl 0.6.0 (apple/pfl-research).

It runs in an environment of its own, with pfl, torch, pyarrow and pillow and nothing of FedMaestro's: so it reads the
data itself, and has the networks written out. On the CPU, a process per worker and a thread per process, as all do;
rank 0 answers to ``benchmarks.compare`` and starts the others.

Its networks are dense. Where a workload's strategy factorises layers, the others train a costlier network (LeNet:
66,138 parameters instead of 44,426), and the ratio to them is not one of frameworks.

What pfl is spared: evaluation and the printing of metrics; and pixels are normalised before the rounds, where others do
it each time that they train a device. Left to it is whom it trains, each in their turn (``minimize_reuse``, which it
recommends), and in which process: they are dealt round robin.
"""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROUNDS = 100_000
"""More than anybody waits for."""

RANK = "PFL_WORKER_RANK"
"""Where pfl looks for a process's number."""

COLUMNS = {"mnist": ("image", "label"), "cifar10": ("img", "label")}
CLASSES = 10

Shape = tuple[int, ...]
"""Of an image: channels, height, width."""


class Block(nn.Module):
    """A basic block of ResNet with GroupNorm."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, after, stride), _norm(after)
        self.conv2, self.norm2 = _conv(after, after), _norm(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), _norm(after))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, before, H, W)`` to ``(B, after, H/stride, W/stride)``."""
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def _conv(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels)


def lenet(shape: Shape) -> list[nn.Module]:
    """Return the layers of ``fedmaestro.models.lenet``: 44,426 parameters on MNIST."""
    channels, height, width = shape
    flat = 16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    convolutions = [nn.Conv2d(channels, 6, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)]
    return [*convolutions, nn.ReLU(), nn.Flatten(), *_dense(flat, 120, 84, CLASSES)]


def cnn(shape: Shape) -> list[nn.Module]:
    """Return the layers of ``fedmaestro.models.cnn``."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for before, after in ((channels, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), _norm(after), nn.MaxPool2d(2), nn.ReLU()]
    return [*layers, nn.Flatten(), *_dense(64 * (height // 8) * (width // 8), 128, CLASSES)]


def resnet18(shape: Shape) -> list[nn.Module]:
    """Return the layers of ``fedmaestro.models.resnet``."""
    layers: list[nn.Module] = [_conv(shape[0], 64), _norm(64), nn.ReLU()]
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [Block(before, after, after // before), Block(after, after, 1)]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]


def mlp(shape: Shape) -> list[nn.Module]:
    """Return the layers of ``fedmaestro.models.mlp``."""
    return [nn.Flatten(), *_dense(int(np.prod(shape)), 128, 128, CLASSES)]


def linear(shape: Shape) -> list[nn.Module]:
    """Return a linear classifier of pixels."""
    return [nn.Flatten(), *_dense(int(np.prod(shape)), CLASSES)]


def _dense(*units: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(units):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


MODELS: dict[str, Callable[[Shape], list[nn.Module]]] = {
    "lenet": lenet,
    "cnn": cnn,
    "resnet18": resnet18,
    "mlp": mlp,
    "linear": linear,
}


class Classifier(nn.Sequential):
    """A network with what pfl calls."""

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return what training minimises."""
        return nn.functional.cross_entropy(self(pixels), labels)

    def metrics(self, *_batch: Tensor) -> dict[str, Any]:
        """Return nothing: pfl evaluates in iteration 0, whatever frequency one gives."""
        return {}


def read(folder: Path, image_column: str, label_column: str) -> tuple[Tensor, Tensor]:
    """Return the training set: normalised pixels (N, C, H, W), channels last in memory, and labels (N,)."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from PIL import Image

    images, labels = [], []
    for path in sorted(folder.glob("train-*.parquet")):
        table = pq.read_table(path, columns=[image_column, label_column])
        images += [np.asarray(Image.open(io.BytesIO(x["bytes"]))) for x in table[image_column].to_pylist()]
        labels += table[label_column].to_pylist()
    pixels = np.stack(images).reshape(len(images), *images[0].shape[:2], -1).astype(np.float32)
    for channel in range(pixels.shape[3]):
        values = pixels[..., channel]
        values -= values.mean(dtype=np.float64)
        values /= values.std(dtype=np.float64)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels)


def start_others(workers: int) -> list[subprocess.Popen[bytes]]:
    """Start the ranks above 0, and let this process be rank 0 once it imports pfl."""
    # pfl would take a GPU, and its collectives with it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ[RANK] = "0"
    if workers == 1:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Only the first one is listened on.
    os.environ["PFL_WORKER_ADDRESSES"] = ",".join([f"127.0.0.1:{port}"] * workers)
    return [
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, RANK: str(rank)},
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            bufsize=0,
        )
        for rank in range(1, workers)
    ]


def requests() -> SimpleQueue[None]:
    """Return a queue with an item for every round asked for; without standard input, the process ends.

    That is what ends the ranks above 0 with rank 0, even when they wait for it in a collective.
    """
    queue: SimpleQueue[None] = SimpleQueue()

    def listen() -> None:
        # Unbuffered: at exit, Python wants the lock that a reader of sys.stdin holds.
        for line in os.fdopen(0, "rb", buffering=0, closefd=False):
            if line.strip() != b"round":
                break
            queue.put(None)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return queue


def train(
    settings: dict[str, Any], data_dir: str, say: Callable[[str], None], others: Sequence[subprocess.Popen[bytes]]
) -> None:
    """Train a round whenever one is asked for."""
    # Importing pfl joins the ranks: not before `start_others`.
    from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
    from pfl.aggregate.weighting import WeightByDatapoints  # type: ignore[import-not-found]
    from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
    from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore[import-not-found]
    from pfl.callback.base import TrainingProcessCallback  # type: ignore[import-not-found]
    from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
    from pfl.data.pytorch import PyTorchTensorDataset  # type: ignore[import-not-found]
    from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
    from pfl.hyperparam.base import NNTrainHyperParams  # type: ignore[import-not-found]
    from pfl.metrics import Metrics  # type: ignore[import-not-found]
    from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]

    asked = requests()

    class Turns(TrainingProcessCallback):  # type: ignore[misc]
        """Stop after every round until the next one is asked for."""

        began = 0.0

        def on_train_begin(self, **_: Any) -> Any:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            self._await("ready")
            return Metrics()

        def after_central_iteration(self, *_: Any, **__: Any) -> Any:
            self._await(repr(time.perf_counter() - self.began))
            return False, Metrics()

        def _await(self, answer: str) -> None:
            if os.environ[RANK] == "0":
                say(answer)
            asked.get()
            self.began = time.perf_counter()
            # The others would train on while rank 0 is not asked to.
            for other in others:
                assert other.stdin is not None
                other.stdin.write(b"round\n")

    # All ranks must draw the same devices and start from the same parameters.
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    pixels, labels = read(Path(data_dir) / settings["data.name"], *COLUMNS[settings["data.name"]])
    parts = torch.tensor_split(torch.randperm(len(labels)), settings["data.devices"])
    network = Classifier(*MODELS[settings["model.name"]](pixels.shape[1:]))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def device(number: int) -> Any:
        # pfl takes batches in the order of the dataset: to shuffle is its user's part.
        chosen = parts[number][torch.randperm(len(parts[number]))]
        return PyTorchTensorDataset((pixels[chosen], labels[chosen]), user_id=str(number))

    data = FederatedDataset(device, get_user_sampler("minimize_reuse", range(len(parts))))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=ROUNDS,
            evaluation_frequency=ROUNDS,
            train_cohort_size=settings["train.devices-per-round"],
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0)),
        NNTrainHyperParams(
            local_num_epochs=settings["train.local-epochs"],
            local_learning_rate=settings["train.lr"],
            local_batch_size=settings["train.batch-size"],
        ),
        callbacks=[Turns()],
        send_metrics_to_platform=False,
    )


def main() -> None:
    """Run the command."""
    # What others print would pass for an answer.
    out, sys.stdout = sys.stdout, sys.stderr

    def say(what: str) -> None:
        out.write(what + "\n")
        out.flush()

    order = json.loads(sys.argv[1])
    settings = order["settings"]
    for key, known in (("model.name", MODELS), ("data.name", COLUMNS)):
        if settings[key] not in known:
            print(f"the contender pfl knows no {key} {settings[key]!r}: only {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    torch.set_num_threads(1)
    others: list[subprocess.Popen[bytes]] = []
    if RANK not in os.environ:
        # pfl has no way for a rank that trains nobody: its collectives would not match the others'.
        others = start_others(min(order["workers"], settings["train.devices-per-round"]))
    train(settings, order["data_dir"], say, others)


if __name__ == "__main__":
    main()
