"""Code in run folders is this user's or is not run; nothing that is read is a pickle, or leaves its folder."""

import base64
import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command, entry_point
from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedmaestro
from fedmaestro.data import cache
from fedmaestro.deploy.extract import Target
from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import DESCRIBE, app
from fedmaestro.flower.direct_grid import HostCall
from fedmaestro.flower.identity import identify
from fedmaestro.flower.parcel import Parcel, unpack
from fedmaestro.runs.checkpoint import load_checkpoint
from fedmaestro.runs.code import Code, activate, gather, received, shipped
from fedmaestro.runs.trust import is_trusted, sign, trusting

SMALL: dict[str, Any] = {"data.devices": 8, "train.devices-per-round": 4, "train.rounds": 1, "train.strategy": "nested"}

ROWS = """
from pathlib import Path
from torch import nn
from fedmaestro import extend

Path({canary!r}).touch()

@extend.model("mine")
class Mine(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.fc = nn.Linear(64, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.fc(x.flatten(1)).relu())
"""


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Any:
    yield
    activate(Code())


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def foreign(tmp_path: Path, canary: Path) -> Path:
    """A run with code that somebody else has made: signed by another key."""
    file = tmp_path / "mine.py"
    file.write_text(ROWS.format(canary=str(canary)))
    folder = tmp_path / "run"
    fedmaestro.run(overrides=SMALL | {"model.name": "mine", "train.rounds": 2}, use=file, out=folder, actors=0)
    (folder / "code" / "signature").write_text("0" * 64)
    file.unlink()
    activate(Code())
    canary.unlink()
    return folder


USES: dict[str, Callable[..., object]] = {
    "load_model": lambda folder, trust: fedmaestro.load_model(folder, "low", trust=trust),
    "extract": lambda folder, trust: fedmaestro.extract(folder, Target(tier="low"), trust=trust),
    "resume": lambda folder, trust: fedmaestro.run(out=folder, resume=True, actors=0, trust=trust),
}


@pytest.mark.parametrize("use", USES)
def test_foreign_code_is_run_only_where_the_user_says_so(foreign: Path, canary: Path, use: str) -> None:
    with pytest.raises(UserError, match=r"holds code that your runs on this machine have not written: .* --trust"):
        USES[use](foreign, trust=False)
    assert not canary.exists()
    USES[use](foreign, trust=True)
    assert canary.exists()


@pytest.mark.parametrize("how", ["changed", "unsigned", "taken from another folder"])
def test_changed_code_is_foreign(foreign: Path, canary: Path, how: str) -> None:
    manifest, signature = foreign / "code" / "code.json", foreign / "code" / "signature"
    signature.write_text(sign(manifest.read_bytes()))
    fedmaestro.load_model(foreign, "low")
    activate(Code())
    canary.unlink()
    if how == "changed":
        manifest.write_text(manifest.read_text().replace("Linear(64, 16)", "Linear(64, 17)"))
    elif how == "unsigned":
        signature.unlink()
    else:
        signature.write_text(sign(b"something else of this user's"))
    with pytest.raises(UserError, match="--trust"):
        fedmaestro.load_model(foreign, "low")
    assert not canary.exists()


def test_an_experiment_in_a_foreign_folder_is_not_run_either(foreign: Path, canary: Path, tmp_path: Path) -> None:
    (foreign / "mine.py").write_text(ROWS.format(canary=str(canary)))
    config = foreign / "config.toml"
    text = config.read_text()
    config.write_text("\n".join('use = "mine.py"' if x.startswith("use =") else x for x in text.splitlines()))
    with pytest.raises(UserError, match="--trust"):
        fedmaestro.run(config, overrides=SMALL, out=tmp_path / "new", actors=0)
    # The folder's own code is gone: then nothing can be compared with it.
    shutil.rmtree(foreign / "code")
    with pytest.raises(UserError, match=r"--trust|other code"):
        fedmaestro.run(config, out=foreign, resume=True, actors=0)
    with pytest.raises(UserError, match="--trust"):
        fedmaestro.run(config, overrides=SMALL, out=tmp_path / "new", actors=0)
    assert not canary.exists()


