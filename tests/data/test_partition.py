import importlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmaestro.data import (
    PARTITIONS,
    DealtParts,
    ImageDataset,
    cached_partition,
    class_counts,
    partition,
)
from fedmaestro.errors import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))


@pytest.mark.parametrize("scheme", [name for name, row in PARTITIONS.items() if row.needs != "groups"])
@settings(max_examples=8)
@given(num_devices=st.integers(1, 12), num_classes=st.integers(1, 5), seed=st.integers(0, 2**32), data=st.data())
def test_every_example_belongs_to_exactly_one_device(
    scheme: str, num_devices: int, num_classes: int, seed: int, data: st.DataObject
) -> None:
    labels = np.arange(num_classes * 40) % num_classes + 3  # labels need not start at 0
    least = max(1, num_classes - num_devices + 1)
    k = data.draw(st.integers(least, num_classes), label="classes_per_device")
    arguments = {"scheme": scheme, "num_devices": num_devices, "alpha": 5.0, "classes_per_device": k}
    parts = partition(labels, seed=seed, **arguments)
    assert len(parts) == num_devices
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) >= 1
        assert (np.diff(part) > 0).all()
        if scheme == "pathological":
            assert len(np.unique(labels[part])) == k
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    again = partition(labels, seed=seed, **arguments)
    assert again.fingerprint == parts.fingerprint
    if num_devices > 1:
        # One other seed may agree by chance: two devices of one class each have two partitions in all.
        others = [partition(labels, seed=seed + i, **arguments) for i in range(1, 21)]
        assert any(other.fingerprint != parts.fingerprint for other in others)


def test_iid_shares_are_equal_and_mixed() -> None:
    parts = partition(np.sort(LABELS), scheme="iid", num_devices=7, seed=1)
    assert {len(part) for part in parts} == {85, 86}
    assert (class_counts(np.sort(LABELS), parts, 10) > 0).all()  # a cut without a shuffle has 2 classes each


def test_a_small_alpha_makes_devices_unlike() -> None:
    def mean_top_share(alpha: float) -> float:
        parts = partition(LABELS, scheme="dirichlet", num_devices=10, seed=1, alpha=alpha)
        counts = class_counts(LABELS, parts, 10)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert mean_top_share(0.1) > 0.45 > 0.2 > mean_top_share(1000)


