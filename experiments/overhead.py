"""What the framework costs on top of bare SGD: 100 MNIST devices a round, against two processes without any framework.

    python experiments/overhead.py --data-dir DIR [--rounds 4] [--repeats 3]

Both sides train the same devices on the same submodels with the same examples, in the same memory layout, with one
PyTorch thread in each of two processes, and take turns within this one run, because machines drift. Reported: ms
per device of both, and the ratio pair by pair. Neither side evaluates or clips gradients.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fedmaestro
from fedmaestro.config.experiment import ExperimentConfig, load_config
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.submodel import cut, load

PROCESSES = 2
HERE = Path(__file__).parent


def settings(data_dir: str, rounds: int) -> ExperimentConfig:
    """Return the MNIST experiment with all 100 devices in every round."""
    overrides = {
        "data.dir": str(Path(data_dir).absolute()),
        "train.objective": "own-prefix",
        "train.clip-norm": 0.0,
        "train.devices-per-round": 100,
        "train.rounds": rounds,
        "train.evaluate-every": rounds,
    }
    return load_config(HERE / "mnist.toml", overrides)


def framework_seconds(config: ExperimentConfig) -> list[float]:
    """Return the wall seconds of every round that has no evaluation and is not the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedmaestro.run(config, out=Path(folder) / "run", actors=PROCESSES)
        return [record.wall_seconds for record in run.rounds if record.round > 1 and not record.tiers]


def bare_worker(
    config: ExperimentConfig, devices: list[int], rounds: int, barrier: "multiprocessing.synchronize.Barrier"
) -> None:
    """Train ``devices`` one after the other, as a plain PyTorch script would."""
    torch.set_num_threads(1)
    env = open_environment(config)
    state = env.plan.architecture.initial_state(0)
    train = config.train
    models, starts = {}, {}
    for tier in env.plan.tiers:
        assert tier.trains is not None
        model = env.plan.architecture.materialize(tier.trains.size)
        models[tier.index] = model.to(memory_format=torch.channels_last)
        starts[tier.index] = cut(state, tier.trains.shapes)
    for _ in range(rounds + 1):
        barrier.wait()
        for device in devices:
            model = models[env.tier_of[device]]
            load(model, starts[env.tier_of[device]])
            examples = env.task.plain(env.parts[device])
            (images,), labels = examples.inputs, examples.targets
            optimizer = torch.optim.SGD(model.parameters(), lr=train.lr)
            for batch in torch.randperm(len(labels)).split(train.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    barrier.wait()


def split(env: Environment) -> list[list[int]]:
    """Share the devices between the processes, the one with the most work first, to whoever has the least."""
    work = {d: len(p) * env.tier(d).serves.cost.train_macs_per_example for d, p in enumerate(env.parts)}
    shares: list[list[int]] = [[] for _ in range(PROCESSES)]
    for device in sorted(work, key=lambda d: -work[d]):
        min(shares, key=lambda share: sum(work[d] for d in share)).append(device)
    return shares


def bare_seconds(config: ExperimentConfig, rounds: int) -> list[float]:
    """Return the wall seconds of ``rounds`` rounds after a warm-up round."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES + 1)
    workers = [
        context.Process(target=bare_worker, args=(config, share, rounds, barrier))
        for share in split(open_environment(config))
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    times = []
    started = time.monotonic()
    for _ in range(rounds + 1):
        barrier.wait()
        times.append(time.monotonic() - started)
        started = time.monotonic()
    for worker in workers:
        worker.join()
    return times[1:]


def main() -> None:
    """Measure both sides in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=4, help="measured rounds of each side and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    config = settings(arguments.data_dir, arguments.rounds + 2)
    ratios = []
    for repeat in range(arguments.repeats):
        ours = statistics.median(framework_seconds(config)) * 10
        bare = statistics.median(bare_seconds(config, arguments.rounds)) * 10
        ratios.append(ours / bare)
        print(f"repeat {repeat}: FedMaestro {ours:.1f} ms per device, bare SGD {bare:.1f}, ratio {ours / bare:.3f}")
    print(f"ratio: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}, max {max(ratios):.3f}")


if __name__ == "__main__":
    main()
