"""A copy of the repository to build from, so that `build/` and `*.egg-info` never appear in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


def copy_sources(target: Path) -> None:
    """Copy what git tracks or would track; without git, all but hidden and generated files."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
    else:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "*.fab")
        shutil.copytree(ROOT, target, ignore=ignored, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def copied_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy; Flower wants a name of letters, digits and hyphens."""
    target = tmp_path_factory.mktemp("sources") / "fedmaestro-copy"
    target.mkdir()
    copy_sources(target)
    return target


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command with Flower's and pip's files in a temporary folder; `path` is PYTHONPATH."""
    home = tmp_path_factory.mktemp("home")

    def call(*command: str | Path, cwd: Path, path: Path | str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PIP_NO_INDEX": "1",
            "PIP_CACHE_DIR": str(home / "pip"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "COLUMNS": "300",
        }
        done = subprocess.run(
            [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture(scope="session")
def pip_install(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`pip install` without dependencies, network or build isolation, into another place than this environment."""

    away = tmp_path_factory.mktemp("away")

    def install(*arguments: str | Path, python: Path | None = None) -> None:
        interpreter = [] if python is None else ["--python", python]
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
        run(sys.executable, "-m", "pip", *interpreter, "install", *options, *arguments, cwd=away)

    return install
