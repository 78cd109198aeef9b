"""The one reader: whole records come back, what a crash cut is left out, everything else that is wrong is named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmaestro.errors import UserError
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.reader import read_json, read_lines, read_run
from fedmaestro.runs.records import RoundRecord, Summary

SCORES = st.fixed_dictionaries({"accuracy": st.none() | st.floats(0, 1), "loss": st.none() | st.floats(0, 100)})
COUNTS = st.integers(0, 10**12)
RECORDS = st.lists(
    st.builds(
        RoundRecord,
        round=st.integers(0, 10**6),
        tiers=st.dictionaries(st.text(), SCORES, max_size=3),
        train_loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        devices=COUNTS,
        download_bytes=COUNTS,
        virtual_seconds=st.floats(0, 1e9),
    ),
    max_size=4,
)


@given(records=RECORDS)
def test_appended_rounds_are_read_back(tmp_path_factory: pytest.TempPathFactory, records: list[RoundRecord]) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for record in records:
        folder.append(record)
    assert folder.read_rounds() == records
    assert not records or folder.rounds.read_bytes().count(b"\n") == len(records)


def test_a_line_has_the_documented_keys(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(RoundRecord(round=3, tiers={"low": {"accuracy": 0.5, "loss": 1.0}}))
    documented = "round tiers train_loss devices failed download_bytes upload_bytes virtual_seconds wall_seconds"
    assert set(documented.split()) <= json.loads(folder.rounds.read_text(encoding="utf-8")).keys()


def both_readers(folder: Path) -> list[RoundRecord]:
    """A run that goes on and a report about it see the same rounds."""
    rounds = RunFolder(folder).read_rounds()
    assert tuple(rounds) == read_run(folder).rounds
    return rounds


def test_every_cut_of_the_last_line_is_left_out_by_everybody(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = [RoundRecord(round=n, tiers={"größer": {"accuracy": n / 10}}) for n in range(3)]
    for record in records:
        folder.append(record)
    whole = folder.rounds.read_bytes().replace(b"\\u00f6", "ö".encode())
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) - 1):
        folder.rounds.write_bytes(whole[:end])
        assert both_readers(tmp_path) == records[:2]
    folder.rounds.write_bytes(whole[:-1])
    assert both_readers(tmp_path) == records, "all there but for the line feed"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"round": 1, "ti', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"tiers": {}}', "round is wrong: field required"),
        ('{"round": 1, "tiers": {"low": 0.5}}', r"tiers\.low is wrong"),
        ('{"round": "1"}', "round is wrong"),
        ('{"round": 1, "train_loss": NaN}', "train_loss is wrong"),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "at the end"])
def test_a_whole_line_that_is_no_record_is_named_by_everybody(tmp_path: Path, line: str, why: str, last: bool) -> None:
    """Also the last one: what a crash cuts short has no line feed."""
    rest = "" if last else '{"round": 2}\n'
    (tmp_path / "rounds.jsonl").write_text(f'{{"round": 0}}\n{line}\n{rest}', encoding="utf-8")
    for read in (RunFolder(tmp_path).read_rounds, lambda: read_run(tmp_path)):
        with pytest.raises(UserError, match=why) as error:
            read()
        assert f"{tmp_path / 'rounds.jsonl'}, line 2" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "rounds.jsonl", RoundRecord) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": 2}', "format 2 is not one"),
        ("{}", "wrong"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=why) as error:
        read_json(path, Summary)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*summary\.json: No such file"):
        read_json(path, Summary)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere' does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a run folder.*rounds\.jsonl"):
        read_run(tmp_path)


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n', encoding="utf-8")
    run = read_run(tmp_path)
    assert (run.summary, run.config, run.finished) == (None, {}, False)
    (tmp_path / "config.toml").write_text("a = = 1", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.toml: not valid TOML"):
        read_run(tmp_path)
