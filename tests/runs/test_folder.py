"""The run folder: one line per round, writes that a crash cannot tear, and the figures of the summary."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.errors import UserError
from fedmaestro.runs.folder import RoundRecord, RunFolder, summarize, tier_accuracies, write_atomically

SCORES = st.fixed_dictionaries({"accuracy": st.floats(0, 1), "loss": st.floats(0, 100)})
COUNTS = st.integers(0, 10**12)
RECORDS = st.lists(
    st.builds(
        RoundRecord,
        round=st.integers(0, 10**6),
        tiers=st.dictionaries(st.text(), SCORES, max_size=3),
        train_loss=st.none() | st.floats(allow_nan=False),
        devices=COUNTS,
        failed=COUNTS,
        dropped=COUNTS,
        download_bytes=COUNTS,
        upload_bytes=COUNTS,
        virtual_seconds=st.floats(0, 1e9),
        wall_seconds=st.floats(0, 1e9),
    ),
    max_size=4,
)


def record(number: int, **changes: object) -> RoundRecord:
    return RoundRecord(round=number, **{"tiers": {}, **changes})  # type: ignore[arg-type]


def fill(folder: RunFolder, count: int) -> list[RoundRecord]:
    records = [record(i, tiers={"low": {"accuracy": i / 10, "loss": 1.0}}, devices=i) for i in range(count)]
    for one in records:
        folder.append(one)
    return records


# rounds.jsonl


@given(records=RECORDS)
def test_appended_rounds_are_read_back(tmp_path_factory: pytest.TempPathFactory, records: list[RoundRecord]) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for one in records:
        folder.append(one)
    assert folder.read_rounds() == records
    assert not records or folder.rounds.read_bytes().count(b"\n") == len(records)


def test_line_has_the_documented_keys() -> None:
    line = record(3, tiers={"low": {"accuracy": 0.5, "loss": 1.0}}, train_loss=2.0).line()
    assert line.endswith("}\n")
    assert list(json.loads(line)) == [field.name for field in dataclasses.fields(RoundRecord)]
    documented = "round tiers train_loss devices failed download_bytes upload_bytes virtual_seconds wall_seconds"
    assert set(documented.split()) <= json.loads(line).keys()


def test_no_file_is_no_rounds(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "run").read_rounds() == []
    assert not (tmp_path / "run").exists()


def test_every_cut_of_the_last_line_is_ignored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = fill(folder, 3)
    whole = folder.rounds.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) - 1):
        folder.rounds.write_bytes(whole[:end])
        assert folder.read_rounds() == records[:2]
    folder.rounds.write_bytes(whole[:-1])
    assert folder.read_rounds() == records


@pytest.mark.parametrize("junk", ["{", "null", "[]", "5", '{"round": 1}', '{"unknown": 1}', ""])
def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path, junk: str) -> None:
    folder = RunFolder(tmp_path)
    fill(folder, 3)
    lines = folder.rounds.read_text(encoding="utf-8").splitlines()
    folder.rounds.write_text("\n".join([lines[0], junk, lines[2]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rounds\.jsonl, line 2 is not a round record"):
        folder.read_rounds()


@pytest.mark.parametrize("last", [-1, 0, 2, 4, 9])
def test_keep_rounds_drops_later_ones(tmp_path: Path, last: int) -> None:
    folder = RunFolder(tmp_path)
    records = fill(folder, 5)
    assert folder.keep_rounds(last) == folder.read_rounds() == [r for r in records if r.round <= last]
    folder.append(record(99))
    assert folder.read_rounds()[-1] == record(99)


def test_keep_rounds_removes_what_a_crash_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = fill(folder, 3)
    with folder.rounds.open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "ti')
    assert folder.keep_rounds(3) == records
    folder.append(record(3))
    assert folder.read_rounds() == [*records, record(3)]


# Atomic writes


def test_write_atomically_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new and longer")
    assert path.read_text(encoding="utf-8") == "old"
    write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "x", []
    sync, replace = os.fsync, os.replace

    def tell_sync(descriptor: int) -> None:
        order.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def tell_replace(*arguments: object, **options: object) -> None:
        order.append(("replace", 0))
        replace(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", tell_sync)
    monkeypatch.setattr(os, "replace", tell_replace)
    write_atomically(path, "12345")
    assert order[:2] == [("fsync", 5), ("replace", 0)]


# The folder


@pytest.fixture
def mode_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere: let `os.access` obey the owner's mode bits for root too."""
    if os.geteuid() != 0:
        return

    def access(path: str | Path, wanted: int) -> bool:
        mode = stat.S_IMODE(Path(path).stat().st_mode) >> 6
        return mode & wanted == wanted

    monkeypatch.setattr(os, "access", access)


