"""Ray: started here, joined at an address, or used where it runs already; and what goes wrong with each.

Ray takes some seconds to start, so that happens beside everything else. Its processes end with the thread that has
started them (``PR_SET_PDEATHSIG``): that thread therefore lives as long as Ray is needed.
"""

import contextlib
import gc
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedmaestro.errors import UserError
from fedmaestro.interrupt import signals_kept
from fedmaestro.places import writable

log = logging.getLogger("fedmaestro")

PROBE = """
import ray, sys
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(1)
"""
"""Prints what Ray has against an address, on one line."""

PROBE_SECONDS = 30
"""How long a Ray cluster may take to accept a first connection."""

CPU_SECONDS = 10
"""How long a cluster whose CPUs are all taken may take to have one free."""

SOCKET_PATH = 107
"""Longest path of a Unix socket in bytes."""

SESSION = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray puts behind its temporary folder."""

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Temporary folders for where the one in use is too long."""

REASON = 100
"""Characters of what Ray says of an error: its messages span many lines."""

USED_SECONDS = 90.0
"""How long those that wait for a lost Ray may take to find out."""

INLINE_BYTES = 16 * 2**20
"""Replies of a Ray of our own up to this size go straight to this process. Through the object store, as Ray has it for
all above 100 kB, each costs 5 ms more of two busy cores: store, raylet and both processes talk about it first."""

PATIENCE_SECONDS = 3600
"""How long Ray's C++ part looks for a server of its that is gone, before it ends this process. Whoever needs a new
actor finds that out earlier, and starts Ray anew; until then the actors that are there work on."""

LOOPBACK = "127.0.0.1"
"""Where the processes of a Ray of our own listen. Whoever reaches one may run code here: Ray knows no password."""

OURS = ".fedmaestro"
"""In the session of a Ray of our own, locked as long as the process lives that has started it."""

LEAVE_SECONDS = 20.0
"""How long the end waits for a Ray that is still starting; it then ends by itself, or with this process."""

