"""The Flower App Bundle: it runs without an install, from its own folder, and holds the code only."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

LIMIT_BYTES = 10_000_000  # Flower refuses larger ones

REPORT = """
import json, sys
import fedmaestro, fedmaestro.clients, fedmaestro.strategies
import fedmaestro.flower.client_app as client
import fedmaestro.flower.server_app as server
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
assert isinstance(client.app, ClientApp)
assert isinstance(server.app, ServerApp)
from fedmaestro.report.page import render
assert "prefers-color-scheme" in render("page", title="made of files of the bundle")
modules = (fedmaestro, fedmaestro.clients, fedmaestro.strategies, client, server)
print(json.dumps({"files": [m.__file__ for m in modules], "version": fedmaestro.__version__}))
"""


def test_bundle(copied_repository: Path, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    built, unpacked = tmp_path / "built", tmp_path / "unpacked"
    built.mkdir()
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    run(flwr, "build", "--app", copied_repository, cwd=built)
    (bundle,) = (*built.glob("*.fab"), *copied_repository.glob("*.fab"))
    assert bundle.stat().st_size < LIMIT_BYTES
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)

    code = {
        str(path.relative_to(copied_repository))
        for folder in ("fedmaestro", "strategies", "clients")
        for path in (copied_repository / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == code
    templates = {path.name for path in (copied_repository / "fedmaestro/report/templates").iterdir()}
    assert {Path(name).name for name in names if "/templates/" in name} == templates
    assert {name.split("/")[0] for name in names} == {
        ".info",
        "LICENSE",
        "README.md",
        "clients",
        "fedmaestro",
        "pyproject.toml",
        "strategies",
    }

    report = json.loads(run(sys.executable, "-c", REPORT, cwd=unpacked, path=unpacked).stdout)
    assert [str(Path(file).relative_to(unpacked)) for file in report["files"]] == [
        "fedmaestro/__init__.py",
        "clients/__init__.py",
        "strategies/__init__.py",
        "fedmaestro/flower/client_app.py",
        "fedmaestro/flower/server_app.py",
    ]
