"""The header of a safetensors file, read from hostile bytes and written.

Reading: the first 8 bytes give the length of a JSON object; every tensor's dtype, shape and byte range are checked
against each other and against the file's size before anyone may seek there. Nothing else of the file is read. Writing:
the header is padded with spaces so that data starts at a multiple of 4096 bytes.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from chainfed_engine.errors import CorruptFile, StorageError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DATA_ALIGNMENT = 4096
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64}


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a file: `offset` in bytes from the start of the file, row-major little-endian data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, RawTensor]  # in the order of their offsets
    metadata: dict[str, str]
    data_offset: int


def open_regular(path: Path) -> int:
    """A read-only descriptor. StorageError when missing, unreadable, or no regular file (a pipe would block)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"{path}: expected a regular file")
    return descriptor


def pread_exactly(descriptor: int, num_bytes: int, offset: int, path: Path) -> bytes:
    """`num_bytes` bytes from `offset`; CorruptFile when the file ends before."""
    parts: list[bytes] = []
    missing = num_bytes
    while missing:
        try:
            part = os.pread(descriptor, missing, offset + num_bytes - missing)
        except OSError as error:
            raise StorageError(f"{path}: read failed: {error.strerror}") from error
        if not part:
            raise CorruptFile(f"{path}: ends {missing} bytes before offset {offset + num_bytes}; copy it again")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def pread_once(descriptor: int, num_bytes: int, offset: int, path: Path) -> bytes:
    """The same for bytes that nobody reads again: they leave the page cache, with all before them in the file. That is
    because the kernel keeps pages in units of up to 2 MiB, and gives back only those that a range covers whole. Reading
    ahead is off: its pages would stay."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    raw = pread_exactly(descriptor, num_bytes, offset, path)
    os.posix_fadvise(descriptor, 0, offset + num_bytes, os.POSIX_FADV_DONTNEED)
    return raw


def parse_json(raw: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no repeated keys, no NaN, bounded nesting. CorruptFile naming `what` otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{what}: not valid JSON: {str(error)[:200]}") from error


def read_header(path: Path, descriptor: int, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The validated header of an open safetensors file. Raises CorruptFile naming the tensor that breaks a rule."""
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < 8:
        raise CorruptFile(f"{path}: {file_bytes} bytes, too short for a safetensors file")
    header_bytes = int.from_bytes(pread_exactly(descriptor, 8, 0, path), "little")
    if header_bytes > min(max_header_bytes, file_bytes - 8):
        raise CorruptFile(
            f"{path}: header of {header_bytes} bytes in a file of {file_bytes} (limit {max_header_bytes})"
        )
    content = parse_json(pread_exactly(descriptor, header_bytes, 8, path), f"{path}: header")
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: header: expected a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{path}: __metadata__: expected a map from text to text")
    data_offset = 8 + header_bytes
    tensors = [_tensor(name, entry, data_offset, file_bytes, path) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    _check_coverage(tensors, data_offset, file_bytes, path)
    return Header({tensor.name: tensor for tensor in tensors}, metadata, data_offset)


def build_header(tensors: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The length and the padded JSON. tensors: (name, dtype, shape, number of bytes) in file order, without gaps."""
    content: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, dtype, shape, num_bytes in tensors:
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + num_bytes]}
        begin += num_bytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    total = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8, b" ")


def _tensor(name: str, entry: Any, data_offset: int, file_bytes: int, path: Path) -> RawTensor:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CorruptFile(f"{where}: dtype is not text")
    if not _are_sizes(shape) or len(shape) > 16 or not _are_sizes(offsets) or len(offsets) != 2:
        raise CorruptFile(f"{where}: shape and data_offsets must be lists of integers in 0 .. 2**48")
    begin, end = offsets
    if not begin <= end <= file_bytes - data_offset:
        raise CorruptFile(f"{where}: bytes {begin}..{end} lie outside the data ({file_bytes - data_offset} bytes)")
    if dtype in _BITS and prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise CorruptFile(f"{where}: {dtype} {shape} does not fill {end - begin} bytes")
    return RawTensor(name, dtype, tuple(shape), data_offset + begin, end - begin)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 1 << 48 for value in values)


def _check_coverage(tensors: list[RawTensor], data_offset: int, file_bytes: int, path: Path) -> None:
    """Tensors must follow one another without overlap or hole up to the end, as the safetensors library demands."""
    end = data_offset
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CorruptFile(f"{path}: tensor {tensor.name[:200]!r} {problem}")
        end = tensor.offset + tensor.num_bytes
    if end != file_bytes:
        raise CorruptFile(
            f"{path}: {file_bytes} bytes, but its header describes {end}; the file is truncated or extended"
        )
