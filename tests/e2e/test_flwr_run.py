"""The same job through Flower's own command: `flwr run` gives the model that `fedmaestro run` gives.

In simulation and in deployment (TLS, authenticated SuperNodes), after an interruption, and when a SuperNode is lost.
Each test has a Flower home, by which everything that Flower starts is found and ended.
"""

import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from heads import head_node
from processes import end

import fedmaestro
from fedmaestro.config.experiment import load_config
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.records import RoundRecord
from fedmaestro.runs.starter import write_starter

ROOT = Path(__file__).parents[2]

SMALL = {"train.rounds": 2, "train.devices-per-round": 6, "train.cohort-size": 3, "data.devices": 10}
"""Few messages: each starts a process in a deployment, and each phase of a round waits for a poll of 3 s."""

PEM = serialization.Encoding.PEM
OPENSSH = serialization.Encoding.OpenSSH
PLAIN = serialization.NoEncryption()


class Flower:
    """Flower's commands with a home of their own.

    Args:
        folder: for the home and the logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "flwr"
        self.home.mkdir()
        self._started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_ADDRESS": "local",
        }

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a server; its output goes to ``NAME.log``."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        self._started.append(process)
        return process

    def run(self, *arguments: str, config: str, done: Callable[[], object] = lambda: None) -> str:
        """Run the app of this repository and return what was printed.

        Args:
            arguments: more of `flwr run`.
            config: a file or settings.
            done: called again and again while it runs.
        """
        command = ["flwr", "run", str(ROOT), *arguments, "--run-config", config, "--stream"]
        # Flower gives its SuperLink 15 seconds to start, which a busy machine can exceed; it is there the next time.
        for _ in range(3):
            # Into a file, not a pipe: the SuperLink that stays behind inherits it and would keep a pipe open.
            process = self.start("run", *command)
            deadline = time.monotonic() + 400
            while process.poll() is None:
                assert time.monotonic() < deadline, self.log("run")
                done()
                time.sleep(0.1)
            if "Failed to start local SuperLink" not in self.log("run"):
                break
        return self.log("run")

    def log(self, name: str) -> str:
        """Return what a command has printed so far, without colours."""
        return re.sub(r"\x1b\[\d+m", "", (self.folder / f"{name}.log").read_text())

    def end(self) -> None:
        """End everything that belongs to this home."""
        end("FLWR_HOME", str(self.home))
        for process in self._started:
            process.wait(10)


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    flower = Flower(tmp_path)
    yield flower
    flower.end()


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """Flower with the local SuperLink that `flwr run` starts and leaves running: one for all tests."""
    flower = Flower(tmp_path_factory.mktemp("simulation"))
    yield flower
    flower.end()


FEDERATION = ("--federation-config", "num-supernodes=2 client-resources-num-cpus=1")

EXPERIMENT = """
seed = 3
out = "{out}"
use = "{code}"

[data]
name = "waves"
partition = "natural"
metrics = "worst-class accuracy"

[model]
name = "gru"

[fleet]
preset = "phones"

[train]
strategy = "mine"
rounds = 2
devices-per-round = 6
cohort-size = 2
evaluate-every = 1
"""


def run_config(settings: Mapping[str, Any]) -> str:
    """Return settings as `--run-config` takes them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def summary_of(folder: Path, log: str) -> dict[str, Any]:
    assert (folder / "summary.json").exists(), log
    assert (folder / "report.html").exists(), "made from the templates in the bundle"
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["failed"] == 0, log
    return summary


