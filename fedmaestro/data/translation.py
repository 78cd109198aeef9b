"""Multi30k, pairs of a German and an English sentence, as arrays of token ids. Shapes: N pairs, S and T tokens.

German is translated into English, as in Pufferfish's and Maestro's experiments. Sentences are lower-cased and split
into words and punctuation marks by a regular expression; both languages share one vocabulary of all tokens that occur
at least three times in the training files: 9,712 entries (theirs, from another tokenizer, has 9,521).
"""

import contextlib
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmaestro.data import cache
from fedmaestro.errors import UserError
from fedmaestro.places import absolute

PAD, UNK, BOS, EOS = range(4)
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")

SPLITS = {"train": "train", "val": "val", "test": "test_2016_flickr"}
SOURCE, TARGET = "de", "en"

_FORMAT = 1  # part of the cache key: raise it when what is stored changes its meaning
_FOLDER = "multi30k"
_TOKEN = re.compile(r"\w+|[^\w\s]")
_ARRAYS = ("source", "source_lengths", "target", "target_lengths")

Sentences = list[list[str]]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TranslationSplit:
    """Pairs of sentences, each ``BOS, tokens, EOS`` and then ``PAD``; read-only memory maps of the cache."""

    source: Ids  # (N, S)
    source_lengths: Ids  # (N,), with BOS and EOS
    target: Ids  # (N, T)
    target_lengths: Ids

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, kw_only=True)
class TranslationDataset:
    """A translation task. Each split is as wide as its own longest sentence."""

    name: str
    train: TranslationSplit
    val: TranslationSplit
    test: TranslationSplit
    vocabulary: tuple[str, ...]  # by id
    max_length: int  # of a training sentence, with BOS and EOS
    fingerprint: str  # sha256 hex of vocabulary and splits

    @property
    def input_shape(self) -> tuple[int]:
        """(L,), the longest training sentence."""
        return (self.max_length,)


def load_translation(
    data_dir: str | Path,
    cache_dir: str | Path | None = None,
    *,
    max_length: int = 32,
    min_count: int = 3,
    fingerprint: str = "",
) -> TranslationDataset:
    """Return Multi30k, tokenising it on the first call and mapping the cache's copy on later ones.

    Args:
        data_dir: folder that holds ``multi30k/{train,val,test_2016_flickr}.{de,en}.gz``, one sentence per line.
        cache_dir: see `fedmaestro.data.cache.cache_root`.
        max_length: training pairs with a sentence of more tokens, BOS and EOS included, are dropped (0.3 % at 32).
            Validation and test keep every pair at its full length: cut sentences would have another perplexity.
        min_count: tokens that are rarer in the training files become UNK.
        fingerprint: of the data that another process has; without files here, the cache is searched for them.

    Raises:
        UserError: missing or corrupt files, files that are not parallel, or settings that leave no training pair.

    """
    if max_length < 3 or min_count < 1:
        raise UserError(f"max_length={max_length} must be at least 3 and min_count={min_count} at least 1")
    if fingerprint and not has_files(data_dir):
        found = cache.find(fingerprint, lambda folder: _load(folder, max_length), cache_dir)
        if found is not None:
            return found
    if not str(data_dir):
        raise UserError(f"multi30k needs local files: pass --data-dir DATA_DIR with {_expected(Path('DATA_DIR'))}")
    paths = _paths(absolute(data_dir) / _FOLDER)
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for pair in paths.values() for path in pair]
    key = cache.key(_FORMAT, stamps, max_length, min_count)

    def build(folder: Path) -> None:
        pairs = {split: _read_pair(*pair) for split, pair in paths.items()}
        vocabulary = _vocabulary(pairs["train"], min_count)
        pairs["train"] = _short(*pairs["train"], max_length - 2, paths["train"][0].parent)
        arrays = {f"{split}_{name}": a for split in SPLITS for name, a in _encode(pairs[split], vocabulary).items()}
        _store(folder, arrays, vocabulary)

    entry = cache.cache_root(cache_dir) / cache.DATA / f"{_FOLDER}-{key}"
    return cache.fetch(entry, build, lambda folder: _load(folder, max_length))


