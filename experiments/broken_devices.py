"""A share of devices sends what is broken: the run must be the one without them (docs/reliability.md).

    python experiments/broken_devices.py --data-dir DIR [--seeds 0,1,2] [--share 0.3] [--out FILE.json]

On MNIST (``attacks_mnist.toml`` without attackers, one device per message): a share of the devices replies NaN, other
shapes, other names, or numbers of examples that are not its own; which, follows from its number. Beside that, the same
run with these devices failing honestly, and with all devices sound.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

import fedmaestro
from fedmaestro.flower.client_app import app as sound

HERE = Path(__file__).parent
SETTINGS = {"fleet.attack": "none", "train.cohort-size": 1}


def nan(record: ArrayRecord) -> None:
    """Put one number that is none into every tensor."""
    for name, array in list(record.items()):
        values = array.numpy().copy()
        values.reshape(-1)[:1] = math.nan
        record[name] = Array(values)


def shapes(record: ArrayRecord) -> None:
    """Leave the last row of every tensor out."""
    for name, array in list(record.items()):
        record[name] = Array(array.numpy()[:-1].copy())


def names(record: ArrayRecord) -> None:
    """Send one tensor under another name."""
    name = next(iter(record))
    record[f"{name}x"] = record.pop(name)


def long(record: ArrayRecord) -> None:
    """Send what is a million times as long, as a wrong weight would make it."""
    for name, array in list(record.items()):
        record[name] = Array((1e6 * array.numpy()).astype(np.float32))


KINDS: tuple[Callable[[ArrayRecord], None], ...] = (nan, shapes, names, long)


def hosts(broken: frozenset[int], how: str) -> ClientApp:
    """Return an app whose devices in ``broken`` reply what is broken, or fail."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        devices: Any = message.content.config_records["job"]["devices"]
        if devices[0] not in broken or how == "sound":
            return sound(message, context)
        if how == "failing":
            raise RuntimeError("this device is out of order")
        reply = sound(message, context)
        KINDS[devices[0] % len(KINDS)](reply.content.array_records["sums"])
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return sound(message, context)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return sound(message, context)

    return app


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for seed in map(int, given.seeds.split(",")):
        devices = np.random.default_rng(seed).permutation(100)[: round(100 * given.share)]
        broken = frozenset(int(x) for x in devices)
        for how in ("sound", "failing", "broken"):
            with tempfile.TemporaryDirectory() as folder:
                run = fedmaestro.run(
                    HERE / "attacks_mnist.toml",
                    strategy="nested",
                    overrides={**SETTINGS, "seed": seed},
                    data_dir=given.data_dir,
                    out=Path(folder) / "run",
                    client_app=hosts(broken, how),
                )
                summary = run.summary
            rows.append(
                {
                    "seed": seed,
                    "hosts": how,
                    "mean": summary["mean_tier_accuracy"],
                    "tiers": {name: tier["final_accuracy"] for name, tier in summary["tiers"].items()},
                    "failed_by": summary["failed_by"],
                    "sampled": summary["updates"]["sampled"],
                    "model_sha256": summary["model_sha256"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
