"""Names become files, keys, pages and lines: whatever they are, nothing is written anywhere else, and none is lost."""

import json
from pathlib import Path

import pytest

import fedmaestro
from fedmaestro.deploy.extract import Target
from fedmaestro.flower.compare import parse_variant
from fedmaestro.places import file_name

NAMES = (
    *("a", "a/fc1", "../../../../x", "/abs", "..", ".", "a.b", "a=b", "a%2Fb", "C:\\x", "CON"),
    *("[/red]", "<script>alert(1)</script>", '"', "'", "&amp;", "${HOME}", "`x`", "a|b", "ü 漢", "--out", "x" * 60),
)


def fleet_of(names: tuple[str, ...], folder: Path) -> Path:
    tables = [
        f"[tiers.{json.dumps(name)}]\nshare = {1 / len(names)!r}\nrank-fraction = {1 - i / 32}\n"
        for i, name in enumerate(names)
    ]
    file = folder / "fleet.toml"
    file.write_text("\n".join(tables), encoding="utf-8")
    return file


def everything(folder: Path) -> set[Path]:
    return {*folder.rglob("*")}


@pytest.mark.parametrize("strategy", [pytest.param("nested", marks=pytest.mark.slow), "exclusive"])
def test_any_name_of_a_tier(tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "a" / "b" / "c" / "d" / "e"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    overrides = {
        "fleet.file": str(fleet_of(NAMES, work)),
        "train.strategy": strategy,
        "train.rounds": 2,
        "train.evaluate-every": 2,
        "train.devices-per-round": 40,
        "data.devices": 44,
        "model.name": "mlp",
    }
    run = fedmaestro.run(overrides=overrides, out=work / "run", actors=0)
    assert [*run.summary["tiers"]] == [*NAMES]
    assert all(tier["updates"]["trained"] for tier in run.summary["tiers"].values())
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    outside = everything(tmp_path) - everything(work)
    chosen = NAMES[:6]
    for name in chosen:
        extracted = fedmaestro.extract(run.path, Target(tier=name))
        assert extracted.path.parent == run.path / "extracted"
        assert fedmaestro.load_model(run.path, name) is not None
    assert len({*(run.path / "extracted").iterdir()}) == len(chosen)
    assert everything(tmp_path) - everything(work) == outside
    again = fedmaestro.run(out=run.path, resume=True, actors=0)
    assert again.summary["model_sha256"] == run.summary["model_sha256"]


def test_names_of_files_are_different_and_safe() -> None:
    names = [*NAMES, "", " ", "x" * 400, "a\x00", "a\nb", "A", "a-b", "a b", "\udcff"]
    files = [file_name(name) for name in names]
    assert len({*files}) == len(names)
    for name in files:
        assert Path(name).name == name
        assert name not in ("", ".", "..")
        assert len(name.encode()) < 150
        assert name.isascii()
    assert file_name("nested+train.lr=0.1") == "nested+train.lr=0.1"


@pytest.mark.parametrize("label", ["../../x", "/abs", "..", "a/b", "<b>", "[/red]"])
def test_any_label_of_a_comparison(tmp_path: Path, label: str) -> None:
    folder = parse_variant(f"{label}:nested").folder_name
    assert Path(folder).name == folder
    assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
