import json
import socket
import struct
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation import codec
from chainfed_engine.federation.codec import pack, receive_frame, send_frame, unpack

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5, np.float64),
    "c": np.zeros((0, 4), np.float32),
    "d": np.array([1, -2], np.int8),
}


def _changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(pack({}, ARRAYS)[0]), **fields}).encode()


def test_a_message_comes_back_as_it_was() -> None:
    record, arrays = unpack(*pack({"kind": "train", "x": [1, 2.5]}, ARRAYS))
    assert record == {"kind": "train", "x": [1, 2.5]} and arrays.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert arrays[key].dtype == array.dtype and arrays[key].shape == array.shape
        assert arrays[key].tobytes() == array.tobytes()


def test_equal_arrays_make_equal_payloads_whoever_they_are_for() -> None:
    first, second = pack({"client": "a"}, ARRAYS), pack({"client": "b"}, dict(reversed(ARRAYS.items())))
    assert first[1] == second[1] and first[0] != second[0]


def test_a_payload_cut_short_too_long_or_changed_is_refused() -> None:
    header, payload = pack({}, ARRAYS)
    for bad, reason in ((payload[:-1], "cut short|more than"), (payload + b"x", "more than its arrays"), (b"", "cut")):
        with pytest.raises(CorruptFile, match=reason):
            unpack(header, bad)
    with pytest.raises(CorruptFile, match="checksum"):
        unpack(header, bytes([payload[0] ^ 1]) + payload[1:])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{}",
        b"[" * 100_000,
        _changed(protocol=0),
        _changed(protocol="1"),
        _changed(arrays=None),
        _changed(record=[]),
        _changed(arrays=[["a", "<f4", [2**40, 2**39]]]),
        _changed(arrays=[["a", "<f4", [0, 2**39, 2**39, 2**39]]]),
        _changed(arrays=[["a", "<f4", [-1]]]),
        _changed(arrays=[["a", "<f4", [1, 1, 1, 1, 1]]]),
        _changed(arrays=[["a", "<f4", [True]]]),
        _changed(arrays=[["a", "<f4", 3]]),
        _changed(arrays=[["a", "|O", [1]]]),
        _changed(arrays=[["a", ">f4", [1]]]),
        _changed(arrays=[["a", {"x": 1}, [1]]]),
        _changed(arrays=[["a" * 1000, "<f4", [1]]]),
        _changed(arrays=[["a", "<f4", [1]], ["a", "<f4", [1]]]),
        _changed(arrays=[["a"]]),
        _changed(arrays=["abc"]),
    ],
    ids=lambda header: header[-40:].decode(errors="replace"),
)
def test_a_hostile_header_is_refused(header: bytes) -> None:
    with pytest.raises(CorruptFile, match="message"):
        unpack(header, pack({}, ARRAYS)[1])


@pytest.mark.parametrize("key", ["\ud800", "a\nb", "\u00e4"])
def test_a_name_that_no_parameter_has_is_refused(key: str) -> None:
    """Half of a surrogate pair cannot be written to the journal."""
    message = pack({}, {key: np.zeros(1, np.float32)})
    with pytest.raises(CorruptFile, match="expected arrays as"):
        unpack(*message)


def test_a_message_of_another_protocol_says_what_to_do() -> None:
    with pytest.raises(CorruptFile, match="expected protocol 4, got 99; install the same"):
        unpack(_changed(protocol=99), b"")


def test_what_is_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(CorruptFile, match="at most"):
        unpack(*pack({}, ARRAYS))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_and_nothing_else(header: bytes, payload: bytes) -> None:
    with pytest.raises(CorruptFile):
        unpack(header, payload)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_never_passes_as_something_else(position: int, value: int) -> None:
    header, payload = pack({"kind": "x"}, ARRAYS)
    changed = bytearray(header)
    changed[position % len(header)] = value
    try:
        record, arrays = unpack(bytes(changed), payload)
    except CorruptFile:
        return
    assert all(array.tobytes() in payload for array in arrays.values()) and isinstance(record, dict)


def test_an_array_that_no_message_may_carry_is_refused_by_the_sender() -> None:
    with pytest.raises(CorruptFile, match="float32"):
        pack({}, {"x": np.array(["text"])})


def test_a_frame_goes_through_a_socket_and_a_broken_one_is_noticed() -> None:
    left, right = socket.socketpair()
    header, payload = pack({}, {"x": np.zeros(300_000, np.float32)})
    sender = threading.Thread(target=send_frame, args=(left, header, payload))
    sender.start()
    assert receive_frame(right) == (header, payload)
    sender.join()
    left.sendall(b"GET / HTTP/1.1\r\n\r\n....")
    with pytest.raises(CorruptFile, match="frame"):
        receive_frame(right)
    left.sendall(struct.pack("<4sQQ", b"CFM1", 2**60, 1))
    left.close()
    right.recv(100)
    with pytest.raises(ConnectionError):
        receive_frame(right)
    right.close()
