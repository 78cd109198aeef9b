"""Who runs a workload: bare PyTorch, FedMaestro, plain Flower.

Each is a process that works for a round whenever a line comes in, and answers with the seconds that it took: so
several can take turns, and a noisy machine is as noisy for all of them. Run by ``benchmarks.compare``.
"""

import json
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from fedmaestro.config.experiment import load_config
from fedmaestro.memory import keep_freed_memory
from fedmaestro.rounds.environment import Environment, open_environment
from fedmaestro.runs.start import code_of

WARM_SECONDS = 20.0
"""Until Ray's processes have started: before that, the driver trains too."""

LONGEST_SECONDS = 300
"""That a round may take."""

ROUNDS = 100_000
"""More than anybody waits for."""

_out = sys.stdout


def say(what: str) -> None:
    """Answer the parent."""
    _out.write(what + "\n")
    _out.flush()


def asked() -> bool:
    """Wait until a round is asked for; False: that was all."""
    return sys.stdin.readline().strip() == "round"


def serve(work: Callable[[int], None]) -> None:
    """Work through rounds as they are asked for."""
    number = 0
    say("ready")
    while asked():
        number += 1
        began = time.perf_counter()
        work(number)
        say(repr(time.perf_counter() - began))


def experiment(settings: dict[str, Any], data_dir: str) -> Any:
    """Return the configuration."""
    never = {"train.rounds": ROUNDS, "train.evaluate-every": ROUNDS, "data.dir": data_dir}
    return load_config(None, {**settings, **never})


def environment(settings: dict[str, Any], data_dir: str) -> Environment:
    """Return the opened experiment."""
    config = experiment(settings, data_dir)
    return open_environment(config, code=code_of(config))


# Bare PyTorch: as many processes as actors, each trains its devices one after the other.


def _bare_worker(settings: dict[str, Any], data_dir: str, inbox: Any, outbox: Any, keep: bool) -> None:
    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    env = environment(settings, data_dir)
    models: dict[Any, torch.nn.Module] = {}
    outbox.put("ready")
    while (devices := inbox.get()) is not None:
        for device in devices:
            _train_bare(env, models, device)
        outbox.put("done")


def _train_bare(env: Environment, models: dict[Any, torch.nn.Module], device: int) -> None:
    tier, train = env.tier(device), env.config.train
    assert tier.trains is not None
    if tier.trains not in models:
        model = env.plan.architecture.materialize(tier.trains.size)
        if len(env.plan.architecture.input_shape) == 3:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models[tier.trains] = model
    model = models[tier.trains].train()
    batch = env.task.plain(env.parts[device])
    optimizer = torch.optim.SGD(model.parameters(), lr=train.lr)
    for indices in torch.split(torch.randperm(len(batch)), train.batch_size):
        some = batch.take(indices)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(*some.inputs), some.targets).backward()
        optimizer.step()


def bare(settings: dict[str, Any], data_dir: str, workers: int, keep: bool = False) -> None:
    """Train the devices that FedMaestro would, and nothing else."""
    from fedmaestro.rounds.server import schedule, start

    context = get_context("spawn")
    inboxes, outbox = [context.Queue() for _ in range(workers)], context.Queue()
    processes = [
        context.Process(target=_bare_worker, args=(settings, data_dir, inbox, outbox, keep), daemon=True)
        for inbox in inboxes
    ]
    for process in processes:
        process.start()
    _wait(outbox, processes)
    env = environment(settings, data_dir)
    server = start(env)

    def work(number: int) -> None:
        shares = shared_out(
            [pair for x in schedule(env, server, number).groups for pair in zip(x.devices, x.work, strict=True)],
            workers,
        )
        for inbox, share in zip(inboxes, shares, strict=True):
            inbox.put(share)
        _wait(outbox, processes)

    serve(work)


