"""A layer store read back as a checkpoint: the inverse of conversion, for exports that have no better source.

Enters: a `StoreInfo`. Leaves: a `Source` as conversion reads it, with the checkpoint's names; rows are decoded a block
at a time, so that no matrix lies in memory whole. Quantised weights come back as what the engine trained with, not as
what the original checkpoint holds.
"""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from chainfed_engine import native
from chainfed_engine.errors import CorruptFile
from chainfed_engine.model.convert.expected import checkpoint_shapes
from chainfed_engine.model.convert.source import AnyArray, F32Array, Source, SourceTensor, bf16_to_f32
from chainfed_engine.model.families import Location, name_table
from chainfed_engine.model.families.names import name_in
from chainfed_engine.model.format import FileInfo, StoreInfo
from chainfed_engine.model.header import open_regular, pread_once
from chainfed_engine.model.layout import MatrixLayout, is_quantised, matrix_layout
from chainfed_engine.model.store_file import TensorEntry

_DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}
Part = tuple[Path, TensorEntry]  # a run of rows in one file


class StoreTensor(SourceTensor):
    """Rows that lie in `parts`, one after another; every part but the last has a multiple of 8 rows."""

    def __init__(self, name: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
        self.name, self.shape, self._parts = name, shape, parts
        if sum(entry.num_rows for _, entry in parts) != self.num_rows or parts[0][1].num_cols != self.num_cols:
            raise CorruptFile(f"{parts[0][0]}: {name}: expected {list(shape)} from the config; convert the model again")

    def check(self) -> None:
        """The formats of a store can all be read."""

    def read_rows(self, begin: int, end: int) -> F32Array:
        """Rows [begin, end); `begin` must be a multiple of 8."""
        blocks, first = [], 0
        for path, entry in self._parts:
            low, high = max(begin - first, 0), min(end - first, entry.num_rows)
            if low < high:
                blocks.append(_decode(path, entry, low, high))
            first += entry.num_rows
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def open_store(info: StoreInfo) -> Source:
    """The store as a checkpoint. Raises CorruptFile where it does not hold what its config promises."""
    table = name_table(info.architecture)
    expected = checkpoint_shapes(info.config)
    tensors: dict[str, SourceTensor] = {}

    def add(at: Location, parts: Sequence[Part]) -> None:
        name = name_in(table, at)
        entry = parts[0][1]
        matrix = (sum(part.num_rows for _, part in parts), entry.num_cols)
        # The index does not tell a vector from a matrix of one row.
        shape = expected.get(name) or (matrix if name.endswith("weight") else (entry.num_cols,))
        tensors[name] = StoreTensor(name, shape, parts)

    for entry in info.embedding.tensors:
        add(Location("embedding", None, entry.name), [(info.embedding.path, entry)])
    for index, file in enumerate(info.layers):
        for entry in file.tensors:
            add(Location("layer", index, entry.name), [(file.path, entry)])
    if info.head_shards:
        words = Location("embedding", None, "word_embeddings.weight")
        add(
            words if info.tied else Location("head", None, "head.weight"),
            [_head_part(file) for file in info.head_shards],
        )
    return Source(
        label=info.source,
        identity=info.fingerprint,
        config=dict(info.config),
        tensors=tensors,
        write_tokenizer=partial(_copy_tokenizer, info),
        pooling=info.pooling,
    )


def _head_part(file: FileInfo) -> Part:
    entry = file.tensor("head.weight")
    if entry is None:
        raise CorruptFile(f"{file.path}: no head.weight; convert the model again")
    return file.path, entry


def _decode(path: Path, entry: TensorEntry, begin: int, end: int) -> F32Array:
    """Rows [begin, end) of one matrix as f32: whole tiles of 8 rows are read and decoded."""
    layout = matrix_layout(entry.block_format, end - begin, entry.num_cols)
    before = matrix_layout(entry.block_format, begin, entry.num_cols) if begin else MatrixLayout("U8", (0,))
    descriptor = open_regular(path)
    try:
        raw = pread_once(descriptor, layout.codes_bytes, entry.codes_offset + before.codes_bytes, path)
        if not is_quantised(entry.block_format):
            dtype = np.uint16 if entry.block_format == "bf16" else np.float32
            rows: AnyArray = np.frombuffer(raw, dtype).reshape(end - begin, entry.num_cols)
            return bf16_to_f32(rows) if entry.block_format == "bf16" else rows.copy()
        scales_raw = pread_once(descriptor, layout.scales_bytes, entry.scales_offset + before.scales_bytes, path)
    finally:
        os.close(descriptor)
    codes = _aligned(raw, layout.codes_dtype, layout.codes_shape)
    scales = _aligned(scales_raw, str(layout.scales_dtype), layout.scales_shape)
    matrix = native.Matrix.from_arrays(
        codes, scales, block_format=entry.block_format, num_rows=end - begin, num_cols=entry.num_cols
    )
    out = np.empty((end - begin, entry.num_cols), np.float32)
    native.dequantize_rows(matrix, 0, end - begin, out=out)
    return out


def _aligned(raw: bytes, dtype: str, shape: tuple[int, ...]) -> AnyArray:
    """The bytes as an array that starts at a multiple of 64, as the core asks of codes."""
    room = np.empty(len(raw) + 63, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + len(raw)] = np.frombuffer(raw, np.uint8)
    return room[start : start + len(raw)].view(_DTYPES[dtype]).reshape(shape)


def _copy_tokenizer(info: StoreInfo, destination: Path) -> str | None:
    if info.tokenizer_path is None:
        return "the store has none"
    for file in info.tokenizer_files:
        shutil.copyfile(info.tokenizer_path / file.name, destination / file.name)
    return None
