"""Tables, parquet files and folders of images, named in an experiment without any code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedmaestro import extend
from fedmaestro.config.experiment import load_config
from fedmaestro.data.files import image_folder, parse_columns
from fedmaestro.data.own import convert
from fedmaestro.errors import UserError

Federate = Callable[..., Any]
RNG = np.random.default_rng(0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    x, user = RNG.normal(size=(400, 3)), RNG.integers(8, size=400)
    label = np.where(x[:, 0] + x[:, 1] > 0, "up", "down")
    frame = pd.DataFrame({"a": 1000 * x[:, 0], "b": x[:, 1], "noise": x[:, 2], "user": user, "label": label})
    frame.to_csv(tmp_path / "trips.csv", index=False)
    frame.to_parquet(tmp_path / "trips.parquet")
    return tmp_path


EXPERIMENT = """
[data]
name = "{kind}"
file = "{file}"
columns = "target=label groups=user"
partition = "natural"
[fleet]
preset = "phones"
[train]
rounds = 25
devices-per-round = 8
"""


def test_a_table_with_users_is_learnt_from(federate: Federate, table: Path) -> None:
    (table / "e.toml").write_text(EXPERIMENT.format(kind="csv", file="trips.csv"))
    settings = load_config(table / "e.toml").flat()
    assert settings["data.file"] == str(table / "trips.csv"), "relative to the experiment's file"
    summary, folder, _ = federate({key: x for key, x in settings.items() if x != "default"})
    assert summary["failed"] == 0
    assert sum(tier["devices"] for tier in summary["tiers"].values()) == 8
    finals = [tier["final_accuracy"] for tier in summary["tiers"].values()]
    assert min(finals) > 0.7, f"chance is 0.5: {finals}"
    assert all(row["devices"] == 2 for row in folder.read_rounds()[-1].device_test.values())


def test_csv_and_parquet_are_the_same_data(table: Path) -> None:
    columns = {"target": "label", "groups": "user", "inputs": ["a", "b"]}
    one = convert("d", extend.csv(table / "trips.csv", **columns))
    two = convert("d", extend.parquet(table / "trips.parquet", standardize=True, **columns))
    assert (one.classes, one.outputs, one.train.inputs[0].shape[1]) == (("down", "up"), 2, 2)
    np.testing.assert_allclose(one.train.inputs[0], two.train.inputs[0], rtol=1e-6)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        for kind, base in (("cat", 20), ("dog", 200)):
            folder = tmp_path / "pets" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = RNG.integers(base, base + 50, size=(8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "pets"


def test_a_folder_of_images(pictures: Path) -> None:
    found = convert("pets", image_folder(pictures))
    assert (found.classes, found.train.inputs[0].shape, found.test.inputs[0].shape) == (
        ("cat", "dog"),
        (12, 1, 8, 8),
        (4, 1, 8, 8),
    )
    shared = convert("pets", image_folder(pictures / "train", test_share=0.5))
    assert len(shared.test.targets) == 6
    Image.new("RGB", (8, 8)).save(pictures / "train" / "cat" / "colour.png")
    assert convert("pets", image_folder(pictures)).train.inputs[0].shape == (13, 3, 8, 8)
    Image.new("RGB", (9, 8)).save(pictures / "train" / "dog" / "wide.png")
    with pytest.raises(UserError, match=r"wide\.png: image of shape \(3, 8, 9\), others have \(3, 8, 8\)"):
        image_folder(pictures)


def test_a_local_folder_in_the_hubs_layout(table: Path) -> None:
    (table / "set").mkdir()
    whole = pd.read_parquet(table / "trips.parquet")
    for split, rows in (("train", whole), ("test", whole[:50])):
        rows.to_parquet(table / "set" / f"{split}-00000-of-00001.parquet")
    found = convert("d", extend.hub(str(table / "set"), target="label", groups="user"))
    assert (len(found.train.targets), len(found.test.targets)) == (400, 50)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.name": "csv"}, r"data\.name='csv' needs data\.file"),
        ({"data.name": "csv", "data.file": "nothing.csv"}, r"nothing\.csv does not exist"),
        ({"data.name": "csv", "data.file": "a b c"}, r"one file, or the training and the test examples"),
        ({"data.name": "image-folder", "data.file": "{}"}, r"has no folder for each class .* it holds trips\.csv"),
        ({"data.name": "csv", "data.file": "{}/trips.csv", "data.columns": "label"}, r"write KEY=VALUE"),
        ({"data.name": "csv", "data.file": "{}/trips.csv", "data.columns": "goal=x"}, r"unknown key in data\.columns"),
        ({"data.name": "csv", "data.file": "{}/trips.csv", "data.columns": "target=x"}, r"unknown column .* 'x'"),
        ({"data.file": "{}/trips.csv"}, r"dataset 'digits' reads no files"),
        ({"data.name": "csv", "data.file": "{}/trips.csv", "data.columns": "standardize=1"}, r"true or false"),
    ],
)
def test_what_is_wrong_is_said(settings: dict[str, str], said: str, table: Path, federate: Federate) -> None:
    with pytest.raises(UserError, match=said):
        federate({key: value.format(table) for key, value in settings.items()})


def test_columns_are_parsed() -> None:
    text = "target=y inputs=a,b groups=g standardize=false classes=4 test_share=0.3"
    assert parse_columns(text) == {
        "target": "y",
        "inputs": ["a", "b"],
        "groups": "g",
        "standardize": False,
        "classes": 4,
        "test_share": 0.3,
    }