def test_a_new_folder_is_usable_and_not_created(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b").check_usable()
    RunFolder(tmp_path).check_usable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "a/b/c"])
@pytest.mark.usefixtures("mode_bits_count")
def test_a_folder_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(UserError, match=rf"{closed / below}: {closed} is not a writable folder"):
        RunFolder(closed / below).check_usable()


def test_a_folder_that_cannot_be_entered(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match="cannot write to the run folder"):
            RunFolder(closed / "a" / "b").check_usable()
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_folder_under_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=rf"cannot write to the run folder .*: {file} is not a writable folder"):
        RunFolder(file / below).check_usable()
    assert file.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["config.toml", "rounds.jsonl", "checkpoint"])
def test_traces_of_a_run(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.holds_run()
    folder.path.mkdir()
    (folder.path / "notes.txt").touch()
    assert not folder.holds_run()
    (folder.path / name).touch()
    assert folder.holds_run()


def test_files_have_the_documented_names(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    files = (folder.config, folder.rounds, folder.summary, folder.plots, folder.checkpoint)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "config.toml",
        "rounds.jsonl",
        "summary.json",
        "plots",
        "checkpoint",
    ]


# summary.json


def scored(number: int, big: float, small: float | None, **changes: object) -> RoundRecord:
    scores = {"big": big} | ({} if small is None else {"small": small})
    return record(number, tiers={name: {"accuracy": a, "loss": 1.0} for name, a in scores.items()}, **changes)


def test_summary_figures() -> None:
    records = [
        scored(0, 0.1, 0.1, wall_seconds=0.5),
        record(1, download_bytes=10, upload_bytes=3, failed=2, wall_seconds=1.0004, virtual_seconds=7.5),
        scored(2, 0.9, 0.5, download_bytes=20, upload_bytes=4, failed=1, wall_seconds=2, virtual_seconds=2.25),
        scored(3, 0.8, 0.4, wall_seconds=3),
    ]
    static = {"big": {"ranks": {"fc": 8}, "params": 100}, "small": {"ranks": {"fc": 1}, "params": 10}}
    summary = summarize(records, static, {"strategy": "nested", "seed": 4}, "abc")
    assert summary == {
        "strategy": "nested",
        "seed": 4,
        "tiers": {
            "big": {"ranks": {"fc": 8}, "params": 100, "final_accuracy": 0.8, "final_round": 3, "best_accuracy": 0.9},
            "small": {"ranks": {"fc": 1}, "params": 10, "final_accuracy": 0.4, "final_round": 3, "best_accuracy": 0.5},
        },
        "mean_tier_accuracy": pytest.approx(0.6),
        "worst_tier_accuracy": 0.4,
        "rounds": 3,
        "download_bytes": 30,
        "upload_bytes": 7,
        "failed": 3,
        "wall_seconds": 6.5,
        "virtual_seconds": 9.75,
        "model_sha256": "abc",
    }
    assert list(summary["tiers"]) == ["big", "small"]
    json.dumps(summary, allow_nan=False)


def test_summary_of_a_tier_that_was_not_evaluated() -> None:
    summary = summarize([scored(0, 0.3, None), scored(1, 0.5, None)], {"big": {}, "small": {}}, {}, "")
    assert summary["tiers"]["small"] == {"final_accuracy": None, "final_round": None, "best_accuracy": None}
    assert summary["mean_tier_accuracy"] == summary["worst_tier_accuracy"] == 0.5


def test_summary_before_the_first_round() -> None:
    summary = summarize([], {"big": {"params": 1}}, {}, "")
    assert summary["tiers"] == {
        "big": {"params": 1, "final_accuracy": None, "final_round": None, "best_accuracy": None}
    }
    assert summary["rounds"] == 0
    assert summary["mean_tier_accuracy"] is summary["worst_tier_accuracy"] is None


def test_accuracies_of_evaluated_rounds_only() -> None:
    records = [scored(0, 0.1, None), record(1), scored(2, 0.3, 0.2)]
    assert tier_accuracies(records, "big") == {0: 0.1, 2: 0.3}
    assert tier_accuracies(records, "small") == {2: 0.2}
    assert tier_accuracies(records, "none") == {}
