"""Records as bytes over the local socket between a site's worker and Flower's client process. Light: no torch.

    frame    "PANFM/1\\n" | size of words, uint64 | size of arrays, uint64 | words | arrays
    words    JSON: {"kind", "arrays": [[name, dtype, length], ...], "metrics": {...}, "config": {...}}
    arrays   one after the other, little-endian

The other end may be hostile. Sizes are checked before anything is read, the words before the arrays, memory follows
what arrives and not what was announced, what is read is checked before it is used, and nothing is unpickled.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ConfigError, ProtocolError
from panfm.sharing.messages import Records, check_words
from panfm.texts import parse_json

MAX_WORDS = 1 << 20
"""Bytes of words in one frame."""
MAX_ARRAYS = 1 << 31
"""Bytes of arrays in one frame."""
_BLOCK_BYTES = 1 << 18
_ADDRESS_BYTES = 107
_MAGIC = b"PANFM/1\n"
_HEADER = struct.Struct("<8sQQ")
_DTYPES = {"float32": "<f4", "uint16": "<u2", "int8": "|i1", "float64": "<f8"}
_FIELDS = {"kind", "arrays", "metrics", "config"}


Largest = Callable[["Kind", Mapping[str, Any]], int]
"""Kind and config of a frame -> bytes of arrays that such a frame may hold."""


class Kind(StrEnum):
    """Kind of a frame."""

    HANDSHAKE = "handshake"
    ROUND = "round"
    SUMS = "sums"
    """Sums over patients, for a probe of all sites or a gate; or an evaluation on a site's labels."""
    ANSWER = "answer"
    ERROR = "error"
    """Its config holds one line, `reason`."""


@dataclass(frozen=True)
class Frame:
    """One question, or one answer."""

    kind: Kind
    records: Records

    @classmethod
    def error(cls, reason: str) -> "Frame":
        """Make an answer that reports an error and its reason."""
        return cls(Kind.ERROR, Records(config={"reason": reason}))


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame. Raises ProtocolError if it holds a value of a type that cannot be sent."""
    arrays = {name: np.ascontiguousarray(array) for name, array in frame.records.arrays.items()}
    words = {
        "kind": frame.kind,
        "arrays": [[name, array.dtype.name, array.size] for name, array in arrays.items()],
        "metrics": dict(frame.records.metrics),
        "config": dict(frame.records.config),
    }
    known = [name for name in _DTYPES if name != "float64" or frame.kind in (Kind.SUMS, Kind.ANSWER)]
    if unknown := {array.dtype.name for array in arrays.values()} - set(known):
        raise ProtocolError(f"frame: arrays of {', '.join(sorted(unknown))}, expected {', '.join(known)}")
    try:
        text = json.dumps(words).encode()
    except TypeError as error:
        raise ProtocolError("frame: holds words that are neither text nor numbers") from error
    body = b"".join(array.astype(_DTYPES[array.dtype.name], copy=False).tobytes() for array in arrays.values())
    return _HEADER.pack(_MAGIC, len(text), len(body)) + text + body


def decode(words: bytes | bytearray, body: bytes | bytearray) -> Frame:
    """Read a frame from its two parts. Raises ProtocolError if they are not those of a frame."""
    return _join(_parse(words), body)


def decode_whole(content: bytes) -> Frame:
    """Read what `encode` wrote. Raises ProtocolError as `decode`."""
    start = _HEADER.size + _HEADER.unpack_from(content)[1]
    return decode(content[_HEADER.size : start], content[start:])


def _parse(text: bytes | bytearray) -> dict[str, Any]:
    """Words of a frame, checked; its list of arrays is not. Raises ProtocolError if they are none."""
    try:
        words = parse_json(text.decode(), "words", max_bytes=MAX_WORDS)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ProtocolError("frame: its words are not JSON") from error
    if not isinstance(words, dict) or set(words) != _FIELDS or words["kind"] not in list(Kind):
        raise ProtocolError(f"frame: expected {', '.join(sorted(_FIELDS))}, and a known kind")
    for table in (words["metrics"], words["config"]):
        if not isinstance(table, dict) or not all(map(_is_value, table.values())):
            raise ProtocolError("frame: expected scalars, and lists of one kind of scalar")
    check_words(Records({}, words["metrics"], words["config"]))
    return words


def _join(words: Mapping[str, Any], body: bytes | bytearray) -> Frame:
    records = Records(_cut(words["arrays"], body), words["metrics"], words["config"])
    check_words(records)
    return Frame(Kind(words["kind"]), records)


@contextmanager
def address(path: Path) -> Iterator[str]:
    """A socket's path as the system takes it: at most 107 bytes; a longer one goes by way of its folder's handle."""
    if len(os.fsencode(path)) <= _ADDRESS_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def send(connection: socket.socket, content: bytes, *, timeout_s: float | None) -> None:
    """Send the bytes of a frame. Raises OSError if the connection ends, or does not take them in time."""
    connection.settimeout(timeout_s)
    connection.sendall(content)


def receive(
    connection: socket.socket, *, timeout_s: float | None, max_arrays: int = MAX_ARRAYS, largest: Largest | None = None
) -> Frame:
    """The next frame.

    Args:
        timeout_s: Seconds within which the whole frame must have come; None: whenever it comes.
        max_arrays: Bytes of arrays that are taken, at most MAX_ARRAYS.
        largest: Bytes of arrays that are taken by what the words say, asked before the arrays are read.
    Raises:
        ProtocolError: it is not one, or too large.
        OSError: the connection ended, or was too slow.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    magic, num_words, num_arrays = _HEADER.unpack(_read(connection, _HEADER.size, deadline))
    if magic != _MAGIC:
        raise ProtocolError("frame: not a message of panfm")
    most = min(max_arrays, MAX_ARRAYS)
    if num_words > MAX_WORDS or num_arrays > most:
        raise ProtocolError(f"frame: {num_words} + {num_arrays} bytes, at most {MAX_WORDS} + {most} are taken")
    text = _read(connection, num_words, deadline)
    try:
        words = _checked(text, num_arrays, largest)
    except ProtocolError:
        _skip(connection, num_arrays, deadline)
        raise
    return _join(words, _read(connection, num_arrays, deadline))


