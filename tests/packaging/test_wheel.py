"""The wheel: every module, the two folders under their one name, and nothing else at the top level."""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

REPORT = """
import importlib.util, json
import fedmaestro, fedmaestro.strategies, fedmaestro.clients
print(json.dumps({
    "version": fedmaestro.__version__,
    "files": [m.__file__ for m in (fedmaestro, fedmaestro.strategies, fedmaestro.clients)],
    "path": list(fedmaestro.__path__),
    "strategies": list(fedmaestro.strategies.STRATEGIES),
    "bare": [n for n in ("strategies", "clients", "experiments", "tests") if importlib.util.find_spec(n)],
}))
"""


@pytest.fixture(scope="module")
def installed(
    copied_repository: Path, pip_install: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder into which the wheel was installed."""
    target = tmp_path_factory.mktemp("installed") / "site"
    pip_install("--target", target, copied_repository)
    return target


def version_of(repository: Path) -> str:
    project: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def test_import_names(installed: Path, copied_repository: Path, run: Run, tmp_path: Path) -> None:
    report = json.loads(run(sys.executable, "-c", REPORT, cwd=tmp_path, path=installed).stdout)
    assert [str(Path(file).relative_to(installed)) for file in report["files"]] == [
        "fedmaestro/__init__.py",
        "fedmaestro/strategies/__init__.py",
        "fedmaestro/clients/__init__.py",
    ]
    assert report["path"] == [str(installed / "fedmaestro")]
    assert report["bare"] == []
    assert "nested" in report["strategies"]
    assert report["version"] == version_of(copied_repository)


def test_files(installed: Path, copied_repository: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.suffix != ".pyc"}
    expected = {
        str(Path("" if folder == "fedmaestro" else "fedmaestro") / path.relative_to(copied_repository))
        for folder in ("fedmaestro", "strategies", "clients")
        for path in (copied_repository / folder).rglob("*.py")
    }
    assert len(expected) > 40
    assert {name for name in files if name.endswith(".py")} == expected
    assert "fedmaestro/py.typed" in files
    templates = {path.name for path in (copied_repository / "fedmaestro/report/templates").iterdir()}
    assert {"page.html.md", "style.css.md", "page.js.md"} <= templates
    assert {Path(name).name for name in files if "/templates/" in name} == templates
    metadata = f"fedmaestro-{version_of(copied_repository)}.dist-info"
    assert {name.split("/")[0] for name in files} == {"fedmaestro", metadata, "bin"}
    assert f"{metadata}/licenses/LICENSE" in files


@pytest.mark.parametrize("content", ["[project]\nname = 'other'\nversion = '9.9'\n", "[tool.other]\n"])
def test_a_foreign_pyproject_beside_the_package(
    installed: Path, copied_repository: Path, run: Run, tmp_path: Path, content: str
) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "pyproject.toml").write_text(content, encoding="utf-8")
    code = "import fedmaestro; print(fedmaestro.__version__, len(fedmaestro.__path__))"
    found = run(sys.executable, "-c", code, cwd=tmp_path, path=site).stdout.split()
    assert found == [version_of(copied_repository), "1"]