def _wait(outbox: Any, processes: Sequence[Any]) -> None:
    """Wait for an answer of every process; RuntimeError where one has ended."""
    for _ in processes:
        for _ in range(LONGEST_SECONDS):
            try:
                outbox.get(timeout=1)
                break
            except Empty:
                if not all(process.is_alive() for process in processes):
                    raise RuntimeError("a process of the bare loop has ended") from None
        else:
            raise RuntimeError(f"no answer of the bare loop for {LONGEST_SECONDS} s")


def bare_kept(settings: dict[str, Any], data_dir: str, workers: int) -> None:
    """Train the same in processes that keep the memory they free, as FedMaestro's do."""
    bare(settings, data_dir, workers, keep=True)


def bare_dense(settings: dict[str, Any], data_dir: str, workers: int) -> None:
    """Train the dense network that pfl trains, where ``bare`` trains its factorised form."""
    own = "use" in settings  # which is dense as it is
    bare(settings if own else {**settings, "train.strategy": "fjord"}, data_dir, workers)


def shared_out(devices: Sequence[tuple[int, int]], workers: int) -> list[list[int]]:
    """Return devices ``(number, work)`` of every worker: the longest first to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for device, work in sorted(devices, key=lambda pair: (-pair[1], pair[0])):
        least = loads.index(min(loads))
        shares[least].append(device)
        loads[least] += work
    return shares


# FedMaestro: the whole run, with its records and checkpoints.


def fedmaestro(settings: dict[str, Any], data_dir: str, workers: int) -> None:
    """Stop after every round until the next one is asked for."""
    import fedmaestro as package
    from fedmaestro.rounds.observer import Observer

    class Turns(Observer):
        began = 0.0
        started = 0.0

        def on_round(self, record: Any) -> None:
            if record.round == 0:
                self.started = time.monotonic()
            if time.monotonic() < self.started + WARM_SECONDS:
                return
            say(repr(time.perf_counter() - self.began) if self.began else "ready")
            if not asked():
                os._exit(0)
            self.began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        package.run(experiment(settings, data_dir), out=Path(folder) / "run", actors=workers, observers=[Turns()])


# Plain Flower: one node per device, FedAvg, its own simulation engine.


@cache
def _flower_client(settings: str, data_dir: str) -> tuple[Environment, dict[Any, torch.nn.Module]]:
    torch.set_num_threads(1)
    return environment(json.loads(settings), data_dir), {}


def flower(settings: dict[str, Any], data_dir: str, workers: int) -> None:
    """FedAvg over the devices of a round, sampled by Flower."""
    from flwr.app import ArrayRecord, ConfigRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from benchmarks.flower_client import app as client_app

    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    env = environment(settings, data_dir)
    train = env.config.train
    devices = len(env.parts)
    strategy = FedAvg(
        fraction_train=train.devices_per_round / devices,
        fraction_evaluate=0.0,
        min_train_nodes=train.devices_per_round,
        min_available_nodes=devices,
    )
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _context: Context) -> None:
        while len(list(grid.get_node_ids())) < devices:
            time.sleep(0.05)
        state = env.plan.architecture.materialize(env.plan.full.size).state_dict()
        arrays = ArrayRecord(state)
        config = ConfigRecord({"settings": json.dumps(settings), "data-dir": data_dir})

        def work(number: int) -> None:
            nonlocal arrays
            messages = strategy.configure_train(number, arrays, config, grid)
            replies = list(grid.send_and_receive(messages=messages))
            new, _ = strategy.aggregate_train(number, replies)
            assert new is not None
            arrays = new

        serve(work)
        os._exit(0)

    options: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": workers}}
    run_simulation(server_app, client_app, devices, backend_config=options)


CONTENDERS = {
    "bare": bare,
    "bare-kept": bare_kept,
    "bare-dense": bare_dense,
    "fedmaestro": fedmaestro,
    "flower": flower,
}

if __name__ == "__main__":
    # What others print would pass for an answer.
    _out, sys.stdout = sys.stdout, sys.stderr
    order = json.loads(sys.argv[1])
    threading.current_thread().name = order["contender"]
    CONTENDERS[order["contender"]](order["settings"], order["data_dir"], order["workers"])
