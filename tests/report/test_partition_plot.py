import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedmaestro.report import plot_partition

TIERS = ["flagship", "high", "low"]


def _counts(devices: int, classes: int = 10) -> npt.NDArray[np.int64]:
    shares = np.random.default_rng(0).dirichlet([0.3] * devices, size=classes).T
    return (shares * 6000).astype(np.int64)


def _texts(svg: Path) -> list[str]:
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(("devices", "classes"), [(1, 1), (10, 100), (100, 10), (1000, 10)])
def test_axes_are_labelled(tmp_path: Path, devices: int, classes: int) -> None:
    png, svg = plot_partition(_counts(devices, classes), tmp_path / "partition", title="mnist <0.3>")
    texts = _texts(svg)
    assert {"Device id", "Class", "mnist <0.3>", "examples (white: none)"} <= set(texts)
    assert "Examples" in " ".join(texts)
    assert "Tier" not in texts
    assert png.stat().st_size > 5000
    assert svg.stat().st_size < 200_000, "a thousand devices are an image, not ten thousand paths"


def test_no_examples_at_all(tmp_path: Path) -> None:
    _, svg = plot_partition(np.zeros((5, 3), dtype=np.int64), tmp_path / "partition")
    assert "Class" in _texts(svg)


def test_tiers_in_the_order_of_first_appearance(tmp_path: Path) -> None:
    tiers = [TIERS[index // 20] for index in range(60)]
    _, svg = plot_partition(_counts(60), tmp_path / "partition", tiers)
    texts = _texts(svg)
    assert [text for text in texts if "×" in text] == ["20 × flagship", "20 × high", "20 × low"]
    assert "Device id" in texts


def test_alternating_tiers_are_grouped_and_the_axis_says_so(tmp_path: Path) -> None:
    tiers = [TIERS[-1 - index % 3] for index in range(90)]
    counts = _counts(90)
    _, mixed = plot_partition(counts, tmp_path / "mixed", tiers, tier_order=TIERS)
    texts = _texts(mixed)
    assert [text for text in texts if "×" in text] == ["30 × flagship", "30 × high", "30 × low"]
    assert any(text.startswith("Devices, grouped by tier") for text in texts)
    order = [device for tier in TIERS for device in range(90) if tiers[device] == tier]
    png, _ = plot_partition(counts[order], tmp_path / "sorted", [tiers[device] for device in order])
    assert _images(mixed) == _images(tmp_path / "sorted.svg")
    assert png.is_file()


def test_outputs_are_reproducible(tmp_path: Path) -> None:
    tiers = ["a"] * 20
    first = plot_partition(_counts(20), tmp_path / "a", tiers)
    second = plot_partition(_counts(20), tmp_path / "b", tiers)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def _images(svg: Path) -> list[str]:
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    nodes = root.iter("{http://www.w3.org/2000/svg}image")
    return [node.attrib["{http://www.w3.org/1999/xlink}href"] for node in nodes]
