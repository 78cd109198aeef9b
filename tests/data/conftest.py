"""Fixtures of the data tests: the real parquet folder where there is one, and a cache for the run."""

from pathlib import Path

import pytest

from fedmaestro.data import ImageDataset, load_dataset

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED_DATA / "mnist").is_dir():
        pytest.skip(f"no real data in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def digits(session_cache: Path) -> ImageDataset:
    return load_dataset("digits", cache_dir=session_cache)