def _checked(text: bytearray, num_arrays: int, largest: Largest | None) -> dict[str, Any]:
    """The words of a frame whose arrays, of so many bytes, may be read. Raises ProtocolError if they may not."""
    words = _parse(text)
    if _announced(words["arrays"]) != num_arrays:
        raise ProtocolError("frame: its arrays do not fit its list of arrays")
    if largest is not None and num_arrays > (most := largest(Kind(words["kind"]), words["config"])):
        raise ProtocolError(f"frame: {num_arrays} bytes of arrays, a {words['kind']} of this run has at most {most}")
    return words


def _skip(connection: socket.socket, size: int, deadline: float | None) -> None:
    """Receive bytes and drop them, so that their sender is still there to be told why they are refused."""
    with contextlib.suppress(OSError):
        while size:
            size -= len(_read(connection, min(size, _BLOCK_BYTES), deadline))


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    content = bytearray()
    while missing := size - len(content):
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        if not (block := connection.recv(min(missing, _BLOCK_BYTES))):
            raise ConnectionResetError("the other end closed the connection")
        content += block
    return content


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        has_one_type = len({type(item) for item in value}) <= 1
        return has_one_type and not any(isinstance(item, list) for item in value) and all(map(_is_value, value))
    return isinstance(value, str | int | float)


def _cut(layout: Any, body: bytes | bytearray) -> dict[str, NDArray[Any]]:
    """Flat arrays by name; they must fill the body exactly."""
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    if _announced(layout) != len(body):
        raise ProtocolError("frame: its arrays do not fit its list of arrays")
    for name, dtype, length in map(_entry, layout):
        end = start + length * np.dtype(_DTYPES[dtype]).itemsize
        if name in arrays:
            raise ProtocolError("frame: its arrays do not fit its list of arrays")
        arrays[name] = np.frombuffer(body[start:end], _DTYPES[dtype])
        start = end
    return arrays


def _announced(layout: Any) -> int:
    """Bytes of the arrays in a list of them. Raises ProtocolError if it is none."""
    entries = map(_entry, layout if isinstance(layout, list) else [None])
    return sum(length * np.dtype(_DTYPES[dtype]).itemsize for _, dtype, length in entries)


def _entry(entry: Any) -> tuple[str, str, int]:
    match entry:
        case [str(name), str(dtype), int(length)] if dtype in _DTYPES and length >= 0 and length is not True:
            return name, dtype, length
    raise ProtocolError("frame: expected name, dtype and length of each array")
