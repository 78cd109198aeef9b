"""What a machine lacks and what a user gets wrong about Ray: it works all the same, or one line says what to do.

Every command is a real one. What it may use is taken away by namespaces of Linux, which need no privileges; where these
cannot be had, the test is skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from heads import head_node
from processes import end, wait_for_end

import fedmaestro
from fedmaestro import places
from fedmaestro.errors import UserError
from fedmaestro.flower import ray_runtime
from fedmaestro.flower.client_app import app
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.records import RoundRecord

SMALL = {"train.rounds": 2, "train.evaluate-every": 2}
MARK = "FEDMAESTRO_TEST"
LONG = "x" * 60

AS_ROOT = ("unshare", "--user", "--map-root-user", "--mount")
ALONE = (*AS_ROOT, "--pid", "--fork", "--mount-proc")
UNKNOWN = ("unshare", "--user", "--map-user=54321", "--map-group=54321")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Machine:
    """Runs commands in a working folder and with a temporary folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.work, self.temporary, self.mark = folder / "work", folder / "tmp", uuid.uuid4().hex
        self.work.mkdir()
        self.temporary.mkdir()

    def run(self, *arguments: str, before: Sequence[str] = (), **changes: str | None) -> Done:
        """Run a small experiment.

        Args:
            arguments: more of ``fedmaestro run``.
            before: what the command is a part of, ``unshare`` with its options for example.
            changes: to the environment; None: not set.
        """
        environment = {**os.environ, "TMPDIR": str(self.temporary), MARK: self.mark}
        environment |= {name: value for name, value in changes.items() if value is not None}
        for name in (name for name, value in changes.items() if value is None):
            environment.pop(name, None)
        settings = [f"--set={key}={value}" for key, value in SMALL.items()]
        command = [*before, sys.executable, "-m", "fedmaestro.cli", "run", *settings, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.work, capture_output=True, text=True, timeout=90, check=False
        )
        assert wait_for_end(MARK, self.mark, 20) == []
        return Done(done.returncode, done.stdout, done.stderr)

    def refuses(self, said: Sequence[str], *arguments: str, before: Sequence[str] = (), **changes: str | None) -> None:
        """Check that one line says what is wrong, that the command fails, and that nothing is left."""
        done = self.run(*arguments, before=before, **changes)
        assert done.code == 2, done
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("fedmaestro: ")
        assert len(lines[0]) <= 300
        assert [part for part in said if part not in lines[0]] == []
        assert done.out == ""
        # PyTorch makes a folder for compiled code when it is first asked about it.
        left = [*self.work.iterdir(), *self.temporary.iterdir()]
        assert [path for path in left if not path.name.startswith("torchinductor_")] == []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    end(MARK, machine.mark)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets: pytest's is not."""
    folder = Path(tempfile.mkdtemp(prefix="fm", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def unshared(kind: Sequence[str], *setup: str) -> list[str]:
    """Return what to put before a command; skip the test where that is not possible."""
    before = [*kind, "sh", "-ec", "\n".join([*setup, 'exec "$@"']), "sh"]
    try:
        tried = subprocess.run([*before, "true"], capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        pytest.skip(f"no unshare: {error}")
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")
    return before


@pytest.fixture
def same(federate: Callable[..., Any]) -> str:
    """The hash of the small experiment."""
    sha256: str = federate(SMALL)[0]["model_sha256"]
    return sha256


# One line


def test_more_actors_than_cpus(machine: Machine) -> None:
    cpus = ray_runtime.available_cpus()
    machine.refuses([f"--actors {cpus + 1}", f"use --actors {cpus}", "--actors 0"], "--actors", str(cpus + 1))


def test_a_container_has_the_cpus_of_its_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(ray_runtime, "CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for text, cpus in (("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 64)):
        quota.write_text(f"{text}\n")
        assert ray_runtime.available_cpus() == cpus


def test_an_address_that_is_none(machine: Machine) -> None:
    machine.refuses(["RAY_ADDRESS 'foo'", "`ray start --head`"], RAY_ADDRESS="foo")


def test_automatic_address_without_a_cluster(machine: Machine) -> None:
    alone = unshared(ALONE)  # or another test's Ray is found
    machine.refuses(["RAY_ADDRESS 'auto'", "`ray start --head`"], before=alone, RAY_ADDRESS="auto")


def test_a_temporary_folder_that_is_none(machine: Machine) -> None:
    (machine.work.parent / "file").touch()
    chosen = str(machine.work.parent / "file")
    machine.refuses([f"RAY_TMPDIR={chosen}", "unset it"], RAY_TMPDIR=chosen)


def test_a_working_folder_that_is_read_only(machine: Machine) -> None:
    read_only = unshared(AS_ROOT, f"mount --bind -o ro '{machine.work}' '{machine.work}'", f"cd '{machine.work}'")
    machine.refuses([str(machine.work), "not a writable folder", "choose another"], before=read_only)


# It works


@pytest.mark.slow
def test_no_home_and_a_path_too_long_for_sockets(machine: Machine, same: str) -> None:
    long = machine.temporary / LONG / LONG
    long.mkdir(parents=True)
    out = str(machine.work / "run")
    done = machine.run("--out", out, "--actors", "1", HOME=None, RAY_TMPDIR=str(long), FEDMAESTRO_CACHE=None)
    assert (done.code, done.err) == (0, ""), done
    assert same in done.out
    assert "is too long for the path of a socket" in " ".join(done.out.split())
    assert list(long.iterdir()) == []


def test_the_shorter_folder(short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    assert ray_runtime.temporary_folder() == short_folder
    long = short_folder / LONG / LONG
    long.mkdir(parents=True)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setattr(ray_runtime, "SHORT_FOLDERS", ("/nowhere", str(short_folder)))
    assert ray_runtime.temporary_folder() == short_folder
    monkeypatch.setattr(ray_runtime, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(UserError, match=rf"RAY_TMPDIR={short_folder}.* too long .* \d\d bytes at most") as raised:
        ray_runtime.temporary_folder()
    assert len(str(raised.value)) < 280


def test_an_unknown_user_without_a_home(machine: Machine, short_folder: Path, same: str) -> None:
    """As in a container that is started with a user's number."""
    unknown = unshared(UNKNOWN)
    out = str(machine.work / "run")
    changes: dict[str, str | None] = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "FEDMAESTRO_CACHE"))
    done = machine.run("--out", out, "--actors", "1", before=unknown, **changes | {"TMPDIR": str(short_folder)})
    assert (done.code, done.err) == (0, ""), done
    assert same in done.out
    assert list(short_folder.glob("fedmaestro-54321/fedmaestro/partitions/*"))
    assert not (short_folder / "ray").exists()


def test_caches_have_a_place(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = short_folder / "home"
    for name in places.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    places.place_caches()
    assert not places.CACHES.keys() & os.environ.keys(), "there is a home"
    (home / "cache" / "fedmaestro").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    monkeypatch.setattr(places, "writable", lambda _: False)
    places.place_caches()
    assert "FEDMAESTRO_CACHE" not in os.environ, "what is there can be read"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    places.place_caches()
    assert os.environ["MPLCONFIGDIR"] == "mine"
    assert os.environ["HF_HOME"] == str(short_folder / f"fedmaestro-{os.getuid()}" / "huggingface")
    monkeypatch.delenv("HF_HOME")


@pytest.mark.slow
def test_little_shared_memory(machine: Machine, same: str) -> None:
    little = unshared(AS_ROOT, "mount -t tmpfs -o size=8m tmpfs /dev/shm")
    done = machine.run("--out", str(machine.work / "run"), "--actors", "1", before=little)
    assert (done.code, done.err) == (0, ""), done
    assert same in done.out


def test_where_ray_cannot_be_started_this_process_goes_on(
    tmp_path: Path, same: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_: object) -> Path:
        raise RuntimeError("no room\nfor a raylet")

    monkeypatch.setattr(ray_runtime, "_init", init)
    run = fedmaestro.run(overrides=SMALL, out=tmp_path / "run", actors=1)
    assert run.summary["model_sha256"] == same
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "this process does all the work: cannot start Ray on this machine (no room for a raylet" in said[0]
    assert len(said[0]) <= 300

    # An app of one's own is not called in this process, which it may end.
    def own(message: Message, context: Context) -> Message:
        return app(message, context)

    with pytest.raises(UserError, match="cannot start Ray on this machine"):
        fedmaestro.run(overrides=SMALL, out=tmp_path / "own", actors=1, client_app=own)  # type: ignore[arg-type]
    assert not (tmp_path / "own").exists()


# A run that is refused after it has begun


class Refusing(Observer):
    def __init__(self, last: int) -> None:
        self.last = last

    def on_round(self, record: RoundRecord) -> None:
        if record.round == self.last:
            raise UserError("a host runs another version")


def test_a_run_that_is_refused_before_its_first_round_leaves_nothing(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").touch()
    for out in (tmp_path / "new" / "run", there):
        with pytest.raises(UserError, match="another version"):
            fedmaestro.run(overrides=SMALL, out=out, actors=0, observers=[Refusing(0)])
    assert not (tmp_path / "new").exists()
    assert list(there.iterdir()) == [there / "notes.txt"]
    with pytest.raises(UserError, match="another version"):
        fedmaestro.run(overrides=SMALL, out=there, actors=0, observers=[Refusing(1)])
    assert fedmaestro.run(out=there, actors=0, resume=True).rounds[-1].round == 2


def test_a_comparison_that_is_refused_before_its_first_round_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ray-address 'foo'"):
        fedmaestro.compare(None, ["nested"], 1, overrides=SMALL, out=tmp_path / "run", ray_address="foo")
    assert list(tmp_path.iterdir()) == []


# Clusters of other versions

OLDER = """
import fedmaestro

fedmaestro.__version__ = "0.0.1"
"""


def test_a_cluster_of_another_version_of_ray(machine: Machine) -> None:
    with head_node("2.0.0") as address:
        said = [f"--ray-address {address!r} runs Ray 2.0.0 and Python 3", "this process Ray", "the same versions"]
        machine.refuses(said, "--ray-address", address)


@pytest.mark.slow
def test_a_cluster_with_fewer_cpus_and_another_version_of_fedmaestro(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OLDER)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with head_node(PYTHONPATH=paths) as address:
        machine.refuses(["--actors 2", "has 1 CPU:"], "--actors", "2", RAY_ADDRESS=address)
        machine.refuses(["host 0 runs FedMaestro 0.0.1", "install the same version"], RAY_ADDRESS=address)
