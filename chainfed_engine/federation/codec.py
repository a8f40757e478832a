"""A message as bytes: a JSON header (record, names and shapes of arrays) and one payload of raw little-endian arrays.

In: a record of messages.py and its arrays; out: header and payload, and back. What comes in is hostile: header and
payload have limits, every array's dtype, shape and size are checked against the payload before a view is made, and the
payload against its SHA-256. Nothing is executed and nothing allocated beyond what was received. The payload alone is
what several sites may be sent alike, so that a transport that stores by content stores it once. Free of torch.
"""

import hashlib
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from chainfed_engine.errors import CorruptFile
from chainfed_engine.types import Arrays

PROTOCOL = 4  # of header, records and what parameters mean; another one is refused by name
MAX_HEADER_BYTES = 4 << 20  # JSON takes up to thirty times as much memory once it is read
MAX_PAYLOAD_BYTES = 2 << 30
_DTYPES: dict[str, "np.dtype[Any]"] = {
    "<f2": np.dtype("<f2"),
    "<f4": np.dtype("<f4"),
    "<f8": np.dtype("<f8"),
    "|i1": np.dtype("|i1"),
    "|u1": np.dtype("|u1"),
}
_MAX_ARRAYS, _MAX_DIMS, _MAX_KEY = 1 << 16, 4, 256
_FRAME = struct.Struct("<4sQQ")
_MAGIC = b"CFM1"


def pack(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[bytes, bytes]:
    """Header and payload. Raises CorruptFile for an array that no message may carry."""
    entries, parts = [], []
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        if array.dtype.str not in _DTYPES or array.ndim > _MAX_DIMS:
            raise CorruptFile(f"message: {key}: expected float16, float32, float64, int8 or uint8, got {array.dtype}")
        entries.append([key, array.dtype.str, list(arrays[key].shape)])
        parts.append(array.tobytes())
    payload = b"".join(parts)
    content = {
        "protocol": PROTOCOL,
        "record": record,
        "arrays": entries,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    return json.dumps(content, allow_nan=False).encode(), payload


def unpack(header: bytes, payload: bytes) -> tuple[dict[str, Any], Arrays]:
    """Record (to be checked by messages.py) and arrays (read-only views of the payload). Raises CorruptFile."""
    if len(header) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise CorruptFile(
            f"message: expected a header of at most {MAX_HEADER_BYTES} and a payload of at most {MAX_PAYLOAD_BYTES} "
            f"bytes, got {len(header)} and {len(payload)}"
        )
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"message: the header is no JSON: {str(error)[:100]}") from None
    if not isinstance(content, dict) or content.get("protocol") != PROTOCOL:
        found = content.get("protocol") if isinstance(content, dict) else None
        raise CorruptFile(
            f"message: expected protocol {PROTOCOL}, got {found!r:.40}; install the same chainfed-engine on both sides"
        )
    if not isinstance(content.get("record"), dict) or not isinstance(content.get("arrays"), list):
        raise CorruptFile("message: expected a record and a list of arrays in the header")
    arrays = _arrays(content["arrays"], payload)
    if content.get("sha256") != hashlib.sha256(payload).hexdigest():
        raise CorruptFile("message: the checksum of its arrays does not match; it was damaged on its way")
    return content["record"], arrays


def send_frame(connection: socket.socket, header: bytes, payload: bytes) -> None:
    connection.sendall(_FRAME.pack(_MAGIC, len(header), len(payload)) + header)
    if payload:  # to send nothing fails where the other side has answered and gone already
        connection.sendall(payload)


def receive_frame(connection: socket.socket) -> tuple[bytes, bytes]:
    """Raises CorruptFile for bytes that are no frame, ConnectionError when the other side is gone."""
    magic, header_bytes, payload_bytes = _FRAME.unpack(_receive(connection, _FRAME.size))
    if magic != _MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise CorruptFile("message: expected a frame of this engine")
    return _receive(connection, header_bytes), _receive(connection, payload_bytes)


def _receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; memory grows with what really came."""
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise ConnectionError("the other side closed the connection in the middle of a message")
        data += part
    return bytes(data)


def _arrays(entries: list[Any], payload: bytes) -> Arrays:
    if len(entries) > _MAX_ARRAYS:
        raise CorruptFile(f"message: expected at most {_MAX_ARRAYS} arrays, got {len(entries)}")
    arrays: Arrays = {}
    first = 0
    for entry in entries:
        key, dtype, shape = _entry(entry)
        if key in arrays:
            raise CorruptFile(f"message: {key} comes twice")
        count = 1
        for size in shape:  # Python's whole numbers do not overflow
            count *= size
        num_bytes = count * dtype.itemsize
        if num_bytes > len(payload) - first:
            raise CorruptFile(
                f"message: {key}: its shape needs {num_bytes} bytes, {len(payload) - first} are left; cut short"
            )
        try:
            arrays[key] = np.frombuffer(payload, dtype, count, first).reshape(shape)
        except ValueError as error:  # no bytes, and sizes that multiply to more than an address holds
            raise CorruptFile(f"message: {key}: shape {shape}: {error}") from error
        first += num_bytes
    if first != len(payload):
        raise CorruptFile(f"message: {len(payload) - first} bytes more than its arrays need")
    return arrays


def _entry(entry: Any) -> tuple[str, np.dtype[Any], list[int]]:
    if isinstance(entry, list) and len(entry) == 3:
        key, dtype, shape = entry
        sizes = isinstance(shape, list) and len(shape) <= _MAX_DIMS
        sizes = sizes and all(type(size) is int and 0 <= size < 2**40 for size in shape)
        named = isinstance(key, str) and len(key) <= _MAX_KEY and key.isascii() and key.isprintable()
        if named and isinstance(dtype, str) and dtype in _DTYPES and sizes:
            return key, _DTYPES[dtype], shape
    raise CorruptFile(f"message: expected arrays as [name, dtype, shape], got {entry!r:.100}")
