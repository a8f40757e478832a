"""One safetensors file of a layer store: where its matrices lie, planned for writing and validated for reading.

A quantised matrix `x.weight` lies as `x.weight.codes` and `x.weight.scales`; its format and sizes are in the file's
`__metadata__` under "chainfed". Everything else lies under its own name as F32 or BF16. Every tensor starts at a
multiple of 64 bytes: gaps are tensors named `__pad_N`, so that the safetensors library opens the file.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chainfed_engine.errors import CorruptFile, InvalidArgument
from chainfed_engine.model.header import (
    Header,
    RawTensor,
    build_header,
    open_regular,
    parse_json,
    read_header,
)
from chainfed_engine.model.layout import BlockFormat, is_quantised, matrix_layout, parse_block_format

TENSOR_ALIGNMENT = 64
METADATA_KEY = "chainfed"
_MAX_STORE_HEADER_BYTES = 4_000_000
_FLOAT_FORMATS: dict[str, BlockFormat] = {"F32": "f32", "BF16": "bf16"}


class TensorEntry(NamedTuple):
    """One matrix of a file, as `native.StoreReader` takes it. Offsets in bytes from the start of the file.

    Vectors (norms, biases) have num_rows 1. scales_offset and scales_bytes are 0 where the format has no scales.
    """

    name: str
    block_format: BlockFormat
    num_rows: int
    num_cols: int
    codes_offset: int
    codes_bytes: int
    scales_offset: int
    scales_bytes: int


class MatrixSpec(NamedTuple):
    """A matrix to be laid out: `shape` is [N, K], or [n] for a vector (which must be f32)."""

    name: str
    block_format: BlockFormat
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileLayout:
    """What a writer needs: the first bytes, where each matrix goes, the ranges to leave as zeros, the total size."""

    header: bytes
    entries: tuple[TensorEntry, ...]
    file_bytes: int


def layout_file(matrices: Sequence[MatrixSpec]) -> FileLayout:
    """Place `matrices` one after another. InvalidArgument for repeated names or a shape that is not [N, K] or [n]."""
    tensors: list[tuple[str, str, tuple[int, ...], int]] = []
    places: list[tuple[MatrixSpec, list[tuple[int, int]]]] = []
    quantised: dict[str, list[Any]] = {}
    end = 0
    for spec in matrices:
        ranges = []
        for name, dtype, shape, num_bytes in _arrays_of(spec):
            gap = -end % TENSOR_ALIGNMENT
            if gap:
                tensors.append((f"__pad_{len(tensors)}", "U8", (gap,), gap))
            tensors.append((name, dtype, shape, num_bytes))
            ranges.append((end + gap, num_bytes))
            end += gap + num_bytes
        places.append((spec, ranges))
        if is_quantised(spec.block_format):
            quantised[spec.name] = [spec.block_format, *spec.shape]
    if len({tensor[0] for tensor in tensors}) != len(tensors):
        raise InvalidArgument("two tensors of one file share a name")
    header = build_header(tensors, {"format": "pt", METADATA_KEY: json.dumps(quantised, separators=(",", ":"))})
    entries = tuple(_entry(spec, ranges, len(header)) for spec, ranges in places)
    return FileLayout(header, entries, len(header) + end)


def read_entries(path: Path, file_bytes: int) -> tuple[TensorEntry, ...]:
    """The validated matrices of the store file at `path`, which must have `file_bytes` bytes.

    Raises CorruptFile for a wrong size, a bad header, a dtype, shape or alignment that no store has; StorageError when
    the file cannot be opened.
    """
    descriptor = open_regular(path)
    try:
        actual_bytes = os.fstat(descriptor).st_size
        if actual_bytes != file_bytes:
            raise CorruptFile(f"{path}: {actual_bytes} bytes, store.json says {file_bytes}; convert or copy it again")
        header = read_header(path, descriptor, _MAX_STORE_HEADER_BYTES)
    finally:
        os.close(descriptor)
    return tuple(_validated(header, path))


def _arrays_of(spec: MatrixSpec) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    vector = len(spec.shape) == 1
    if len(spec.shape) not in (1, 2) or (vector and spec.block_format != "f32"):
        raise InvalidArgument(f"{spec.name}: {spec.block_format} of shape {list(spec.shape)} cannot be stored")
    rows, cols = (1, spec.shape[0]) if vector else (spec.shape[0], spec.shape[1])
    layout = matrix_layout(spec.block_format, rows, cols)
    if layout.scales_dtype is None:
        yield spec.name, layout.codes_dtype, spec.shape, layout.codes_bytes
    else:
        yield f"{spec.name}.codes", layout.codes_dtype, layout.codes_shape, layout.codes_bytes
        yield f"{spec.name}.scales", layout.scales_dtype, layout.scales_shape, layout.scales_bytes


def _entry(spec: MatrixSpec, ranges: list[tuple[int, int]], data_offset: int) -> TensorEntry:
    codes_begin, codes_bytes = ranges[0]
    scales_begin, scales_bytes = ranges[1] if len(ranges) == 2 else (-data_offset, 0)
    rows, cols = (1, spec.shape[0]) if len(spec.shape) == 1 else (spec.shape[0], spec.shape[1])
    codes_offset, scales_offset = data_offset + codes_begin, data_offset + scales_begin
    return TensorEntry(spec.name, spec.block_format, rows, cols, codes_offset, codes_bytes, scales_offset, scales_bytes)


def _validated(header: Header, path: Path) -> Iterator[TensorEntry]:
    remaining = {name: tensor for name, tensor in header.tensors.items() if not name.startswith("__pad_")}
    for name, tensor in remaining.items():
        if tensor.offset % TENSOR_ALIGNMENT:
            raise CorruptFile(f"{path}: tensor {name[:200]!r} does not start at a multiple of {TENSOR_ALIGNMENT} bytes")
    sizes = parse_json(header.metadata.get(METADATA_KEY, "").encode(), f"{path}: __metadata__.{METADATA_KEY}")
    if not isinstance(sizes, dict):
        raise CorruptFile(f"{path}: __metadata__.{METADATA_KEY}: expected a JSON object")
    for name, size in sizes.items():
        yield _quantised_entry(name, size, remaining, path)
    for name, tensor in remaining.items():
        block_format = _FLOAT_FORMATS.get(tensor.dtype)
        if block_format is None or len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
            raise CorruptFile(
                f"{path}: tensor {name[:200]!r}: {tensor.dtype[:20]} {tensor.shape} is not part of a store"
            )
        rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
        yield TensorEntry(name, block_format, rows, tensor.shape[-1], tensor.offset, tensor.num_bytes, 0, 0)


def _quantised_entry(name: str, size: Any, remaining: dict[str, RawTensor], path: Path) -> TensorEntry:
    """Takes the codes and scales of matrix `name` out of `remaining`."""
    where = f"{path}: matrix {name[:200]!r}"
    if not isinstance(size, list) or len(size) != 3 or type(size[1]) is not int or type(size[2]) is not int:
        raise CorruptFile(f"{where}: expected [block format, rows, columns] in __metadata__.{METADATA_KEY}")
    try:
        block_format = parse_block_format(size[0])
        layout = matrix_layout(block_format, size[1], size[2])
    except InvalidArgument as error:
        raise CorruptFile(f"{where}: {error}") from error
    codes, scales = remaining.pop(f"{name}.codes", None), remaining.pop(f"{name}.scales", None)
    if codes is None or scales is None or layout.scales_dtype is None or name in remaining:
        raise CorruptFile(f"{where}: expected the tensors {name[:200]}.codes and {name[:200]}.scales and no other")
    found = (codes.dtype, codes.shape, scales.dtype, scales.shape)
    expected = (layout.codes_dtype, layout.codes_shape, layout.scales_dtype, layout.scales_shape)
    if found != expected:
        raise CorruptFile(
            f"{where}: arrays {str(found)[:200]} do not hold {block_format} [{size[1]}, {size[2]}]: {expected}"
        )
    sizes = codes.offset, codes.num_bytes, scales.offset, scales.num_bytes
    return TensorEntry(name, block_format, size[1], size[2], *sizes)
