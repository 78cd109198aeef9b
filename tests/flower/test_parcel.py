"""What a machine without the data is sent, as far as that needs no second machine: a cache of its own stands for it."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmaestro import extend
from fedmaestro.config.experiment import load_config
from fedmaestro.data import cache
from fedmaestro.errors import UserError
from fedmaestro.flower.client_app import DESCRIBE, message
from fedmaestro.flower.identity import SERVER_NODE, take_identity
from fedmaestro.flower.parcel import Parcel, lacking, pack, unpack
from fedmaestro.rounds.environment import Environment, environment_of, forget, open_environment
from fedmaestro.runs import code as code_module
from fedmaestro.runs.code import cached
from fedmaestro.runs.start import code_of
from fedmaestro.tasks.opening import open_data

SENTENCES = {"de": "ein hund\nein hund bellt\n", "en": "a dog\na dog barks\n"}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes this process one of a machine with an empty cache and without data."""

    def move() -> None:
        forget()
        monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
        monkeypatch.setenv("FEDMAESTRO_DATA_DIR", str(tmp_path / "nowhere"))

    return move


@pytest.fixture(autouse=True)
def _messages_need_a_sender() -> None:
    take_identity(SERVER_NODE)


def opened(overrides: dict[str, Any]) -> Environment:
    config = load_config(None, {"data.devices": 10, "data.partition": "iid", "train.devices-per-round": 2, **overrides})
    return open_environment(config, code=code_of(config))


def table_of(tmp_path: Path) -> Path:
    rows = [f"{i % 7},{i * 0.5},{'ab'[i % 2]}" for i in range(60)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["x,y,label", *rows]))
    return path


def test_a_table_is_sent_to_where_its_file_is_not(tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    path = table_of(tmp_path)
    env = opened({"data.name": "csv", "data.file": str(path), "data.columns": "target=label"})
    hello = message(DESCRIBE, 2, env)
    assert lacking(hello) == []
    parcel = pack(env.task.fingerprint)
    path.unlink()
    elsewhere()
    assert lacking(hello) == [env.task.fingerprint]
    with pytest.raises(UserError, match="does not exist"):
        environment_of(env.about["experiment"], data_fingerprint=env.task.fingerprint)
    assert parcel is not None
    unpack(parcel)
    unpack(parcel)
    assert lacking(hello) == []
    assert environment_of(env.about["experiment"], data_fingerprint=env.task.fingerprint).fingerprint == env.fingerprint


def test_sentences_are_found_by_their_content(tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    (tmp_path / "data" / "multi30k").mkdir(parents=True)
    for split in ("train", "val", "test_2016_flickr"):
        for language, text in SENTENCES.items():
            (tmp_path / "data" / "multi30k" / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    task = open_data("multi30k", str(tmp_path / "data"), min_count=1)
    parcel = pack(task.fingerprint)
    elsewhere()
    assert parcel is not None
    unpack(parcel)
    assert open_data("multi30k", "", min_count=1, data_fingerprint=task.fingerprint).fingerprint == task.fingerprint
    with pytest.raises(UserError, match="needs local files"):
        open_data("multi30k", "", min_count=1, data_fingerprint="another")


def test_objects_too_large_for_messages_are_sent(
    elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_module, "SHIPPED_BYTES", 100)
    rng = np.random.default_rng(0)
    env = opened(extend.given({"dataset": {"x": rng.normal(size=(40, 3)), "y": np.arange(40) % 2}}))
    hello = message(DESCRIBE, 2, env)
    code = str(hello.content.config_records["job"][code_module.LARGE])
    assert code.startswith(env.code.fingerprint)
    parcels = [pack(env.task.fingerprint), pack(code)]
    elsewhere()
    assert lacking(hello) == [env.task.fingerprint, code]
    for parcel in parcels:
        assert parcel is not None
        unpack(parcel)
    assert lacking(hello) == []
    assert cached(code).is_dir()


def test_a_cache_that_machines_share_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table_of(tmp_path)
    env = opened({"data.name": "csv", "data.file": str(path), "data.columns": "target=label"})
    path.unlink()
    assert lacking(message(DESCRIBE, 2, env)) == []


def test_the_embedded_digits_are_everywhere(elsewhere: Callable[[], None]) -> None:
    env = opened({})
    elsewhere()
    assert lacking(message(DESCRIBE, 2, env)) == []


def test_a_parcel_that_was_damaged_on_its_way_is_refused(tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    env = opened({})
    parcel = pack(env.task.fingerprint)
    elsewhere()
    assert parcel is not None
    damaged = {name: file.copy() for name, file in parcel.files.items()}
    damaged["train_images.npy"][-1] ^= 1
    with pytest.raises(UserError, match=r"train_images\.npy of the cache entry .* was damaged"):
        unpack(Parcel(place=parcel.place, files=damaged))
    assert cache.find(env.task.fingerprint, lambda entry: entry) is None


def test_nothing_is_found_of_what_nobody_has() -> None:
    assert pack("0" * 64) is None