RESTARTS = 3
"""How often a Ray of our own is started anew after it was lost."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""What a container may use: so many microseconds of CPU time in so many microseconds."""


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return cpus
    return max(1, min(cpus, quota // period))


class RayRuntime:
    """One Ray for a run.

    Args:
        actors: how many hosts it is for; None: one per CPU that it has free.
        address: of a cluster; None or "local": the one that this process is in, or else one of our own.
        setting: where the address comes from, for messages.
        gpus: of each actor.
    """

    def __init__(
        self, actors: int | None, address: str | None = None, setting: str = "--ray-address", gpus: float = 0.0
    ) -> None:
        self._wanted, self._setting, self.gpus = actors, setting, gpus
        self._address = None if address == "local" else address
        self._ready, self._over, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._using = threading.Condition()
        self._users, self._restarting = 0, False
        self._thread: threading.Thread | None = None
        self._temporary = ""
        self._session: Path | None = None
        self._held: FileLock | None = None
        self.error: UserError | None = None
        self.own = self.attached = False
        self.actors = actors or 0
        self.group: Any | None = None
        """The placement group that hosts belong to."""
        self.starts = 0
        """How often a Ray of our own was started: what it held is lost with each."""

    def open(self) -> None:
        """Join a Ray, or begin to start one; return at once then.

        Raises:
            UserError: it cannot be reached, has other versions, no free CPU, or fewer than ``actors``; this machine has
                fewer, or no temporary folder for Ray.
        """
        if joined():
            self.attached = True
        elif self._address is None:
            self.own = True
            self.actors = self._wanted or available_cpus()
            if self.actors > (cpus := available_cpus()):
                raise UserError(
                    f"--actors {self.actors}: this process has {_cpus(cpus)}, of which each actor needs one: "
                    f"use --actors {cpus} or fewer, or --actors 0 to work in this process"
                )
            if self.gpus:
                self.actors = check_gpus(self.gpus, self._wanted)
            self._temporary = str(temporary_folder() / "ray")
            self._start()
            return
        else:
            self._connect(self._address)
        try:
            self.actors = self._counted()
            if self.gpus:
                self.actors = min(self.actors, check_gpus(self.gpus, self._wanted, cluster=True))
        except UserError:
            self.close()
            raise
        self._ready.set()

    @property
    def ready(self) -> bool:
        """Whether Ray can be used."""
        return self._ready.is_set() and self.error is None

    def wait(self) -> None:
        """Wait for Ray; UserError when it cannot be started."""
        self._ready.wait()
        if self.error is not None:
            raise self.error

    @contextmanager
    def used(self) -> Iterator[None]:
        """Ask Ray for something: it is not exchanged meanwhile. A thread that asks a Ray that ends ends the process."""
        with self._using:
            while self._restarting:
                self._using.wait()
            self._users += 1
        try:
            yield
        finally:
            with self._using:
                self._users -= 1
                self._using.notify_all()

    @contextmanager
    def _unused(self) -> Iterator[bool]:
        """Keep everybody out; gives whether they are, in time."""
        with self._using:
            self._restarting = True
            out = self._using.wait_for(lambda: not self._users, USED_SECONDS)
        try:
            yield out
        finally:
            with self._using:
                self._restarting = False
                self._using.notify_all()

    def restart(self, starts: int) -> bool:
        """Start a Ray of our own anew after it was lost; return whether there is one again.

        The caller is not inside of ``used``.

        Args:
            starts: of the Ray that was lost; one that was started since then is left alone.
        """
        with self._lock:
            if not self.own or self._over.is_set():
                return False
            if self.starts == starts:
                if starts > RESTARTS:
                    return False
                log.warning("Ray was lost and is started anew")
                self._disown()
                with self._unused() as out:
                    if not out:
                        return False
                    self._end()
                    self._over.clear()
                    self._ready.clear()
                    self._start()
                    self._ready.wait()
            return self.error is None

    def give_up(self) -> None:
        """Let nobody wait any longer for a Ray that has not started."""
        if not self._ready.is_set():
            self.error = UserError("Ray has not started in time")
            self._ready.set()

    def close(self) -> None:
        """Leave a Ray that was there before as it is; end one of our own."""
        if self.own:
            self._end(None if self._session else LEAVE_SECONDS)
            # A Ray that was lost, or could not start, keeps its logs.
            if self._session is not None:
                self._disown()
                forget_session(self._session)
        elif not self.attached:
            import ray

            ray.shutdown()

    def _disown(self) -> None:
        """Let go of a session: whoever comes next leaves its logs alone."""
        if self._held is not None:
            self._held.release()
            Path(self._held.lock_file).unlink(missing_ok=True)
            self._held = None

    def _start(self) -> None:
        self.starts += 1
        self._session = None
        self._thread = threading.Thread(target=self._serve, name="ray", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            forget_left_sessions(Path(self._temporary))
            with _worker_environment(), _on_loopback():
                session = _init(
                    address="local",
                    num_cpus=self.actors,
                    include_dashboard=False,
                    _temp_dir=self._temporary,
                    _node_ip_address=LOOPBACK,
                    # Workers are niced by default, and starve on a busy machine.
                    _system_config={
                        "max_direct_call_object_size": INLINE_BYTES,
                        "worker_niceness": 0,
                        # A history of all tasks, for a dashboard that there is not: its memory grows with the rounds.
                        "task_events_report_interval_ms": 0,
                        "gcs_rpc_server_reconnect_timeout_s": PATIENCE_SECONDS,
                    },
                )
            self._held = FileLock(session / OURS, thread_local=False)
            self._held.acquire()
            self._session = session
        except BaseException as error:  # whatever it is: somebody waits
            self.error = UserError(
                f"cannot start Ray on this machine ({shortened(error)}; its logs are below {self._temporary}): give it "
                "what it lacks, or use --actors 0 to work in this process"
            )
        self._ready.set()
        self._over.wait()
        import ray

        # A handle of an actor that is collected while Ray ends, in whatever thread, ends this process.
        gc.collect()
        ray.shutdown()

    def _end(self, timeout: float | None = None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _connect(self, address: str) -> None:
        try:
            check_reachable(address)
            _init(address=address)
        except Exception as error:
            # Ray's own words, in which it compares the cluster with this process.
            if len(found := re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))) == 2:
                theirs, ours = (f"Ray {ray} and Python {python}" for ray, python in found)
                raise UserError(
                    f"the Ray cluster of {self._setting} {address!r} runs {theirs}, this process {ours}: install the "
                    "same versions on every node"
                ) from None
            raise UserError(
                f"cannot reach the Ray cluster of {self._setting} {address!r} ({shortened(error)}): start one with "
                f"`ray start --head`, or do without {self._setting} to simulate on this machine"
            ) from None

    def _counted(self) -> int:
        """Return how many hosts there will be; UserError where there cannot be as many, or none."""
        import ray

        here = ray.get_runtime_context().gcs_address
        total = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        self.group, bundles = current_group(), group_cpus()
        if self._wanted is not None and self._wanted > total:
            raise UserError(
                f"--actors {self._wanted}: the Ray cluster at {here} has {_cpus(total)}: ask for fewer, or add nodes"
            )
        if bundles is not None:
            if bundles < (wanted := self._wanted or 1):
                raise UserError(
                    f"--actors {wanted}: the placement group of this Ray task has CPUs for {bundles} actors: give it "
                    "more bundles (tune.PlacementGroupFactory), or use --actors 0 to work in this process"
                )
            return self._wanted or bundles
        deadline = time.monotonic() + CPU_SECONDS
        while (free := free_cpus()) < 1:
            if time.monotonic() > deadline:
                raise UserError(
                    f"no free CPU in the Ray cluster at {here} (it has {total}) after {CPU_SECONDS} s: wait until "
                    "others have finished, add a node, or use --actors 0 to work in this process"
                )
            time.sleep(0.2)
        return self._wanted or free


def check_gpus(each: float, actors: int | None, *, cluster: bool = False) -> int:
    """Return how many actors there is room for: ``actors``, or as many as CPUs and GPUs allow.

    Args:
        each: GPUs of one actor.
        actors: how many are wanted; None: as many as there is room for.
        cluster: whether the GPUs are those of the Ray cluster that this process has joined, or this machine's.

    Raises:
        UserError: there are not as many.
    """
    import ray
    import torch

    total = float(ray.cluster_resources().get("GPU", 0)) if cluster else float(torch.cuda.device_count())  # type: ignore[no-untyped-call]
    room = int(total / each + 1e-9)
    if room < (actors or 1):
        where = "the Ray cluster" if cluster else "this machine"
        raise UserError(
            f"--gpus-per-actor {each:g}: {where} has {total:g} GPUs that PyTorch and Ray see, room for {room} actors: "
            "lower it, or leave it out to train on the CPU"
        )
    return actors or (room if cluster else min(room, available_cpus()))


def _cpus(count: int) -> str:
    return f"{count} CPU{'s' * (count != 1)}"


def joined() -> bool:
    """Return whether this process is part of a Ray already: it has initialised one, or is a task or an actor."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


def free_cpus() -> int:
    """Return how many CPUs the Ray that this process is part of has for hosts."""
    if (bundles := group_cpus()) is not None:
        return bundles
    import ray

    # What a task has taken itself may show among the free ones for a moment.
    context = ray.get_runtime_context()
    in_task = context.worker.mode == ray.WORKER_MODE
    own = context.get_assigned_resources().get("CPU", 0) if in_task else 0  # type: ignore[no-untyped-call]
    total = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    return max(0, int(min(free, total - own)))


def current_group() -> Any | None:
    """Return the placement group of the task or actor (a Ray Tune trial) that this is; None: there is none."""
    from ray.util import get_current_placement_group

    return get_current_placement_group()


def in_group(group: Any) -> Any:
    """Return the scheduling strategy of an actor in a placement group."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group)


def group_cpus() -> int | None:
    """Return the CPUs that the placement group has besides this task's own; None: there is no group."""
    if (group := current_group()) is None:
        return None
    return int(sum(bundle.get("CPU", 0) for bundle in group.bundle_specs[1:]))


def _init(**arguments: Any) -> Path:
    """Initialise Ray; return the folder of its session."""
    import ray

    with warnings.catch_warnings(), signals_kept():
        warnings.simplefilter("ignore")
        context: Any = ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    return Path(context.address_info["session_dir"])


@contextmanager
def _worker_environment() -> Iterator[None]:
    """What the processes of a Ray of our own inherit: one thread each, and no word about GPUs that it does not use."""
    more = {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray listen on the loopback interface only.

    It does where its address is ``127.0.0.1``, but takes that for the machine's own address when it is told so.
    """
    from ray._private import services

    name = "resolve_ip_for_localhost"
    if (resolve := getattr(services, name, None)) is None:
        log.warning("this version of Ray listens on all network interfaces of this machine")
        yield
        return
    setattr(services, name, lambda host: host)
    try:
        yield
    finally:
        setattr(services, name, resolve)


def temporary_folder() -> Path:
    """Return the folder for Ray's files: the user's own, or another one where that is too long for a socket's path.

    Raises:
        UserError: it cannot be written.
    """
    asked = os.environ.get("RAY_TMPDIR")
    try:
        chosen = Path(asked or tempfile.gettempdir()).absolute()
    except OSError:
        raise UserError("no temporary folder can be written: set TMPDIR to one") from None
    if not writable(chosen):
        raise UserError(f"RAY_TMPDIR={asked}: no folder that can be written: set it to another one, or unset it")
    if len(os.fsencode(f"{chosen}{SESSION}")) <= SOCKET_PATH:
        return chosen
    for short in map(Path, SHORT_FOLDERS):
        if short.is_dir() and writable(short):
            if asked:
                log.warning("RAY_TMPDIR=%s is too long for the path of a socket: Ray uses %s", asked, short)
            return short
    name = "RAY_TMPDIR" if asked else "TMPDIR"
    most = SOCKET_PATH - len(SESSION)
    raise UserError(f"{name}={str(chosen)[:100]}… is too long for the path of a socket: set it to {most} bytes at most")


def forget_session(session: Path) -> None:
    """Remove what a Ray that has ended leaves in the temporary folder: its logs, and a link to them."""
    shutil.rmtree(session, ignore_errors=True)
    latest = session.parent / "session_latest"
    with contextlib.suppress(OSError):  # others may use the folder
        if latest.readlink() == session:
            latest.unlink()
        session.parent.rmdir()


def forget_left_sessions(folder: Path) -> None:
    """Remove the sessions of runs that were killed. A Ray that was lost or could not start keeps its logs."""
    for ours in folder.glob(f"session_*/{OURS}"):
        # Everybody can write to the folder: what looks like ours may be somebody's link to a file of ours.
        if not all(_is_own(path, kind) for path, kind in ((ours.parent, stat.S_ISDIR), (ours, stat.S_ISREG))):
            continue
        with contextlib.suppress(OSError, Timeout), FileLock(ours, timeout=0):
            shutil.rmtree(ours.parent, ignore_errors=True)


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    with contextlib.suppress(OSError):
        about = path.lstat()
        return is_kind(about.st_mode) and about.st_uid == os.getuid()
    return False


def check_reachable(address: str) -> None:
    """Raise OSError when no Ray cluster answers; Ray itself would try for minutes and not be interrupted."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()
    try:
        command = [sys.executable, "-c", PROBE, address]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {PROBE_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        said = error.stdout.strip() or error.stderr.strip() or "no reason given"
        raise OSError(said.splitlines()[-1]) from None


def shortened(error: BaseException) -> str:
    """Return what an error says, as a part of a line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= REASON else f"{said[:REASON]}…"
