import os
import time
from pathlib import Path

import pytest

from fedmaestro.data import cache
from fedmaestro.errors import UserError


def build(folder: Path) -> None:
    (folder / "value.txt").write_text("built", encoding="utf-8")


def read(folder: Path) -> str:
    return (folder / "value.txt").read_text(encoding="utf-8")


def never(folder: Path) -> None:
    raise AssertionError("built again")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    entry = tmp_path / "deep" / "entry"
    assert cache.fetch(entry, build, read) == "built"
    assert cache.fetch(entry, never, read) == "built"
    assert names(entry.parent) == ["entry"]


def test_a_crash_in_the_middle_publishes_nothing(tmp_path: Path) -> None:
    def crash(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fetch(tmp_path / "entry", crash, read)
    assert names(tmp_path) == []
    assert cache.fetch(tmp_path / "entry", build, read) == "built"


@pytest.mark.parametrize("name", ["value.txt", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("[1]")])
def test_a_damaged_entry_is_built_again(tmp_path: Path, name: str, damage: object) -> None:
    cache.fetch(tmp_path / "entry", build, read)
    damage(tmp_path / "entry" / name)  # type: ignore[operator]
    assert cache.fetch(tmp_path / "entry", build, read) == "built"
    assert names(tmp_path) == ["entry"]


def test_the_loser_of_a_race_takes_the_winners_entry(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        (folder / "value.txt").write_text("late", encoding="utf-8")
        assert cache.fetch(tmp_path / "entry", build, read) == "built"  # another process is faster

    assert cache.fetch(tmp_path / "entry", slow, read) == "built"
    assert names(tmp_path) == ["entry"]


def test_leftovers_of_old_crashes_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    for folder in (old, young):
        folder.mkdir()
        build(folder)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    cache.fetch(tmp_path / "entry", build, read)
    assert names(tmp_path) == [".tmp-young", "entry"]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write the cache folder .*file.*FEDMAESTRO_CACHE") as caught:
        cache.fetch(tmp_path / "file" / "entry", build, read)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; set FEDMAESTRO_CACHE"):
        cache.fetch(tmp_path / "entry", full, read)


def test_the_root_follows_argument_then_variable_then_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMAESTRO_CACHE", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_root(tmp_path / "argument") == tmp_path / "argument"
    assert cache.cache_root("~/mine") == tmp_path / "home" / "mine"
    assert cache.cache_root() == tmp_path / "variable"
    monkeypatch.delenv("FEDMAESTRO_CACHE")
    assert cache.cache_root() == tmp_path / "xdg" / "fedmaestro"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "fedmaestro"
