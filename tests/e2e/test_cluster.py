"""Several Ray nodes on this machine: unequal ones, one that is lost, one that comes, one without data, one with others.

Ray stays out of this process: one subprocess holds the nodes, another one runs the experiment. What the nodes do is
seen by marks in a folder, which every host makes before it trains; by waiting for each other's marks, all of them take
part, however fast each has started.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

import fedmaestro
from fedmaestro.flower.ray_runtime import temporary_folder

HOLD = """
import json, sys
from ray.cluster_utils import Cluster

cluster, nodes = Cluster(), []
for line in sys.stdin:
    name, arguments = json.loads(line)
    if name == "add":
        nodes.append(cluster.add_node(**arguments))
    else:
        cluster.remove_node(nodes[arguments["number"]], allow_graceful=False)
    print("done", cluster.address, flush=True)
cluster.shutdown()
"""
"""Does what each line says; ends with its input."""

MARKING = """
import os, time
from pathlib import Path
from fedmaestro.flower.client_app import app

class Marking:
    def __init__(self, folder, wanted, stuck):
        self.folder, self.wanted, self.stuck = Path(folder), wanted, stuck

    def __call__(self, message, context):
        if message.metadata.message_type == "train":
            node, number = os.environ["NODE"], message.content.config_records["job"]["round"]
            (self.folder / f"{node}-{context.node_id}").touch()
            deadline = time.monotonic() + 150
            while not self.met(number) and time.monotonic() < deadline:
                time.sleep(0.05)
            if [number, node] == self.stuck and not (self.folder / "stuck").exists():
                (self.folder / "stuck").touch()
                time.sleep(600)
        return app(message, context)

    def met(self, number):
        wanted = [(node, count) for first, node, count in self.wanted if number >= first]
        return all(len(list(self.folder.glob(f"{node}-*"))) >= count for node, count in wanted)
"""
"""``wanted``: from which round on how many hosts of a node must have come; ``stuck``: in which round one of a
node does not go on."""

RUN = """
import json, logging, sys
import numpy as np
import fedmaestro
from marking import Marking

class Sent(logging.Handler):
    lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

if __name__ == "__main__":
    address, out, marks, given = sys.argv[1:]
    given = json.loads(given)
    logging.getLogger("fedmaestro").setLevel(logging.INFO)
    logging.getLogger("fedmaestro").addHandler(Sent())
    options = {"data": dict(np.load(given["arrays"]))} if "arrays" in given else {}
    run = fedmaestro.run(
        overrides=given["overrides"],
        out=out,
        actors=given["actors"],
        ray_address=address,
        client_app=Marking(marks, given["wanted"], given.get("stuck")),
        **options,
    )
    print(json.dumps({
        "model": run.summary["model_sha256"],
        "failed": sum(record.failed for record in run.rounds),
        "sent": [line for line in Sent.lines if "is sent" in line],
    }))
