"""Frames come back as they went, to the bit; whatever else comes is refused with one kind of error."""

import json
import socket
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from panfm.errors import ProtocolError
from panfm.sharing import frames
from panfm.sharing.frames import Frame, Kind, decode, encode, receive
from panfm.sharing.messages import Records

HEADER = 24


def pipe(content: bytes) -> Frame:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(content)
        here.close()
        return receive(there, timeout_s=1.0)


def words(**changes) -> bytes:
    return json.dumps({"kind": "round", "arrays": [], "metrics": {}, "config": {}} | changes).encode()


integers = st.integers(-(2**63), 2**63 - 1)
numbers = st.one_of(integers, st.floats(allow_nan=False))
scalars = st.one_of(numbers, st.booleans(), st.text(max_size=9))
lists = st.one_of(st.lists(integers, max_size=3), st.lists(st.text(max_size=5), max_size=3))
flats = st.sampled_from(["float32", "uint16", "int8"]).flatmap(lambda kind: arrays(kind, st.integers(0, 9)))


@settings(max_examples=60)
@given(
    st.sampled_from(Kind),
    st.dictionaries(st.text(max_size=9), flats, max_size=3),
    st.dictionaries(st.text(max_size=9), numbers, max_size=3),
    st.dictionaries(st.text(max_size=9), st.one_of(scalars, lists), max_size=3),
)
def test_round_trip(kind, content, metrics, config):
    found = pipe(encode(Frame(kind, Records(content, metrics, config))))
    assert (found.kind, found.records.metrics, found.records.config) == (kind, metrics, config)
    assert [type(value) for value in found.records.metrics.values()] == [type(value) for value in metrics.values()]
    assert list(found.records.arrays) == list(content)
    for name, array in content.items():
        assert found.records.arrays[name].dtype == array.dtype
        assert found.records.arrays[name].tobytes() == array.tobytes()


def test_arrays_can_be_written_to_and_are_aligned():
    found = pipe(encode(Frame(Kind.ROUND, Records({"a": np.ones(3, np.int8), "b": np.ones(2, np.float32)}))))
    assert found.records.arrays["b"].flags.writeable
    assert found.records.arrays["b"].flags.aligned


def test_not_a_number_travels():
    assert np.isnan(pipe(encode(Frame(Kind.ANSWER, Records(metrics={"loss": float("nan")})))).records.metrics["loss"])


@pytest.mark.parametrize(
    "records",
    [
        Records({"a": np.zeros(2, np.float64)}),
        Records({"a": np.array([object()])}),
        Records(config={"a": b"bytes"}),
        Records(config={"a": [b"bytes"]}),
    ],
)
def test_what_cannot_travel_is_refused(records):
    with pytest.raises(ProtocolError, match="frame"):
        encode(Frame(Kind.ROUND, records))


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (b"", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        (b"9" * 10_000, b""),
        (b"[]", b""),
        (b"{}", b""),
        (words(kind="shell"), b""),
        (words(kind=["round"]), b""),
        (words(more=1), b""),
        (words(metrics=[]), b""),
        (words(metrics={"a": None}), b""),
        (words(config={"a": {"b": 1}}), b""),
        (words(config={"a": [1, "b"]}), b""),
        (words(config={"a": [[1]]}), b""),
        (words(arrays={}), b""),
        (words(arrays=[1]), b""),
        (words(arrays=[["a", "object", 1]]), bytes(8)),
        (words(arrays=[["a", "float32", -1]]), b""),
        (words(arrays=[["a", "float32", True]]), bytes(4)),
        (words(arrays=[["a", "float32", 1.0]]), bytes(4)),
        (words(arrays=[["a", "float32", 2]]), bytes(4)),
        (words(arrays=[["a", "float32", 2**62]]), bytes(4)),
        (words(arrays=[["a", "float32", 1]]), bytes(5)),
        (words(arrays=[["a", "float32", 1], ["a", "float32", 1]]), bytes(8)),
        (words(), b"\x00"),
    ],
)
def test_malformed_content_is_refused(text, body):
    with pytest.raises(ProtocolError, match="frame"):
        decode(text, body)


@pytest.mark.parametrize("sizes", [(frames.MAX_WORDS + 1, 0), (0, frames.MAX_ARRAYS + 1), (2**64 - 1, 2**64 - 1)])
def test_sizes_are_refused_before_anything_is_read(sizes):
    with pytest.raises(ProtocolError, match="at most"):
        pipe(b"PANFM/1\n" + struct.pack("<QQ", *sizes))


def test_a_frame_that_is_cut_off_or_slow_is_an_error_of_the_connection():
    content = encode(Frame(Kind.ROUND, Records({"a": np.ones(4, np.float32)})))
    for size in (0, 1, HEADER - 1, HEADER, HEADER + 9, len(content) - 1):
        with pytest.raises(OSError, match="closed"):
            pipe(content[:size])
    here, there = socket.socketpair()
    with here, there:
        here.sendall(content[:-1])
        with pytest.raises(OSError, match="timed out"):
            receive(there, timeout_s=0.05)


GOOD = encode(Frame(Kind.ROUND, Records({"a": np.ones(2, np.float32)}, {"m": 1.5}, {"run": "x", "round": 3})))


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_are_a_frame_or_refused(changes):
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    try:
        assert isinstance(pipe(bytes(content)), Frame)
    except (ProtocolError, OSError):
        return
