"""Data that users bring become arrays, or an error that says what is wrong."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.utils.data import TensorDataset

from fedmaestro.data import own
from fedmaestro.data.own import OwnRow, convert, own_dataset
from fedmaestro.errors import UserError
from fedmaestro.tasks.goal import NO_INDEX
from fedmaestro.tasks.own import own_task

RNG = np.random.default_rng(0)
X, X_TEST = RNG.normal(size=(30, 4)), RNG.normal(size=(10, 4))
Y, Y_TEST = np.arange(30) % 3, np.arange(10) % 3


def form(**changes: Any) -> dict[str, Any]:
    return {"x": X, "y": Y, "x_test": X_TEST, "y_test": Y_TEST, **changes}


def test_arrays_of_any_kind_are_the_same_data() -> None:
    plain = convert("d", form())
    assert (plain.task, plain.outputs, plain.classes, plain.padding) == ("classification", 3, (), None)
    assert plain.train.inputs[0].dtype == np.float32
    tensors = {key: torch.from_numpy(value) for key, value in form().items()}
    lists = form(y=Y.tolist(), y_test=Y_TEST.tolist())
    float32 = form(x=X.astype(np.float32), x_test=X_TEST.astype(np.float32))
    pairs = (TensorDataset(tensors["x"], tensors["y"]), TensorDataset(tensors["x_test"], tensors["y_test"]))
    for same in (tensors, lists, float32, pairs, {"train": pairs[0], "test": pairs[1]}):
        assert convert("other name", same).fingerprint == plain.fingerprint
    assert convert("d", form(x=X + 1e-3)).fingerprint != plain.fingerprint


def test_labels_are_found_and_mapped() -> None:
    names = np.array(["cat", "dog", "ant"])
    for labels in (names[Y], Y + 1, (Y * 10).tolist(), Y.astype(bool)):
        found = convert("d", form(y=labels, y_test=labels[:10]))
        assert sorted(np.unique(found.train.targets)) == list(range(found.outputs))
        assert found.classes
    assert convert("d", form(y=names[Y], y_test=names[Y_TEST])).classes == ("ant", "cat", "dog")
    given_names = convert("d", form(y=names[Y], y_test=names[Y_TEST], classes=["dog", "cat", "ant", "bee"]))
    assert (given_names.outputs, given_names.train.targets[:3].tolist()) == (4, [1, 0, 2])
    assert convert("d", form(classes=7)).outputs == 7


def test_a_table_with_categories_and_users() -> None:
    table = pd.DataFrame(
        {"speed": X[:, 0], "kind": np.array(["a", "b", "c"])[Y], "rider": Y % 2, "label": np.array(["x", "y", "z"])[Y]}
    )
    found = convert("d", {"train": table, "groups": "rider", "standardize": True})
    assert found.train.inputs[0].shape[1] == 4, "a number, and three categories"
    assert (found.users, found.outputs, found.standardized) == (("0", "1"), 3, True)
    assert len(found.test.targets) + len(found.train.targets) == 30
    assert set(found.test.groups) == {0, 1}, "a share of every user's examples"  # type: ignore[arg-type]
    task = own_task(found)
    whole = task.plain(np.arange(task.examples)).inputs[0]
    torch.testing.assert_close(whole.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    values = convert("d", {"train": table, "target": "speed", "inputs": ["kind"], "test": table})
    assert (values.task, values.outputs, values.train.targets.shape) == ("regression", 1, (30, 1))


def test_hugging_face_columns() -> None:
    import datasets

    rows = {"a": X[:, 0].tolist(), "b": X[:, 1].tolist(), "who": (Y % 2).tolist(), "label": Y.tolist()}
    data = datasets.Dataset.from_dict(rows)
    found = convert("d", {"train": data, "test": data, "groups": "who"})
    assert found.train.inputs[0].shape == (30, 2)
    tokens = datasets.Dataset.from_dict({"ids": [[1, 2, 3], [4, 5], [2]], "label": [0, 1, 0]})
    found = convert("d", {"train": tokens, "test": tokens, "inputs": "ids"})
    assert (found.train.inputs[0].tolist(), found.padding) == ([[1, 2, 3], [4, 5, 0], [2, 0, 0]], 0)
    assert convert("d", datasets.DatasetDict({"train": data, "test": data})).outputs == 3


def test_pixels_are_brought_to_mean_0_and_std_1_per_channel() -> None:
    pixels = RNG.integers(0, 256, size=(20, 3, 5, 5), dtype=np.uint8)
    pixels[:, 1] //= 4
    task = own_task(convert("d", {"x": pixels, "y": np.arange(20) % 2, "x_test": pixels, "y_test": np.arange(20) % 2}))
    whole = task.plain(np.arange(20)).inputs[0]
    torch.testing.assert_close(whole.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_next_tokens_and_pairs_of_sequences() -> None:
    text = convert("d", {"x": [[3, 4, 5], [5, 4], [3, 3, 3, 3]], "x_test": [[4, 5]]})
    assert (text.task, text.outputs, text.padding) == ("next-token", 6, 0)
    assert text.train.inputs[0].tolist()[:2] == [[3, 4, 5], [5, 4, 0]]
    batch = own_task(text).plain(np.array([0, 1]))
    assert batch.targets.tolist() == [[4, 5, NO_INDEX], [4, NO_INDEX, NO_INDEX]]
    assert batch.take(torch.tensor([1]), padding=0).inputs[0].tolist() == [[5, 4]]
    pairs = convert("d", {"x": [[7, 8], [9]], "y": [[1, 2, 3], [1, 3]], "x_test": [[7]], "y_test": [[1, 3]]})
    assert (pairs.task, pairs.outputs) == ("sequence-to-sequence", 4)
    assert [x.tolist() for x in pairs.train.inputs] == [[[7, 8], [9, 0]], [[1, 2], [1, 3]]]
    assert pairs.train.targets.tolist() == [[2, 3], [3, 0]]


def test_several_inputs() -> None:
    both = {"image": X[:, None, None], "tokens": np.ones((30, 3), int)}
    test = {"image": X_TEST[:, None, None], "tokens": np.ones((10, 3), int)}
    task = own_task(convert("d", form(x=both, x_test=test)))
    assert [(x.shape, x.dtype) for x in task.inputs] == [((1, 1, 4), "float32"), ((3,), "int64")]
    x = task.plain(np.arange(2)).x
    assert isinstance(x, tuple)
    assert [tensor.dtype for tensor in x] == [torch.float32, torch.int64]
    assert convert("d", form(x=tuple(both.values()), x_test=tuple(test.values()))).fingerprint == task.fingerprint


def test_users_without_training_examples_are_no_device() -> None:
    found = convert("d", form(groups=Y, groups_test=np.r_[Y_TEST[:9], 77]))
    assert found.test.groups is not None
    assert found.test.groups[-1] == -1
    assert found.users == ("0", "1", "2")


def test_another_process_reads_what_the_first_has_stored() -> None:
    calls = []

    def load() -> dict[str, Any]:
        calls.append(1)
        return form(groups=Y, groups_test=Y_TEST)

    row = OwnRow(name="d", load=load)
    first = own_dataset(row)
    second = own_dataset(row, first.fingerprint)
    assert len(calls) == 1
    assert (second.fingerprint, second.users) == (first.fingerprint, first.users)
    np.testing.assert_array_equal(second.train.inputs[0], first.train.inputs[0])
    own_dataset(row, "0" * 64)
    assert len(calls) == 2, "not in the cache: the function is asked"
    stored = own._entry(first.fingerprint) / "train_x0.npy"
    stored.write_bytes(bytes(stored.stat().st_size))
    again = own_dataset(row, first.fingerprint)
    assert len(calls) == 3, "a disk that lost blocks is seen"
    np.testing.assert_array_equal(again.train.inputs[0], X.astype(np.float32))


BAD = {
    "nothing": ({}, r"it has the keys none, expected a dictionary with"),
    "key": (form(X_test=1), r"unknown key of dataset 'd' 'X_test': did you mean 'y_test'"),
    "kind": (5, r"its function returned int, expected"),
    "count": (form(y=Y[:20]), r"the training? examples differ in number: x has 30, y has 20|train examples differ"),
    "test count": (form(y_test=Y[:3]), r"test examples differ in number: x has 10, y has 3"),
    "nan": (form(x=np.where(np.arange(120).reshape(30, 4) == 41, np.nan, X)), r"x of example 10 holds .* not finite"),
    "nan target": (
        form(y=np.where(Y == 1, np.inf, 0.5), y_test=Y_TEST + 0.5),
        r"y of training example 1 is not finite",
    ),
    "text": (form(x=np.array([["a"]] * 30)), r"x holds text: turn it into numbers"),
    "empty": (form(x=np.empty((0, 4)), y=[]), r"x holds no examples"),
    "constant": (form(x=np.ones((30, 4)), x_test=X_TEST), r"all numbers in x of the training examples are 1\.0"),
    "one class": (form(y=Y * 0, y_test=Y_TEST * 0), r"all training examples have the class 0"),
    "new class": (form(y_test=Y_TEST + 5), r"test examples have the class 5, 6, 7, of which there is no training"),
    "unnamed class": (form(classes=2), r"training examples have the class 2, which classes does not name"),
    "shape": (form(x_test=X_TEST[:, :3]), r"x has examples of shape \(4,\) to train, \(3,\) to test"),
    "ragged": (form(x=[np.zeros((i + 1, 2)) for i in range(30)]), r"unequal shape that are no token sequences"),
    "padding": ({"x": [[1, 2], [0]], "x_test": [[1]]}, r"0 is a token in some: .*number tokens from 1 on"),
    "negative": (form(x=np.full((30, 4), -2), x_test=np.ones((10, 4), int)), r"holds the token -2"),
    "y_test": ({"x": X, "y": Y, "y_test": Y}, r"y_test or groups_test, but no x_test"),
    "no y_test": ({"x": X, "y": Y, "x_test": X}, r"there is x_test, but no y_test"),
    "share": ({"x": X, "y": Y, "test_share": 2}, r"test_share=2: a number between 0 and 1"),
    "no tokens": ({"x": X}, r"it has no y, and x holds no token sequences"),
    "target": ({"train": pd.DataFrame({"a": [1, 2], "b": [1, 2]})}, r"which of the columns a, b is the target"),
    "column": ({"train": pd.DataFrame({"a": [1, 2], "b": [1, 2]}), "target": "c"}, r"unknown column .* 'c'"),
    "groups": (form(groups=Y[:3]), r"groups has 3"),
    "vocabulary": ({"x": [[1, 9]], "x_test": [[1]], "classes": 5}, r"classes=5, but there is a token 9"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(case: str) -> None:
    returned, said = BAD[case]
    with pytest.raises(UserError, match=said) as caught:
        convert("d", returned)
    assert str(caught.value).startswith(("dataset 'd'", "unknown"))


@given(
    x=arrays.arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=st.floats(-9, 9)),
    data=st.data(),
)
def test_whatever_is_converted_keeps_every_example(x: np.ndarray, data: st.DataObject) -> None:
    y = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=len(x), max_size=len(x))))
    groups = data.draw(st.none() | st.lists(st.sampled_from("abc"), min_size=len(x), max_size=len(x)))
    try:
        found = convert("d", {"x": x, "y": y, "groups": groups, "test_share": 0.5})
    except UserError:
        return
    rows = np.concatenate([found.train.inputs[0], found.test.inputs[0]])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(x.astype(np.float32), axis=0))
    assert len(found.train.targets) + len(found.test.targets) == len(x)
