"""Tensors on the wire: Flower's own bytes, in both directions."""

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from fedmaestro.flower.arrays import to_arrays, to_state

DTYPES = st.sampled_from([np.float32, np.float64, np.int64, np.bool_, np.uint8, np.float16])


@given(DTYPES.flatmap(lambda dtype: nps.arrays(dtype, nps.array_shapes(min_dims=0, min_side=0))))
def test_bytes_are_those_that_flower_writes_and_come_back(values: np.ndarray) -> None:
    tensor = torch.from_numpy(values.copy())
    sent = to_arrays({"x": tensor})["x"]
    flowers = Array(values)
    assert (sent.data, sent.dtype, sent.shape, sent.stype) == (
        flowers.data,
        flowers.dtype,
        flowers.shape,
        flowers.stype,
    )
    back = to_state({"x": sent})["x"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert back.numpy().tobytes() == values.tobytes()
    back.zero_()
    assert to_state({"x": sent})["x"].numpy().tobytes() == values.tobytes(), "memory of its own"


def test_what_others_write_is_read_too() -> None:
    """Another host may send column-major arrays."""
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert torch.equal(to_state({"x": Array(values)})["x"], torch.arange(6.0).reshape(2, 3))
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(to_state(to_arrays({"x": channels_last}))["x"], channels_last)


@pytest.mark.parametrize("cut", [5, 100, 130])
def test_truncated_bytes_are_an_error(cut: int) -> None:
    whole = Array(np.zeros(4, np.float32))
    with pytest.raises((ValueError, EOFError)):
        to_state({"x": Array(whole.dtype, whole.shape, whole.stype, whole.data[:cut])})