@given(devices=st.integers(2, 12), alpha=st.sampled_from([0.3, 1.0, 5.0]), seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_self_balancing_is_flowers(devices: int, alpha: float, seed: int) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    ours = partition(
        LABELS, scheme="dirichlet", num_devices=devices, seed=seed, alpha=alpha, min_examples=0, self_balancing=True
    )
    order = np.random.default_rng(seed).permutation(len(LABELS))
    theirs = DirichletPartitioner(
        num_partitions=devices,
        partition_by="label",
        alpha=alpha,
        min_partition_size=0,
        self_balancing=True,
        shuffle=False,
        seed=seed,
    )
    theirs.dataset = Dataset.from_dict({"index": order, "label": LABELS[order]})
    for device in range(devices):
        assert sorted(theirs.load_partition(device)["index"]) == ours[device].tolist()


def test_self_balancing_is_for_dirichlet() -> None:
    with pytest.raises(UserError, match=r"data\.self-balancing = true: it is for data\.partition = 'dirichlet'"):
        partition(LABELS, scheme="iid", num_devices=5, seed=0, self_balancing=True)


@pytest.mark.parametrize("classes_per_device", [1, 2, 10])
def test_pathological_uses_every_class(classes_per_device: int) -> None:
    parts = partition(LABELS, scheme="pathological", num_devices=20, seed=3, classes_per_device=classes_per_device)
    counts = class_counts(LABELS, parts, 10)
    assert ((counts > 0).sum(axis=1) == classes_per_device).all()
    assert (counts.sum(axis=0) == 60).all()


def test_a_devices_number_tells_nothing_about_its_classes() -> None:
    firsts = {
        int(LABELS[partition(LABELS, scheme="pathological", num_devices=10, seed=s, classes_per_device=1)[0][0]])
        for s in range(6)
    }
    assert len(firsts) > 1


ERRORS = {
    "unknown": ({"scheme": "idd"}, r"unknown partition 'idd': did you mean 'iid'\?"),
    "devices": ({"num_devices": 601}, r"data\.devices = 601: more than the 600 training examples"),
    "no devices": ({"num_devices": 0}, r"data\.devices = 0: must be at least 1"),
    "minimum": (
        {"num_devices": 60, "min_examples": 11},
        r"data\.min-examples = 11: 60 devices .* 660 of the 600",
    ),
    "no minimum": ({"min_examples": -1}, r"data\.min-examples = -1: must be at least 0"),
    "alpha": ({"scheme": "dirichlet", "alpha": 0.0}, r"data\.alpha = 0\.0: must be a positive number"),
    "alpha nan": ({"scheme": "dirichlet", "alpha": float("nan")}, r"data\.alpha = nan"),
    "classes": (
        {"scheme": "pathological", "num_devices": 20, "classes_per_device": 11},
        r"data\.classes-per-device = 11: the data has 10 classes",
    ),
    "no classes": ({"scheme": "pathological", "classes_per_device": 0}, r"data\.classes-per-device = 0"),
    "left out": (
        {"scheme": "pathological", "num_devices": 5, "classes_per_device": 2},
        r"leave out 4 of 10 classes: raise data\.devices to 9 or data\.classes-per-device to 6",
    ),
    "too thin": (
        {"scheme": "pathological", "num_devices": 500, "classes_per_device": 2},
        r"a class has too few examples .*: lower data\.classes-per-device or data\.devices",
    ),
    "uneven": (
        {"scheme": "pathological", "num_devices": 50, "classes_per_device": 2, "min_examples": 12},
        r"data\.min-examples = 12: a device of the 'pathological' partition got \d+: lower",
    ),
    "gives up": (
        {"scheme": "dirichlet", "num_devices": 50, "alpha": 0.05, "min_examples": 5},
        r"data\.alpha = 0\.05: no draw .*raise data\.alpha, or lower data\.min-examples .* or data\.devices",
    ),
    "tiny alpha": (
        {"scheme": "dirichlet", "num_devices": 50, "alpha": 1e-300},
        r"data\.alpha = 1e-300: no draw",
    ),
    "seed": ({"seed": -1}, r"seed = -1: must be at least 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_setting(case: str) -> None:
    change, message = ERRORS[case]
    with pytest.raises(UserError, match=message) as caught:
        partition(LABELS, **{"scheme": "iid", "num_devices": 4, "seed": 0, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_cached_partition_is_the_partition_drawn_once(
    digits: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"scheme": "dirichlet", "num_devices": 8, "seed": 5, "alpha": 0.3}
    monkeypatch.setenv("FEDMAESTRO_CACHE", str(tmp_path))
    first = cached_partition(digits.fingerprint, digits.train_labels, **arguments)
    direct = partition(digits.train_labels, **arguments)
    assert first.fingerprint == direct.fingerprint
    module = importlib.import_module("fedmaestro.data.partition")  # the package's attribute is the function
    with monkeypatch.context() as patch:
        patch.setattr(module, "partition", lambda *_, **__: pytest.fail("drawn again"))
        second = cached_partition(digits.fingerprint, digits.train_labels, **arguments)
    assert second.fingerprint == direct.fingerprint
    assert all(part.dtype == np.int64 for part in second)


def test_cache_depends_on_the_dataset_and_every_argument(
    digits: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMAESTRO_CACHE", str(tmp_path))
    base = {"scheme": "iid", "num_devices": 3, "seed": 5}
    changes = [
        {},
        {"scheme": "dirichlet", "alpha": 9.0},
        {"num_devices": 4},
        {"seed": 6},
        {"alpha": 0.1},
        {"classes_per_device": 3},
        {"min_examples": 2},
    ]
    for change in changes:
        cached_partition(digits.fingerprint, digits.train_labels, **{**base, **change})
    cached_partition("other", digits.train_labels, **base)
    assert len(list((tmp_path / "partitions").iterdir())) == len(changes) + 1


def test_class_counts() -> None:
    labels = np.array([0, 2, 2, 1])
    parts = (np.array([0, 1, 2]), np.array([3]), np.array([], np.int64))
    assert class_counts(labels, parts, 4).tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_fingerprint_tells_boundaries_and_order_apart() -> None:
    a, b = np.array([0, 1]), np.array([2])
    variants = [(a, b), (b, a), (np.array([0]), np.array([1, 2])), (a, b, b[:0])]
    assert len({DealtParts.of_lists(parts).fingerprint for parts in variants}) == len(variants)


def test_real_mnist_at_scale(shared_data: Path, session_cache: Path) -> None:
    from fedmaestro.data import load_dataset

    data = load_dataset("mnist", shared_data, session_cache)
    parts = cached_partition(data.fingerprint, data.train_labels, scheme="dirichlet", num_devices=100, seed=0)
    assert sum(len(part) for part in parts) == 60000
    with pytest.raises(UserError, match=r"data\.alpha = 0\.1: no draw gave each of 1000 devices at least 10"):
        partition(data.train_labels, scheme="dirichlet", num_devices=1000, seed=0, alpha=0.1, min_examples=10)


@pytest.mark.parametrize("scheme", [name for name, row in PARTITIONS.items() if row.draw is not None])
@settings(max_examples=20)
@given(size=st.integers(2, 120), seed=st.integers(0, 2**32), alpha=st.floats(1e-3, 100.0))
def test_devices_that_share_draw_their_own_examples(scheme: str, size: int, seed: int, alpha: float) -> None:
    """A device's examples depend on its number and the seed only, however many devices there are."""
    arguments = {"scheme": scheme, "seed": seed, "alpha": alpha, "share_examples": size}
    few, many = (partition(LABELS, num_devices=devices, **arguments) for devices in (5, 1_000_000))  # type: ignore[arg-type]
    assert len(many) == 1_000_000
    assert many.sizes.nbytes == 0 or many.sizes.base is not None
    for device in (0, 4):
        part = few[device]
        assert len(part) == size == few.sizes[device]
        assert (np.diff(part) > 0).all()
        assert part.min() >= 0
        assert part.max() < len(LABELS)
        np.testing.assert_array_equal(part, many[device])
        if scheme == "pathological":
            assert len(np.unique(LABELS[part])) == 2
    assert few.fingerprint != many.fingerprint


def test_shared_dirichlet_is_skewed_by_alpha() -> None:
    def mean_top_share(alpha: float) -> float:
        parts = partition(LABELS, scheme="dirichlet", num_devices=200, seed=1, alpha=alpha, share_examples=50)
        return float(class_counts(LABELS, parts, 10).max(axis=1).mean() / 50)

    # Of Dirichlet(α, …, α) over 10 classes the largest share is near 1 for α → 0 and 0.1 for α → ∞.
    assert mean_top_share(0.01) > 0.85
    assert mean_top_share(100.0) < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "quantity"}, r"data\.share-examples = 20: devices of partition 'quantity' share none: use iid, "),
        ({"share_examples": 601}, r"data\.share-examples = 601: more than the 600 training examples"),
        ({"min_examples": 21}, r"data\.share-examples = 20: fewer than data\.min-examples = 21"),
        ({"share_examples": -1}, r"data\.share-examples = -1: must be at least 0"),
        ({"scheme": "pathological", "share_examples": 130}, r"130: that makes 65 of each of 2 classes"),
        (
            {"scheme": "pathological", "classes_per_device": 11},
            r"data\.classes-per-device = 11: the data has 10 classes",
        ),
    ],
)
def test_sharing_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"scheme": "iid", "num_devices": 10**6, "seed": 0, "share_examples": 20, **change}
    with pytest.raises(UserError, match=message):
        partition(LABELS, **arguments)  # type: ignore[arg-type]


def test_a_fleet_larger_than_the_data_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"let devices share examples with data\.share-examples"):
        partition(LABELS, scheme="iid", num_devices=601, seed=0)
    parts = partition(LABELS, scheme="dirichlet", num_devices=100_000, seed=0, min_examples=0)
    assert parts.sizes.sum() == len(LABELS)