def test_the_command_line_asks_for_trust(
    foreign: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command: Command = entry_point(tmp_path, monkeypatch, capsys)
    refused = command("extract", str(foreign), "--tier", "low")
    assert refused.code == 2
    assert "--trust" in refused.err
    assert not canary.exists()
    assert command("extract", str(foreign), "--tier", "low", "--trust").code == 0


def test_trust_ends_with_the_call() -> None:
    assert not is_trusted(b"x", "")
    with trusting(True):
        assert is_trusted(b"x", "")
        with trusting(False):
            assert is_trusted(b"x", ""), "within, it stays"
    assert not is_trusted(b"x", "")
    assert is_trusted(b"x", sign(b"x"))
    assert not is_trusted(b"x", "é" * 64)


def test_the_key_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    first = sign(b"x")
    key = tmp_path / "config" / "fedmaestro" / "signing.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key.parent.iterdir()] == [key.name]
    assert sign(b"x") == first
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert sign(b"x") != first
    # No folder for a key: this process still knows its own.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert is_trusted(b"x", sign(b"x"))


def pickles(path: Path) -> list[str]:
    """What of a file Python would unpickle, also where it stands in JSON."""
    content = path.read_bytes()
    parts = (content, *(base64.b64decode(x) for x in strings(content)))
    return [str(path) for part in parts if part[:1] == b"\x80" and part[-1:] == b"."]


def strings(content: bytes) -> list[str]:
    def texts(node: Any) -> list[str]:
        if isinstance(node, dict | list):
            return [x for value in (node.values() if isinstance(node, dict) else node) for x in texts(value)]
        return [node] if isinstance(node, str) and len(node) % 4 == 0 and node[:2] == "gA" else []

    try:
        return texts(json.loads(content))
    except ValueError:
        return []


def test_no_artefact_is_a_pickle(tmp_path: Path) -> None:
    from torch import nn

    class Own(nn.Module):
        def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(64, 16), nn.Linear(16, num_classes)

        def forward(self, x: Any) -> Any:
            return self.head(self.fc(x.flatten(1)).relu())

    run = fedmaestro.run(overrides=SMALL, model=Own, out=tmp_path / "run", actors=0)
    fedmaestro.extract(run.path, Target(tier="low"))
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert run.path / "code" / "code.json" in files
    assert [x for path in files for x in pickles(path)] == []
    # The search finds them.
    (tmp_path / "p").write_bytes(pickle.dumps([1]))
    (tmp_path / "j").write_text(json.dumps({"x": [base64.b64encode(pickle.dumps([1, 2])).decode()]}))
    assert pickles(tmp_path / "p")
    assert pickles(tmp_path / "j")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint/round-000001.safetensors", "code/code.json"])
def test_a_crafted_file_is_not_unpickled(foreign: Path, canary: Path, name: str) -> None:
    exploded = canary.with_name("exploded")
    bomb = pickle.dumps(Bomb(exploded))
    if name == "code/code.json":
        form = json.loads((foreign / name).read_text())
        form["objects"], form["object_digests"] = base64.b64encode(bomb).decode(), {"model mine": "0"}
        (foreign / name).write_text(json.dumps(form))
    else:
        signed = (foreign / "code" / "code.json").read_bytes()
        (foreign / "code" / "signature").write_text(sign(signed))
        (foreign / name).write_bytes(bomb)
        (foreign / "checkpoint" / "older.json").unlink(missing_ok=True)
    for use in USES.values():
        with contextlib.suppress(UserError):
            use(foreign, trust=False)
    assert not exploded.exists()


def test_a_crafted_message_is_not_unpickled(canary: Path, tmp_path: Path) -> None:
    """Flower's SuperNode calls the app with whatever its SuperLink sends."""
    (tmp_path / "x.py").write_text("from fedmaestro import extend\nextend.schedule('s')(lambda r, n: 1.0)\n")
    plain = gather(str(tmp_path / "x.py"))
    crafted = Code(objects=pickle.dumps([Bomb(canary)]), object_digests={"model x": "0"})
    experiment = fedmaestro.config.experiment.load_config(None, SMALL)  # type: ignore[attr-defined]
    for code, accepted in ((plain, True), (crafted, False)):
        job = {"experiment": experiment.model_dump_json(by_alias=True), "data": "", "fingerprint": "", **shipped(code)}
        message = Message(RecordDict({"job": ConfigRecord(job)}), dst_node_id=1, message_type=DESCRIBE, group_id="1")
        identify(message)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        if accepted:
            assert app(message, context).has_content()
        else:
            with pytest.raises(UserError, match="objects of scripts and notebooks go to the hosts of this process"):
                app(message, context)
    assert not canary.exists()
    # A host of our own opens what this process has pickled.
    reply = HostCall(app, 0, 1)(message)
    assert reply.has_error()
    assert canary.exists()


@pytest.mark.parametrize("when", ["before it is stored", "afterwards"])
def test_objects_in_a_cache_that_others_write_to_are_not_believed(
    canary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, when: str
) -> None:
    from fedmaestro.runs import code as module

    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHIPPED_BYTES", 10)
    good = Code(objects=pickle.dumps([]), object_digests={"model x": "0"})
    bad = Code(objects=pickle.dumps([Bomb(canary)]), object_digests={"model x": "0"})
    assert bad.fingerprint == good.fingerprint, "so a fingerprint says nothing of the bytes"
    name = str(shipped(good)[module.LARGE])
    names = [good.fingerprint, name]
    for entry in map(module.cached, names):
        shutil.rmtree(entry, ignore_errors=True)
    if when == "afterwards":
        shipped(good)
    for entry in map(module.cached, names):
        shutil.rmtree(entry, ignore_errors=True)
        cache.fetch(entry, lambda folder: (folder / "code.json").write_bytes(bad.to_bytes()) and None, lambda _: True)
    job = shipped(good) if when != "afterwards" else {module.LARGE: name}
    module._from_cache.cache_clear()
    with module.objects_welcome():
        if when == "afterwards":
            with pytest.raises(UserError, match="this host lacks the experiment's objects"):
                received(dict(job))
        else:
            assert received(dict(job)).objects == good.objects, "what was planted is replaced"
    assert not canary.exists()


def test_what_is_shown_is_what_runs(foreign: Path, canary: Path) -> None:
    """Somebody who reads ``code/*.py`` before they trust it reads what is in ``code.json``."""
    (foreign / "code" / "mine.py").write_text("# harmless\n")
    with pytest.raises(UserError, match=r"is not what .* holds, which is what would run"):
        fedmaestro.load_model(foreign, "low", trust=True)
    assert not canary.exists()


def test_a_signature_is_for_the_code_that_is_signed(foreign: Path, canary: Path, tmp_path: Path) -> None:
    """A folder of this user's that comes back with another ``use``."""
    code = foreign / "code"
    (code / "signature").write_text(sign((code / "code.json").read_bytes()))
    (foreign / "evil.py").write_text(ROWS.format(canary=str(canary)).replace("(64, 16)", "(64, 18)"))
    config = foreign / "config.toml"
    lines = ['use = "evil.py"' if x.startswith("use =") else x for x in config.read_text().splitlines()]
    config.write_text("\n".join(lines))
    for more in ({"out": tmp_path / "new"}, {"out": foreign, "resume": True}):
        with pytest.raises(UserError, match=r"--trust|other code"):
            fedmaestro.run(config, actors=0, **more)
    assert not canary.exists()


@pytest.mark.parametrize("module", ["../../x", "/tmp/x", "a/b", "a..b", ""])
def test_code_of_a_run_folder_stays_in_it(foreign: Path, module: str, tmp_path: Path) -> None:
    path = foreign / "code" / "code.json"
    form = json.loads(path.read_text())
    form["sources"][0]["module"] = module
    path.write_text(json.dumps(form))
    before = {x for x in tmp_path.rglob("*") if "code" not in x.parts}
    with pytest.raises(UserError, match="cannot be read"):
        fedmaestro.extract(foreign, Target(tier="low"), trust=True)
    assert {x for x in tmp_path.rglob("*") if "code" not in x.parts} == before


@pytest.mark.parametrize("place", ["../../x", "/x", "a/../../x"])
def test_a_parcel_stays_in_the_cache(place: str) -> None:
    with pytest.raises(UserError, match="does not belong into the cache"):
        unpack(Parcel(place=place, files={}))


def test_a_checkpoint_names_its_own_file_only(foreign: Path) -> None:
    folder = foreign / "checkpoint"
    (foreign / "secret").write_bytes((folder / "round-000002.safetensors").read_bytes())
    for pointer in folder.glob("*.json"):
        form = json.loads(pointer.read_text())
        del form["seal"]
        pointer.write_text(json.dumps(form | {"file": f"..{os.sep}secret"}))
    with pytest.raises(UserError, match=r"it names '\.\./secret'"):
        load_checkpoint(folder)
