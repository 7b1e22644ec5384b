"""Arrays as the bytes of a .npy file, in which Flower carries them, with fewer copies than its own conversion makes."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from panfm.errors import ProtocolError

_MAX_HEADER = 1024
"""Bytes: that of one of our arrays has 118, and numpy parses it as Python."""
_HEADERS = {(1, 0): npy.read_array_header_1_0}
"""By version of the format; numpy writes 1.0 for all that we send."""
_PREFIX = npy.MAGIC_LEN + 2
"""Bytes before the header: the magic string, and the header's length."""


def to_npy(array: NDArray[np.generic]) -> bytes:
    """The bytes that `np.save` writes for a contiguous array, in one copy."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
    return b"".join((header.getvalue(), array.reshape(-1).view(np.uint8).data))


class NpySpace:
    """A float32 array [size] in the bytes of a .npy file, to be filled, and then handed over.

    The bytes are copied only if the array is still in use. A copy of a large model costs more than the arithmetic of a
    round: its memory is mapped page by page.
    """

    def __init__(self, size: int) -> None:
        """Make an array of zeros."""
        header = io.BytesIO()
        described = {"descr": npy.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": (size,)}
        npy.write_array_header_1_0(header, described)
        self._file = io.BytesIO(bytes(header.tell() + 4 * size))
        self._file.write(header.getvalue())
        self.numbers = np.frombuffer(self._file.getbuffer(), np.float32, offset=header.tell())

    def close(self) -> bytes:
        """Return the bytes; the array is not to be used afterwards."""
        del self.numbers
        return self._file.getvalue()


def view_npy(data: bytes) -> NDArray[np.generic]:
    """The array in such bytes: a view of them, not writable.

    Raises:
        ProtocolError: the bytes are not those of a .npy file of plain numbers, or not all of it.
    """
    try:
        start = _PREFIX + int.from_bytes(data[npy.MAGIC_LEN : _PREFIX], "little")
        shape, fortran, dtype = _read_header(data[: min(start, _MAX_HEADER)])
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # numpy parses the header as Python: anything may come of it
        raise ProtocolError(f"array cannot be read ({type(error).__name__})") from error


@lru_cache(maxsize=256)
def _read_header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype: the same few, round after round, and numpy takes its time."""
    file = io.BytesIO(start)
    return _HEADERS[npy.read_magic(file)](file)