def has_files(data_dir: str | Path) -> bool:
    """Return whether the files are in ``data_dir``."""
    with contextlib.suppress(UserError):
        return bool(str(data_dir) and _paths(absolute(data_dir) / _FOLDER))
    return False


def tokenize(sentence: str) -> list[str]:
    """Return the lower-cased words and punctuation marks of a sentence."""
    return _TOKEN.findall(sentence.lower())


def _expected(folder: Path) -> str:
    return f"{folder}/{{{','.join(SPLITS.values())}}}.{{{SOURCE},{TARGET}}}.gz"


def _paths(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the files of source and target of every split."""
    paths = {split: (folder / f"{stem}.{SOURCE}.gz", folder / f"{stem}.{TARGET}.gz") for split, stem in SPLITS.items()}
    for pair in paths.values():
        for path in pair:
            if not path.is_file():
                raise UserError(f"no file {path}: multi30k is expected as {_expected(folder)}")
    return paths


def _read_pair(source: Path, target: Path) -> tuple[Sentences, Sentences]:
    first, second = _read_sentences(source), _read_sentences(target)
    if len(first) != len(second):
        raise UserError(
            f"{source} has {len(first)} lines and {target} has {len(second)}: each line must translate the other's"
        )
    if not first:
        raise UserError(f"{source} holds no sentences")
    return first, second


def _read_sentences(path: Path) -> Sentences:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} as gzip-compressed UTF-8, one sentence per line: {reason}") from error
    # Not splitlines: it also breaks at characters that a sentence may hold.
    return [tokenize(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _short(source: Sentences, target: Sentences, most: int, folder: Path) -> tuple[Sentences, Sentences]:
    kept = [(a, b) for a, b in zip(source, target, strict=True) if max(len(a), len(b)) <= most]
    if not kept:
        raise UserError(f"max_length={most + 2} leaves no training pair of {folder}: raise it")
    return [a for a, _ in kept], [b for _, b in kept]


def _vocabulary(pair: tuple[Sentences, Sentences], min_count: int) -> tuple[str, ...]:
    """Return special and then frequent tokens of both languages, the most frequent first, ties in string order."""
    counts = Counter(token for sentences in pair for sentence in sentences for token in sentence)
    frequent = sorted((-count, token) for token, count in counts.items() if count >= min_count)
    return (*SPECIAL, *(token for _, token in frequent))


def _encode(pair: tuple[Sentences, Sentences], vocabulary: Sequence[str]) -> dict[str, Ids]:
    ids = {token: i for i, token in enumerate(vocabulary)}
    encoded = [_pad([[BOS, *(ids.get(t, UNK) for t in sentence), EOS] for sentence in side]) for side in pair]
    return dict(zip(_ARRAYS, (array for side in encoded for array in side), strict=True))


def _pad(sequences: list[list[int]]) -> tuple[Ids, Ids]:
    """Return (ids (N, longest), lengths (N,))."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    padded = np.full((len(sequences), lengths.max()), PAD, np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded, lengths


def _store(folder: Path, arrays: dict[str, Ids], vocabulary: tuple[str, ...]) -> None:
    digest = hashlib.sha256(json.dumps(vocabulary).encode())
    for name, array in arrays.items():
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.data)
        np.save(folder / f"{name}.npy", array)
    meta = {"vocabulary": vocabulary, "fingerprint": digest.hexdigest()}
    (folder / cache.META).write_text(json.dumps(meta), encoding="utf-8")


def _load(folder: Path, max_length: int) -> TranslationDataset:
    meta = json.loads((folder / cache.META).read_bytes())
    splits = {
        split: TranslationSplit(**{name: np.load(folder / f"{split}_{name}.npy", mmap_mode="r") for name in _ARRAYS})
        for split in SPLITS
    }
    return TranslationDataset(
        name=_FOLDER,
        vocabulary=tuple(meta["vocabulary"]),
        max_length=max_length,
        fingerprint=meta["fingerprint"],
        **splits,
    )
