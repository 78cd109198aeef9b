"""The documentation says what is true: its files load, its settings exist, its links lead somewhere."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmaestro import extend
from fedmaestro.config.base import describe
from fedmaestro.config.experiment import ExperimentConfig, load_config
from fedmaestro.config.training import TrainingConfig
from fedmaestro.runs.code import NO_CODE, activate, gather

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = {x.key for schema in (ExperimentConfig, TrainingConfig) for x in describe(schema)}
TABLES = {key.partition(".")[0] for key in SETTINGS if "." in key}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page and number, text) of every block of a language."""
    found = []
    for page in PAGES:
        texts = [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]
        found += [(f"{page.relative_to(ROOT)}:{i}", text) for i, text in enumerate(texts)]
    return found


FILES = [(where, text) for where, text in blocks("python") if text.startswith("# ") and ".py\n" in text[:40]]
SCRIPTS = [(where, text) for where, text in blocks("python") if text.startswith("import") and "fedmaestro.run(" in text]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    activate(NO_CODE)


@pytest.mark.parametrize(("where", "text"), FILES, ids=[where for where, _ in FILES])
def test_files_of_user_code_load(where: str, text: str, tmp_path: Path) -> None:
    if "torchmetrics" in text:
        pytest.importorskip("torchmetrics")
    name = text.splitlines()[0].removeprefix("# ")
    (tmp_path / name).write_text(text, encoding="utf-8")
    activate(gather(str(tmp_path / name)))
    assert extend._loaded, "it adds nothing"


def test_there_are_files_for_every_kind_of_row(tmp_path: Path) -> None:
    kinds = set()
    for i, (_, text) in enumerate(FILES):
        (tmp_path / f"file{i}.py").write_text(text, encoding="utf-8")
        activate(gather(str(tmp_path / f"file{i}.py")))
        kinds |= {kind for kind, _ in extend._loaded}
    assert kinds == set(extend.KINDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+\.[a-z][a-z-]+)(?: ?=[^`]*)?`", text)) | set(
        re.findall(r"--set ([a-z.-]+)=", text)
    )
    unknown = {name for name in named if name.partition(".")[0] in TABLES} - SETTINGS
    assert {name for name in unknown if not name.endswith((".py", ".toml", ".md", ".json", ".safetensors"))} == set()
    prose = BLOCK.sub("", text)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if "://" not in target and not target.startswith("reference/"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("where", "text"), blocks("toml"), ids=[where for where, _ in blocks("toml")])
def test_experiments_are_valid(where: str, text: str, tmp_path: Path) -> None:
    if "[tiers." in text:
        from fedmaestro.fleet.tiers import load_tiers

        (tmp_path / "fleet.toml").write_text(text, encoding="utf-8")
        assert load_tiers("", str(tmp_path / "fleet.toml"))
        return
    (tmp_path / "e.toml").write_text(text, encoding="utf-8")
    if "epochs" in text:
        return
    assert load_config(tmp_path / "e.toml")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "text"), SCRIPTS, ids=[where for where, _ in SCRIPTS])
def test_scripts_run(where: str, text: str, tmp_path: Path) -> None:
    if "experiments/" in text:
        pytest.skip("needs the data sets")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_table_of_methods_is_that_of_the_rows() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "methods.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
