"""Multi30k from small files that the tests write, and from the real ones where they are."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedmaestro.data import TranslationDataset, load_translation
from fedmaestro.data.translation import BOS, EOS, PAD, SPECIAL, SPLITS, UNK, tokenize
from fedmaestro.errors import UserError
from fedmaestro.tasks.translation import translation_task

TRAIN = [
    ("Ein Mann geht.", "A man walks."),
    ("Ein Hund\xa0läuft, ein Hund schläft.", "A dog runs, a dog sleeps."),
    ("Der Mann\x85läuft!", "The man runs!"),
]
LINES = {"train": TRAIN, "val": [("Ein Mann schläft.", "A man sleeps.")], "test": [("Ein Elch!", "An elk!")] * 2}


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A data folder with all six files."""
    for split, stem in SPLITS.items():
        for i, language in enumerate(("de", "en")):
            write(tmp_path / "data" / "multi30k" / f"{stem}.{language}.gz", [pair[i] for pair in LINES[split]])
    return tmp_path / "data"


@pytest.fixture
def load(files: Path, tmp_path: Path) -> Callable[..., TranslationDataset]:
    def call(**settings: int) -> TranslationDataset:
        return load_translation(files, tmp_path / "cache", **({"min_count": 1} | settings))

    return call


def words(data: TranslationDataset, row: np.ndarray) -> str:
    return " ".join(data.vocabulary[i] for i in row)


def test_sentences_become_ids_and_back(load: Callable[..., TranslationDataset]) -> None:
    data = load()
    assert words(data, data.train.source[0]) == "<bos> ein mann geht . <eos> <pad> <pad> <pad> <pad>"
    assert words(data, data.train.target[1]) == "<bos> a dog runs , a dog sleeps . <eos>"
    assert words(data, data.train.source[2]) == "<bos> der mann läuft ! <eos> <pad> <pad> <pad> <pad>"
    assert words(data, data.val.target[0]) == "<bos> a man sleeps . <eos>"
    assert words(data, data.test.source[1]) == "<bos> ein <unk> ! <eos>"
    assert (len(data.train), len(data.val), len(data.test)) == (3, 1, 2)


def test_the_vocabulary_is_that_of_both_languages_by_frequency(load: Callable[..., TranslationDataset]) -> None:
    data = load()
    assert data.vocabulary[:4] == SPECIAL == ("<pad>", "<unk>", "<bos>", "<eos>")
    assert (PAD, UNK, BOS, EOS) == (0, 1, 2, 3)
    assert data.vocabulary[4:7] == (".", "a", "ein")  # four times, three times
    assert data.vocabulary[7:15] == ("!", ",", "dog", "hund", "läuft", "man", "mann", "runs")  # twice: in string order
    assert data.vocabulary[15:] == ("der", "geht", "schläft", "sleeps", "the", "walks")


def test_long_pairs_leave_the_training_set_but_not_the_others(load: Callable[..., TranslationDataset]) -> None:
    data, whole = load(max_length=6, min_count=1), load()
    assert len(data.train) == 2
    assert data.train.source.shape == (2, 6)
    assert data.vocabulary == whole.vocabulary
    assert data.input_shape == (6,)
    short = load(max_length=6)
    np.testing.assert_array_equal(short.val.source, whole.val.source)
    assert load(max_length=10).train.source.shape == (3, 10)
    assert len(load(max_length=9).train) == 2


@pytest.mark.parametrize(
    ("sentence", "tokens"),
    [
        ("Zwei T-Shirts, 3 Äpfel...", ["zwei", "t", "-", "shirts", ",", "3", "äpfel", ".", ".", "."]),
        ("  A man's dog\t", ["a", "man", "'", "s", "dog"]),
        ("", []),
    ],
)
def test_tokens_are_words_and_punctuation_marks(sentence: str, tokens: list[str]) -> None:
    assert tokenize(sentence) == tokens


# ---------------------------------------------------------------- the cache


