"""Tensors as Flower's arrays, under their own names.

The bytes are those of ``flwr.app.Array(ndarray)`` (a test compares): NumPy's format with its header of 128 bytes. Its
writer and parser take longer than a small model's tensors take to copy, so headers are made, and read, once for each
type and shape.
"""

import io
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedmaestro.submodel import State

_STYPE = "numpy.ndarray"
_MAGIC, _PREFIX = b"\x93NUMPY\x01\x00", 10


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the record of a state; each tensor is copied once."""
    return ArrayRecord({name: _encoded(tensor.detach().cpu().contiguous().numpy()) for name, tensor in state.items()})


def to_state(arrays: Mapping[str, Array]) -> State:
    """Return the state of a record, in memory of its own.

    Raises:
        ValueError: bytes that are no array, or too few of them.
    """
    return {name: torch.from_numpy(_decoded(array)) for name, array in arrays.items()}


def _encoded(values: np.ndarray) -> Array:
    header, dtype = _header(values.dtype, values.shape)
    data = b"".join((header, values.reshape(-1).view(np.uint8).data))
    return Array(dtype, values.shape, _STYPE, data)


def _decoded(array: Array) -> np.ndarray:
    data = array.data
    if array.stype == _STYPE and data.startswith(_MAGIC):
        start = _PREFIX + int.from_bytes(data[8:_PREFIX], "little")
        dtype, shape, is_plain = _parsed(data[:start])
        if is_plain:
            return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape).copy()
    values = array.numpy()
    return values if values.flags.writeable else values.copy()


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[bytes, str]:
    """Return the header, and the name of the type."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file.getvalue(), str(dtype)


@lru_cache(maxsize=1024)
def _parsed(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Return type and shape, and whether the bytes that follow are the numbers in C order."""
    file = io.BytesIO(header)
    file.seek(len(_MAGIC))
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, shape, not fortran and not dtype.hasobject