def test_own_code_gives_the_same_model(simulation: Flower, tmp_path: Path, federate: Callable[..., Any]) -> None:
    out = tmp_path / "through-flower"
    experiment = tmp_path / "experiment.toml"
    write_starter(tmp_path / "my_paper.py")  # with a dataset, a model, an objective, an aggregation and a metric
    experiment.write_text(EXPERIMENT.format(out=out, code=tmp_path / "my_paper.py"))
    log = simulation.run(*FEDERATION, config=str(experiment))
    through_flower = summary_of(out, log)
    here, _, _ = federate({key: x for key, x in load_config(experiment).flat().items() if key != "out"})
    assert through_flower["model_sha256"] == here["model_sha256"]
    assert {n: t["final_worst-class"] for n, t in through_flower["tiers"].items()} == {
        n: t["final_worst-class"] for n, t in here["tiers"].items()
    }
    assert re.search(r"round 2: flagship \d", log)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "wrong value": ({"train.lr": -1.0}, "setting train.lr = -1.0 in Flower's run config: "),
    "unknown strategy": ({"train.strategy": "nestd"}, "unknown train.strategy 'nestd'"),
    "unknown dataset": ({"data.name": "mnits"}, "unknown data.name 'mnits': did you mean 'mnist'?"),
    "nothing to resume": ({"resume": True}, "setting resume = true in Flower's run config needs the folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(simulation: Flower, mistake: str) -> None:
    settings, said = MISTAKES[mistake]
    log = simulation.run(*FEDERATION, config=run_config(settings))
    assert f"fedmaestro: {said}" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_foreign_ray_is_left_alone(simulation: Flower, tmp_path: Path, federate: Callable[..., Any]) -> None:
    with head_node() as address:
        log = simulation.run(*FEDERATION, config=run_config(SMALL | {"out": str(tmp_path / "run")}))
        asking = "import ray, sys; ray.init(address=sys.argv[1]); print('jobs', len(ray._private.state.jobs()))"
        command = [sys.executable, "-c", asking, address]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "jobs 1\n" in asked.stdout, "another one than the one that asks"
    assert summary_of(tmp_path / "run", log)["model_sha256"] == federate(SMALL)[0]["model_sha256"]


class Stopping(Observer):
    """Presses Ctrl-C after round 2."""

    def on_round(self, record: RoundRecord) -> None:
        if record.round == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_resume_gives_the_model_of_an_uninterrupted_run(
    simulation: Flower, tmp_path: Path, federate: Callable[..., Any]
) -> None:
    settings = SMALL | {"train.rounds": 5}
    out = tmp_path / "run"
    stopped = fedmaestro.run(overrides=settings, out=out, actors=0, observers=[Stopping()])
    assert stopped.summary["interrupted"]
    log = simulation.run(*FEDERATION, config=run_config({"out": str(out), "resume": True, "train.rounds": 4}))
    assert "train.rounds=5, not 4: resume with the same settings" in log
    log = simulation.run(*FEDERATION, config=run_config({"out": str(out), "resume": True}))
    resumed = summary_of(out, log)
    whole, _, _ = federate(settings)
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert resumed["rounds"] == 5


# Deployment


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> str:
    path.write_bytes(key.private_bytes(PEM, form, PLAIN))
    path.chmod(0o600)
    return str(path)


def write_certificates(folder: Path) -> tuple[str, str, str]:
    """Write a CA, and a certificate of 127.0.0.1 that it has signed; return the CA's file, the server's and its key."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, issuer: str, key: Any, by: Any, *more: tuple[x509.ExtensionType, bool]) -> str:
        builder = x509.CertificateBuilder(
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(hours=1),
            not_valid_after=now + datetime.timedelta(days=1),
        )
        for extension, critical in more:
            builder = builder.add_extension(extension, critical)
        path = folder / f"{name}.crt"
        path.write_bytes(builder.sign(by, hashes.SHA256()).public_bytes(PEM))
        return str(path)

    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    own = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    basic = x509.BasicConstraints(ca=True, path_length=None)
    ca = certificate("ca", "ca", authority, authority, (basic, True), (signs, True), (own, False))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    crt = certificate("server", "ca", server, authority, (names, False), (by, False))
    return ca, crt, write_key(folder / "server.key", server, serialization.PrivateFormat.PKCS8)


class Deployment:
    """A SuperLink with TLS, and SuperNodes.

    Args:
        flower: the home.
        authenticated: whether SuperNodes must be registered.
    """

    def __init__(self, flower: Flower, *, authenticated: bool) -> None:
        self.flower, self.authenticated = flower, authenticated
        self.ca, certificate, key = write_certificates(flower.folder)
        self.address = f"127.0.0.1:{free_port()}"
        host, _, port = self.address.partition(":")
        tls = ["--ssl-ca-certfile", self.ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
        more = ["--enable-supernode-auth"] if authenticated else []
        command = ["flower-superlink", *tls, *more, "--host", host, "--port", port]
        self.superlink = flower.start("superlink", *command, "--disable-runtime-dependency-installation")
        (flower.home / "config.toml").write_text(
            f'[superlink]\ndefault = "dep"\n[superlink.dep]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.ca}"\n'
        )
        self.wait_for("superlink", "Uvicorn running|startup complete")

    def wait_for(self, name: str, pattern: str) -> None:
        deadline = time.monotonic() + 60
        while not re.search(pattern, self.flower.log(name)):
            assert time.monotonic() < deadline, self.flower.log(name)
            time.sleep(0.1)

    def supernode(self, number: int, of: int, *, registered: bool = True) -> subprocess.Popen[bytes]:
        """Start a SuperNode, with a key of its own where there is authentication."""
        name = f"supernode{number}{'' if registered else '-unregistered'}"
        more = []
        if self.authenticated:
            key = ec.generate_private_key(ec.SECP384R1())
            path = self.flower.folder / f"{name}.key"
            more = ["--auth-supernode-private-key", write_key(path, key, serialization.PrivateFormat.OpenSSH)]
            public = path.with_suffix(".pub")
            public.write_bytes(key.public_key().public_bytes(OPENSSH, serialization.PublicFormat.OpenSSH))
            if registered:
                assert (
                    self.flower.start(f"{name}-register", "flwr", "supernode", "register", str(public), "dep").wait(60)
                    == 0
                )
        config = f"partition-id={number} num-partitions={of}"
        command = ["flower-supernode", "--superlink", self.address, "--root-certificates", self.ca, *more]
        return self.flower.start(name, *command, "--port", str(free_port()), "--node-config", config)


@pytest.mark.slow
def test_deployment_with_tls_and_authenticated_supernodes_gives_the_same_model(
    flower: Flower, tmp_path: Path, federate: Callable[..., Any]
) -> None:
    deployment = Deployment(flower, authenticated=True)
    stranger = deployment.supernode(0, 2, registered=False)
    for number in range(2):
        deployment.supernode(number, 2)
    log = flower.run("dep", config=run_config(SMALL | {"out": str(tmp_path / "run")}))
    here, _, _ = federate(SMALL)
    assert summary_of(tmp_path / "run", log)["model_sha256"] == here["model_sha256"], log
    assert stranger.wait(30) != 0, "it was let in"


@pytest.mark.slow
def test_a_lost_supernode_changes_nothing(flower: Flower, tmp_path: Path, federate: Callable[..., Any]) -> None:
    settings = SMALL | {"train.cohort-size": 2}
    deployment = Deployment(flower, authenticated=False)
    first, _ = (deployment.supernode(number, 2) for number in range(2))
    rounds = tmp_path / "run" / "rounds.jsonl"

    def kill() -> None:
        if rounds.exists() and rounds.read_text() and first.poll() is None:
            first.kill()

    log = flower.run("dep", config=run_config(settings | {"out": str(tmp_path / "run")}), done=kill)
    here, _, _ = federate(settings)
    assert "its message goes to host" in log, "no SuperNode was lost: the test shows nothing"
    assert summary_of(tmp_path / "run", log)["model_sha256"] == here["model_sha256"], log


# Another Flower

LACKING = """
import sys
import fedmaestro
from fedmaestro.flower import identity

def take_identity(node):
    from flwr.supercore.task_identity import TaskIdentityOfThatName  # what another version of Flower might not have

if __name__ == "__main__":
    identity.take_identity = take_identity
    run = fedmaestro.run(overrides={"train.rounds": 2, "train.evaluate-every": 2}, out=sys.argv[1], actors=2)
    print("hash", run.summary["model_sha256"], "failed", run.summary["failed"])
"""


@pytest.mark.slow
def test_a_flower_that_lacks_what_our_grid_needs_runs_by_its_own_engine(
    tmp_path: Path, federate: Callable[..., Any]
) -> None:
    (tmp_path / "lacking.py").write_text(LACKING)
    command = [sys.executable, str(tmp_path / "lacking.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    here, _, _ = federate({"train.rounds": 2, "train.evaluate-every": 2})
    assert f"hash {here['model_sha256']} failed 0" in done.stdout
    said = [line for line in done.stderr.splitlines() if "runs hosts by its own engine" in line]
    assert len(said) == 1, done.stderr
    assert "TaskIdentityOfThatName" in said[0]