def test_a_second_call_reads_the_cache(
    load: Callable[..., TranslationDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load()

    def fail(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("fedmaestro.data.translation.tokenize", fail)
    second = load()
    assert second.vocabulary == first.vocabulary
    assert second.fingerprint == first.fingerprint
    for name in ("source", "source_lengths", "target", "target_lengths"):
        np.testing.assert_array_equal(getattr(second.train, name), getattr(first.train, name))
    assert isinstance(second.train.source, np.memmap)
    assert not second.train.source.flags.writeable
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_changed_files_and_settings_are_other_entries(files: Path, load: Callable[..., TranslationDataset]) -> None:
    fingerprints = [load().fingerprint, load(min_count=2).fingerprint, load(max_length=6).fingerprint]
    path = files / "multi30k" / "val.de.gz"
    stat = path.stat()
    write(path, ["Ein Hund schläft."])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    fingerprints.append(load().fingerprint)
    assert len(set(fingerprints)) == 4


# ---------------------------------------------------------------- mistakes


def test_a_missing_folder_is_named_with_what_is_expected(tmp_path: Path) -> None:
    expected = (
        rf"no file {tmp_path}/multi30k/train.de.gz: .*{tmp_path}/multi30k/{{train,val,test_2016_flickr}}.{{de,en}}"
    )
    with pytest.raises(UserError, match=expected):
        load_translation(tmp_path)


def test_files_that_are_not_parallel_are_refused(files: Path, load: Callable[..., TranslationDataset]) -> None:
    write(files / "multi30k" / "val.en.gz", ["one", "two"])
    with pytest.raises(UserError, match=r"val.de.gz has 1 lines and .*val.en.gz has 2: each line must translate"):
        load()


WHOLE = gzip.compress(b"Ein Mann geht, und ein Hund geht auch.\n" * 9)
CORRUPT = {
    "no gzip": b"Ein Mann geht.\n",
    "truncated": WHOLE[:-9],
    "header only": WHOLE[:5],
    "damaged": WHOLE[:20] + bytes([WHOLE[20] ^ 0xFF]) + WHOLE[21:],
    "not UTF-8": gzip.compress("Bäume\n".encode("latin-1")),
    "empty": b"",
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_named(files: Path, load: Callable[..., TranslationDataset], content: bytes) -> None:
    path = files / "multi30k" / "train.de.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as caught:
        load()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the real files


def test_multi30k(shared_data: Path, session_cache: Path) -> None:
    if not (shared_data / "multi30k").is_dir():
        pytest.skip(f"no Multi30k in {shared_data}")
    data = load_translation(shared_data, session_cache)
    assert len(data.vocabulary) == 9712
    assert (len(data.train), len(data.val), len(data.test)) == (28_908, 1014, 1000)  # of 29,000: 0.3 % are longer
    assert data.train.source.shape == data.train.target.shape == (28_908, 32)
    assert words(data, data.train.target[0]).startswith("<bos> two young , white males are outside near many bushes .")
    for split in (data.train, data.val, data.test):
        for ids, lengths in ((split.source, split.source_lengths), (split.target, split.target_lengths)):
            unknown = (ids == UNK).sum() / (lengths - 2).sum()
            assert 0.01 < unknown < 0.06
            assert 12 < (lengths - 2).mean() < 14


def test_held_out_pairs_take_the_place_of_both_other_splits(load: Callable[..., TranslationDataset]) -> None:
    data = load()
    task = translation_task(data, train=np.array([0, 2]), held_out=np.array([1]), spares_test=True)
    assert (task.examples, task.test_examples) == (2, 1)
    [tested], [validated] = task.split("test"), task.split("validation")
    for batch in (tested, validated, task.tested(np.array([0]))):
        assert words(data, batch.inputs[0].numpy()[0]) == words(data, data.train.source[1])
    own = translation_task(data, spares_test=True)
    assert [len(next(iter(own.split(name))).targets) for name in ("test", "validation")] == [2, 1]  # type: ignore[arg-type]
