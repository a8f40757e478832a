"""What conversion reads from: a `Source` of named tensors whose rows are read a block at a time.

Enters: nothing (abstract). Leaves: f32 rows, or codes and scales in a block format. A tensor never lies in memory
whole; a block is `BLOCK_BYTES` of f32 at most (or 8 rows).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainfed_engine.errors import CorruptFile
from chainfed_engine.model.layout import TILE_ROWS, BlockFormat, matrix_layout

BLOCK_BYTES = 4 << 20
F32Array = NDArray[np.float32]
AnyArray = NDArray[Any]
_DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "BF16": np.uint16, "F32": np.float32}


class SourceTensor(ABC):
    """A tensor of shape [N, K] or [n] in a checkpoint. A vector counts as one row."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def num_cols(self) -> int:
        return self.shape[-1]

    @abstractmethod
    def check(self) -> None:
        """UnsupportedModel when the dtype or number of dimensions cannot be read. Called for tensors in use only."""

    @abstractmethod
    def read_rows(self, begin: int, end: int) -> F32Array:
        """Rows [begin, end) as f32 [end - begin, K], freshly allocated."""

    def encode(self, begin: int, end: int, block_format: BlockFormat) -> tuple[AnyArray, AnyArray | None]:
        """Codes and scales of rows [begin, end), shaped as `matrix_layout` says. begin must be a multiple of 8."""
        return encode_rows(self.read_rows(begin, end), block_format, self.name, begin)


@dataclass
class Source:
    """A checkpoint. `label` goes into store.json; `identity` tells whether an interrupted conversion may be resumed.

    `write_tokenizer` writes tokenizer files into a folder and returns the reason if it could not.
    """

    label: str
    identity: str
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    write_tokenizer: Callable[[Path], str | None]
    pooling: str | None = None
    close: Callable[[], None] = field(default=lambda: None)


def rows_per_block(num_cols: int) -> int:
    """Rows of f32 that fill `BLOCK_BYTES`, as a multiple of 8 and at least 8."""
    return max(1, BLOCK_BYTES // (4 * TILE_ROWS * num_cols)) * TILE_ROWS


def allocate(block_format: BlockFormat, num_rows: int, num_cols: int) -> tuple[AnyArray, AnyArray | None]:
    """Uninitialised codes and scales for exactly these rows; bf16 codes are the upper halves as u16."""
    layout = matrix_layout(block_format, num_rows, num_cols)
    codes = np.empty(layout.codes_shape, _DTYPES[layout.codes_dtype])
    scales = np.empty(layout.scales_shape, _DTYPES[layout.scales_dtype]) if layout.scales_dtype else None
    return codes, scales


def encode_rows(
    rows: F32Array, block_format: BlockFormat, name: str, first_row: int
) -> tuple[AnyArray, AnyArray | None]:
    """Codes and scales of f32 rows [n, K]. Raises CorruptFile naming tensor, row and column of a NaN or infinity."""
    check_finite(rows, name, first_row)
    if block_format == "f32":
        return rows, None
    if block_format == "bf16":
        codes = to_bf16(rows)
        check_finite(bf16_to_f32(codes), f"{name} (as bf16)", first_row)
        return codes, None
    from chainfed_engine import native

    codes, scales = allocate(block_format, *rows.shape)
    native.quantize_blocks(np.ascontiguousarray(rows), block_format=block_format, codes_out=codes, scales_out=scales)
    return codes, scales


def check_finite(rows: AnyArray, name: str, first_row: int) -> None:
    finite = np.isfinite(rows)
    if not finite.all():
        row, col = np.argwhere(~finite)[0]
        raise CorruptFile(f"{name}: {rows[row, col]} at row {first_row + row}, column {col}; the checkpoint is damaged")


def bf16_to_f32(halves: NDArray[np.uint16]) -> F32Array:
    """u16 upper halves -> f32, exactly."""
    wide = halves.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def to_bf16(rows: F32Array) -> NDArray[np.uint16]:
    """Finite f32 -> u16 upper halves, rounded to nearest, ties to even."""
    bits = rows.view(np.uint32)
    rounding = (bits >> 16) & 1
    rounding += np.uint32(0x7FFF)
    rounding += bits
    return (rounding >> 16).astype(np.uint16)
