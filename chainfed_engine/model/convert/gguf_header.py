"""The header of a GGUF file, read from hostile bytes: metadata scalars and where each tensor lies.

Read by `pread` with every count and length checked against the file before use. The `gguf` package's own reader maps
the file, believes its counts (a forged array length keeps it busy for ever) and makes an array object a string; here
arrays are walked over, only their lengths are kept. Block sizes come from the `gguf` package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from chainfed_engine.errors import CorruptFile, UnsupportedModel
from chainfed_engine.model.header import pread_exactly

_MAX_ENTRIES = 1 << 20
_MAX_ARRAY = 1 << 24
_MAX_TEXT_BYTES = 16_000_000
_CHUNK_BYTES = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensorInfo:
    """`shape` is [N, K] (or [n]), the reverse of GGUF's order; `offset` from the start of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` holds scalars and text; of an array only its length, under the same key, as `ArrayLength`."""

    metadata: dict[str, Any]
    tensors: list[GgufTensorInfo]


class ArrayLength(int):
    """The number of elements of a metadata array whose contents were not kept."""


def read_gguf_header(path: Path, descriptor: int) -> GgufHeader:
    """Raises CorruptFile for bytes that break the format, UnsupportedModel for versions and types not read here."""
    cursor = _Cursor(path, descriptor)
    if cursor.take(4) != b"GGUF":
        raise CorruptFile(f"{path}: no GGUF file (bad magic)")
    version = cursor.number("I")
    if version not in (2, 3):
        raise UnsupportedModel(f"{path}: GGUF version {version}; expected 2 or 3, little-endian")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    if num_tensors > _MAX_ENTRIES or num_fields > _MAX_ENTRIES:
        raise CorruptFile(
            f"{path}: {num_tensors} tensors and {num_fields} metadata entries; at most {_MAX_ENTRIES} each"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text()
        if key in metadata:
            raise CorruptFile(f"{path}: metadata key {key[:100]!r} is repeated")
        metadata[key] = _value(cursor, cursor.number("I"))
    raw = [_raw_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise CorruptFile(f"{path}: general.alignment {alignment!r:.50} is no power of two")
    data_offset = -(-cursor.position // alignment) * alignment
    return GgufHeader(metadata, _checked_tensors(raw, data_offset, cursor))


class _Cursor:
    """Sequential reads of a file through one small buffer."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor
        self.file_bytes = os.fstat(descriptor).st_size
        self.position = 0
        self._buffer, self._buffer_begin = b"", 0

    def take(self, num_bytes: int) -> bytes:
        self.require(num_bytes)
        begin = self.position - self._buffer_begin
        if not 0 <= begin <= begin + num_bytes <= len(self._buffer):
            length = min(max(num_bytes, _CHUNK_BYTES), self.file_bytes - self.position)
            self._buffer = pread_exactly(self._descriptor, length, self.position, self.path)
            self._buffer_begin, begin = self.position, 0
        self.position += num_bytes
        return self._buffer[begin : begin + num_bytes]

    def require(self, num_bytes: int) -> None:
        if num_bytes > self.file_bytes - self.position:
            raise CorruptFile(
                f"{self.path}: needs {num_bytes} bytes at {self.position} of {self.file_bytes}; truncated?"
            )

    def skip(self, num_bytes: int) -> None:
        self.require(num_bytes)
        self.position += num_bytes

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > _MAX_TEXT_BYTES:
            raise CorruptFile(f"{self.path}: text of {length} bytes at {self.position}; at most {_MAX_TEXT_BYTES}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{self.path}: text at {self.position - length} is not UTF-8") from error


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise CorruptFile(f"{cursor.path}: metadata type {kind} does not exist")
    element, length = cursor.number("I"), cursor.number("Q")
    if length > _MAX_ARRAY:
        raise CorruptFile(f"{cursor.path}: metadata array of {length} elements; at most {_MAX_ARRAY}")
    if element in _SCALARS:
        cursor.skip(length * struct.calcsize(f"<{_SCALARS[element]}"))
    elif element == _STRING:
        for _ in range(length):
            cursor.skip(cursor.number("Q"))
    else:
        raise CorruptFile(f"{cursor.path}: metadata array of type {element}; expected numbers or text")
    return ArrayLength(length)


def _raw_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = cursor.text(), cursor.number("I")
    if not 1 <= num_dims <= 4:
        raise CorruptFile(f"{cursor.path}: tensor {name[:200]!r} has {num_dims} dimensions; expected 1 to 4")
    dims = tuple(cursor.number("Q") for _ in range(num_dims))
    return name, dims[::-1], cursor.number("I"), cursor.number("Q")


def _checked_tensors(
    raw: list[tuple[str, tuple[int, ...], int, int]], data_offset: int, cursor: _Cursor
) -> list[GgufTensorInfo]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors: dict[str, GgufTensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, shape, type_number, relative in raw:
        where = f"{cursor.path}: tensor {name[:200]!r}"
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError as error:
            raise UnsupportedModel(f"{where}: type {type_number} is unknown to this version of gguf") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if name in tensors or 0 in shape or max(shape) > 1 << 40 or shape[-1] % block:
            raise CorruptFile(f"{where}: repeated, or its shape {shape} is not made of blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        offset, num_bytes = data_offset + relative, prod(shape[:-1]) * row_bytes
        if offset + num_bytes > cursor.file_bytes:
            raise CorruptFile(f"{where}: ends at {offset + num_bytes} of {cursor.file_bytes} bytes; truncated?")
        tensors[name] = GgufTensorInfo(name, kind.name, shape, offset, row_bytes)
        ranges.append((offset, offset + num_bytes, name))
    ranges.sort()
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            raise CorruptFile(f"{cursor.path}: tensors {first[:200]!r} and {second[:200]!r} overlap")
    return list(tensors.values())
