"""Who may import whom, what a fresh interpreter loads, and the fixed top-level folders."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE_FOLDERS = ("fedmaestro", "strategies", "clients", "experiments", "tests")
CORE = ("lod", "fleet", "submodel.py", "data", "tasks", "models", "rounds", "runs", "config")
COMPOSITION_ROOT = ("rounds", "flower", "cli.py", "extend.py")


def run_python(code: str, *, cwd: Path = ROOT, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "FLWR_TELEMETRY_ENABLED": "0"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    """``strategies/`` and ``clients/`` are imported below ``fedmaestro``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("strategies", "clients"):
        parts.insert(0, "fedmaestro")
    return ".".join(parts)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module or module.name) for every import statement, relative ones resolved."""
    package = module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imports_of(paths: list[Path], *targets: str) -> list[str]:
    """Return ``file:line: module`` of every import of ``targets`` or something below them."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in paths
        for line, name in imported(path)
        if any(f"{name}.".startswith(f"{target}.") for target in targets)
    ]


def product(parts: Iterable[str]) -> list[Path]:
    """The files of packages and modules of ``fedmaestro/``."""
    found = [ROOT / "fedmaestro" / part for part in parts]
    return [file for path in found for file in (files(str(path.relative_to(ROOT))) if path.is_dir() else [path])]


def test_the_search_finds_imports() -> None:
    assert imports_of(product(COMPOSITION_ROOT), "fedmaestro.strategies")
    assert imports_of(product(COMPOSITION_ROOT), "fedmaestro.clients")
    assert imports_of(product(["flower"]), "flwr")
    assert imports_of(files("strategies"), "fedmaestro.strategies.base")


def test_only_the_composition_root_imports_strategies_and_clients() -> None:
    core = sorted({*files("fedmaestro")} - {*product(COMPOSITION_ROOT)})
    assert imports_of(core, "fedmaestro.strategies", "fedmaestro.clients") == []


def test_the_core_imports_neither_flower_nor_ray() -> None:
    assert imports_of(product(CORE), "flwr", "ray", "fedmaestro.flower") == []


@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_strategies_and_clients_have_one_name(folder: str) -> None:
    assert imports_of(files(folder), "strategies", "clients") == []


@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_nothing_imports_experiments_or_tests(folder: str) -> None:
    """In a checkout, both could be found below ``fedmaestro`` too: its path holds the repository."""
    targets = ["experiments", "fedmaestro.experiments", "fedmaestro.tests"]
    if folder != "tests":
        targets.append("tests")
    assert imports_of(files(folder), *targets) == []


def test_the_core_loads_neither_flower_nor_ray() -> None:
    """One process: what the last of them has not loaded, none has."""
    names = [
        module_name(path).removesuffix(".__init__")
        for path in [*product(CORE), *files("strategies"), *files("clients")]
    ]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print(sorted({'flwr', 'ray', 'flwr_datasets'} & set(sys.modules)))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "Usage"),
        (["--version"], "fedmaestro 0."),
        *((["list", kind], first) for kind, first in (("strategies", "partitioned"), ("settings", "train.rounds"))),
        (["list", "submodels"], "width-rolling"),
        (["--show-completion", "bash"], "complete"),
    ],
    ids=" ".join,
)
def test_what_only_tells_something_loads_no_heavy_library(arguments: list[str], shown: str) -> None:
    code = (
        # Whatever shell the tests were started from.
        "import os, sys\nos.environ['_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION'] = '1'\n"
        f"sys.argv = ['fedmaestro', *{arguments}]\n"
        "from fedmaestro.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'flwr', 'ray', 'matplotlib', 'datasets', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout
    assert result.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("name", ["strategies", "clients"])
def test_the_bare_name_is_refused(name: str) -> None:
    result = run_python(f"import {name}", path=str(ROOT))
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"ImportError: import fedmaestro.{name}, not {name}"


def test_top_level_folders() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    folders = {path.split("/")[0] for path in listed if "/" in path}
    visible = {folder for folder in folders if not folder.startswith(".")}
    assert visible - {"docs", "examples", "benchmarks"} == set(CODE_FOLDERS)


def test_every_package_is_listed_for_the_wheel() -> None:
    """Packages are written out in pyproject.toml: a new one must be added there."""
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        module_name(path).removesuffix(".__init__")
        for folder in ("fedmaestro", "strategies", "clients")
        for path in files(folder)
        if path.name == "__init__.py"
    }
    assert set(setuptools["packages"]) == found