"""

SMALL = {"train.rounds": 4, "train.evaluate-every": 2, "train.cohort-size": 1}
"""A message for each device: more than hosts that wait for others can hold."""


class Nodes:
    """A Ray cluster on this machine, held by a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.address = ""

    def add(self, *, cpus: int = 1, **environment: str) -> None:
        """Start a node whose processes have these variables besides this process's."""
        self._do("add", num_cpus=cpus, env_vars=environment)

    def kill(self, number: int) -> None:
        """Kill all processes of the node that was added as this one, from 0 on."""
        self._do("remove", number=number)

    def _do(self, name: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()
        words: list[str] = []
        while words[:1] != ["done"]:
            line = self._process.stdout.readline()
            assert line, "the process that holds the nodes has ended"
            words = line.split()
        self.address = words[1]


@contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    """Hold a cluster for at most five minutes, with files of its own: a plain ``ray.init()`` elsewhere joins others."""
    temporary = tempfile.TemporaryDirectory(dir=temporary_folder(), ignore_cleanup_errors=True)
    with temporary as files, (folder / "nodes.log").open("w") as log, _held(files, log) as held:
        yield held


@contextmanager
def _held(files: str, log: IO[str]) -> Iterator[Nodes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "RAY_TMPDIR": files},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    bound = threading.Timer(300, process.kill)
    bound.start()
    try:
        yield Nodes(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            bound.cancel()
            process.kill()
            process.wait()
            process.stdout.close()


class Running:
    """A run on a cluster, in a process of its own, with marks of who works."""

    def __init__(self, folder: Path, address: str, **given: Any) -> None:
        self.marks = folder / "marks"
        self.marks.mkdir()
        (folder / "marking.py").write_text(MARKING)
        (folder / "run.py").write_text(RUN)
        command = [sys.executable, str(folder / "run.py"), address, str(folder / "run"), str(self.marks)]
        self._process = subprocess.Popen(
            [*command, json.dumps(given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, mark: str) -> None:
        """Wait until a host has made a mark."""
        deadline = time.monotonic() + 120
        while not (self.marks / mark).exists():
            assert self._process.poll() is None, self._process.communicate()[1][-3000:]
            assert time.monotonic() < deadline, f"nobody made the mark {mark!r}"
            time.sleep(0.05)

    def result(self) -> dict[str, Any]:
        """Wait for the end of the run and return what it says."""
        try:
            output, errors = self._process.communicate(timeout=240)
        finally:
            self._process.kill()
        assert self._process.returncode == 0, errors[-3000:]
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def hosts_of(self, node: str) -> int:
        """Return how many hosts of a node have worked."""
        return len(list(self.marks.glob(f"{node}-*")))


def here(tmp_path: Path, overrides: dict[str, Any], **options: Any) -> str:
    """Return the hash of the model of the same run in this process."""
    run = fedmaestro.run(overrides=overrides, out=tmp_path / "here", actors=0, **options)
    return str(run.summary["model_sha256"])


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[[str, int], Path]:
    """Return what writes a folder of made-up MNIST: 60 + 20 grey images of 8×8 pixels, drawn with a seed."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def png(pixels: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    def write(name: str, seed: int) -> Path:
        rng = np.random.default_rng(seed)
        (tmp_path / name / "mnist").mkdir(parents=True)
        for split, count in (("train", 60), ("test", 20)):
            images = [png(pixels) for pixels in rng.integers(0, 256, (count, 8, 8), np.uint8)]
            table = pa.table({"image": images, "label": [i % 10 for i in range(count)]})
            pq.write_table(table, tmp_path / name / "mnist" / f"{split}-00000-of-00001.parquet")
        return tmp_path / name

    return write


MADE_UP = {**SMALL, "data.name": "mnist", "data.devices": 12, "data.partition": "iid"}


def test_two_unequal_nodes_give_the_model_of_this_process(tmp_path: Path) -> None:
    with nodes(tmp_path) as cluster:
        cluster.add(cpus=1, NODE="head")
        cluster.add(cpus=2, NODE="other")
        running = Running(
            tmp_path,
            cluster.address,
            overrides=SMALL,
            actors=3,
            wanted=[(2, "head", 1), (2, "other", 2)],
        )
        result = running.result()
    assert result == {"model": here(tmp_path, SMALL), "failed": 0, "sent": []}
    assert (running.hosts_of("head"), running.hosts_of("other")) == (1, 2)


@pytest.mark.slow
def test_a_node_that_is_killed_in_mid_round_and_one_that_comes_change_nothing(tmp_path: Path) -> None:
    rounds = {**SMALL, "train.rounds": 6}
    with nodes(tmp_path) as cluster:
        cluster.add(NODE="head")
        cluster.add(NODE="other")
        cluster.add(NODE="victim")
        running = Running(
            tmp_path,
            cluster.address,
            overrides=rounds,
            actors=3,
            wanted=[(2, "head", 1), (2, "other", 1), (2, "victim", 1), (4, "new", 1)],
            stuck=[3, "victim"],
        )
        running.wait_for("stuck")
        cluster.kill(2)
        cluster.add(NODE="new")
        result = running.result()
    assert result == {"model": here(tmp_path, rounds), "failed": 0, "sent": []}
    assert running.hosts_of("new") == 1


@pytest.mark.slow
def test_hosts_that_are_lost_while_they_are_idle_are_nobodys_failure(tmp_path: Path) -> None:
    """The last message of a round, on its way from one lost host to the next, would count as failed."""
    with nodes(tmp_path) as cluster:
        cluster.add(NODE="head")
        cluster.add(cpus=4, NODE="victim")
        running = Running(
            tmp_path,
            cluster.address,
            overrides=SMALL,
            actors=5,
            wanted=[(2, "head", 1), (2, "victim", 4)],
            stuck=[3, "victim"],
        )
        running.wait_for("stuck")
        time.sleep(5)  # the others finish the round meanwhile, and wait for this one
        cluster.kill(1)
        result = running.result()
    assert result == {"model": here(tmp_path, SMALL), "failed": 0, "sent": []}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_data_that_a_node_lacks_are_sent_there_once(
    tmp_path: Path, kind: str, made_up: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By path where they are; what a script gives is too large for messages, and its function is called here only."""
    given: dict[str, Any] = {"overrides": MADE_UP}
    options: dict[str, Any] = {}
    if kind == "files":
        monkeypatch.setenv("FEDMAESTRO_DATA_DIR", str(made_up("data", 0)))
    else:
        rng = np.random.default_rng(0)
        arrays = {"x": rng.normal(size=(500, 800)).astype(np.float32), "y": rng.integers(4, size=500)}
        np.savez(tmp_path / "arrays.npz", **arrays)
        options = {"data": arrays}
        given = {"overrides": {**SMALL, "data.devices": 12}, "arrays": str(tmp_path / "arrays.npz")}
    far = tmp_path / "far"
    with nodes(tmp_path) as cluster:
        cluster.add(NODE="head")
        cluster.add(cpus=2, NODE="far", FEDMAESTRO_CACHE=str(far), FEDMAESTRO_DATA_DIR=str(tmp_path / "nowhere"))
        running = Running(tmp_path, cluster.address, actors=3, wanted=[(2, "head", 1), (2, "far", 2)], **given)
        result = running.result()
    assert (result["model"], result["failed"]) == (here(tmp_path, given["overrides"], **options), 0)
    assert len(result["sent"]) == (1 if kind == "files" else 2), "the arrays, and the object that they came in"
    assert len([path for path in far.glob("datasets/*") if not path.name.startswith(".")]) == 1


@pytest.mark.slow
def test_a_node_with_other_data_is_one_line(tmp_path: Path, made_up: Callable[[str, int], Path]) -> None:
    data, others, out = made_up("data", 0), made_up("others", 1), tmp_path / "run"
    with nodes(tmp_path) as cluster:
        cluster.add(FEDMAESTRO_DATA_DIR=str(data))
        cluster.add(FEDMAESTRO_DATA_DIR=str(others))
        settings = [f"--set={key}={value}" for key, value in {**MADE_UP, "train.rounds": 100_000}.items()]
        command = [sys.executable, "-m", "fedmaestro.cli", "run", "--ray-address", cluster.address, *settings]
        environment = {**os.environ, "FEDMAESTRO_DATA_DIR": str(data)}
        done = subprocess.run(
            [*command, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fedmaestro:")]
    assert "other data of 'mnist' than the server: give it the same files" in line
    assert "fedmaestro: node " in line
    assert "Traceback" not in done.stdout + done.stderr
