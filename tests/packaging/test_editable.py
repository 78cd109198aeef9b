"""An editable install: modules come from the checkout, whatever the working directory."""

import json
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

REPORT = """
import json
import fedmaestro, fedmaestro.clients, fedmaestro.fleet.plan, fedmaestro.strategies
from fedmaestro.strategies.coverage_mean import COVERAGE_MEAN
modules = (fedmaestro, fedmaestro.fleet.plan, fedmaestro.strategies, fedmaestro.clients)
print(json.dumps([m.__file__ for m in modules]))
"""


def test_editable_install(
    copied_repository: Path,
    pip_install: Callable[..., None],
    run: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """The environment sees the dependencies (not the editable install) of the one that runs the tests."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip_install("--editable", copied_repository, python=python)

    files = json.loads(run(python, "-c", REPORT, cwd=elsewhere).stdout)
    assert [str(Path(file).relative_to(copied_repository)) for file in files] == [
        "fedmaestro/__init__.py",
        "fedmaestro/fleet/plan.py",
        "strategies/__init__.py",
        "clients/__init__.py",
    ]
    assert "five-tiers" in run(environment / "bin" / "fedmaestro", "list", "fleets", cwd=elsewhere).stdout
