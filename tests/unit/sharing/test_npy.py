import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from panfm.errors import ProtocolError
from panfm.sharing.npy import NpySpace, to_npy, view_npy


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(48)


@given(
    arrays.arrays(
        dtype=arrays.floating_dtypes(sizes=(32, 64)) | arrays.integer_dtypes() | arrays.unsigned_integer_dtypes(),
        shape=arrays.array_shapes(min_dims=1, max_dims=3, min_side=0),
    )
)
def test_the_bytes_are_numpys_own(array):
    assert to_npy(array) == saved(array)
    back = view_npy(to_npy(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_columns_first():
    array = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert view_npy(saved(array)).tolist() == array.tolist()


def test_a_view_takes_no_memory_and_cannot_be_written():
    data = to_npy(np.arange(6, dtype=np.float32))
    view = view_npy(data)
    assert view.base is not None
    assert not view.flags.writeable
    assert np.shares_memory(view, view_npy(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        to_npy(np.arange(6.0))[:-1],
        to_npy(np.arange(6.0)) + b"x",
        to_npy(np.arange(6.0))[:40],
        saved(np.array([{"a": 1}], dtype=object)),
        to_npy(np.arange(6.0)).replace(b"(6,)", b"(7,)"),
        b"\x93NUMPY\x03" + to_npy(np.arange(6.0))[7:],
        with_header("{'descr': ('<f4',), 'fortran_order': False, 'shape': (6,)}"),
        with_header("{'descr': 'f4,(', 'fortran_order': False, 'shape': (6,)}"),
        with_header("(" * 300),
        with_header("{"),
        with_header("-" * 9000 + "1"),
    ],
)
def test_anything_else_is_refused(data):
    with pytest.raises(ProtocolError, match="array cannot be read"):
        view_npy(data)


@pytest.mark.parametrize("size", [0, 1, 7, 100_000])
def test_a_space_is_the_bytes_of_its_numbers(size):
    space = NpySpace(size)
    assert not space.numbers.any()
    wanted = np.arange(size, dtype=np.float32)
    space.numbers[:] = wanted
    where = space.numbers.ctypes.data
    data = space.close()
    assert data == to_npy(wanted)
    assert view_npy(data).ctypes.data == where


def test_who_still_holds_the_numbers_of_a_space_cannot_change_its_bytes():
    space = NpySpace(3)
    held = space.numbers
    data = space.close()
    held[:] = 1.0
    assert view_npy(data).tolist() == [0, 0, 0]
