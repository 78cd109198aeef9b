from collections.abc import Callable
from pathlib import Path

import pytest

from fedmaestro.errors import UserError
from fedmaestro.report import read_run

MakeRun = Callable[..., Path]


def test_reads_all_files(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert [row["round"] for row in run.rounds] == list(range(61))
    assert run.summary is not None
    assert run.summary["strategy"] == run.config["train"]["strategy"] == "nested"


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder.*rounds\.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_truncated_last_line_is_ignored(make_run: MakeRun, cut: int) -> None:
    folder = make_run(finished=False)
    file = folder / "rounds.jsonl"
    file.write_bytes(file.read_bytes()[:-1] + b"\n" + file.read_bytes().splitlines()[-1][:cut])
    run = read_run(folder)
    assert len(run.rounds) == 61
    assert run.summary is None


def test_a_line_cut_inside_a_character_is_ignored(make_run: MakeRun) -> None:
    folder = make_run()
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write('{"round": 61, "tiers": {"größer'.encode()[:-5])
        file.write("ö".encode()[:1])
    assert len(read_run(folder).rounds) == 61


def test_a_complete_last_line_without_line_end_counts(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "rounds.jsonl").write_text('{"round": 0}\n\n{"round": 1}', encoding="utf-8")
    assert [row["round"] for row in read_run(folder).rounds] == [0, 1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"round": 1, "ti', "not valid JSON"),
        ("[1]", "integer 'round'"),
        ('{"tiers": {}}', "integer 'round'"),
        ('{"round": 1, "tiers": {"low": 0.5}}', "'tiers' must map"),
    ],
)
def test_a_corrupt_line_is_named(make_run: MakeRun, line: str, why: str) -> None:
    folder = make_run()
    (folder / "rounds.jsonl").write_text(f'{{"round": 0}}\n{line}\n{{"round": 2}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=why) as caught:
        read_run(folder)
    assert f"{folder / 'rounds.jsonl'}, line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("summary.json", "{"), ("summary.json", "[]"), ("config.toml", "a = = 1")])
def test_a_corrupt_file_is_named(make_run: MakeRun, name: str, text: str) -> None:
    folder = make_run()
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=name) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_empty(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "config.toml").unlink()
    assert read_run(folder).config == {}
