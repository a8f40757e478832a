"""Sizes of a matrix [num_rows N, num_cols K] in each block format, in NumPy terms. No bytes are touched here.

The same arithmetic as `csrc/include/chainfed/block_format.h` (a test holds the two together), so that a store can be
planned, written and validated without the compiled core. The file holds codes and, for quantised formats, scales;
both are written as the arrays of tiles that the header file describes.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from chainfed_engine.errors import InvalidArgument

BlockFormat = Literal["int4", "nf4", "int8", "bf16", "f32"]
BLOCK_FORMATS: tuple[BlockFormat, ...] = get_args(BlockFormat)
TILE_ROWS = 8  # a run of 8 rows is contiguous in the quantised formats, so a matrix is converted in multiples of 8
TILE_COLS = 32
NF4_BLOCK_COLS = 64
DTYPE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}  # the safetensors dtypes a store uses
MAX_DIMENSION = 1 << 40  # keeps every product of two within what Python, NumPy and int64 hold exactly


@dataclass(frozen=True)
class MatrixLayout:
    """Shapes and safetensors dtypes of the two arrays of one matrix; scales are None for bf16 and f32."""

    codes_dtype: str
    codes_shape: tuple[int, ...]
    scales_dtype: str | None = None
    scales_shape: tuple[int, ...] = ()

    @property
    def codes_bytes(self) -> int:
        return prod(self.codes_shape) * DTYPE_BYTES[self.codes_dtype]

    @property
    def scales_bytes(self) -> int:
        return prod(self.scales_shape) * DTYPE_BYTES[self.scales_dtype] if self.scales_dtype else 0


def parse_block_format(name: object) -> BlockFormat:
    """`name` as a BlockFormat; InvalidArgument naming the five otherwise."""
    for block_format in BLOCK_FORMATS:
        if name == block_format:
            return block_format
    raise InvalidArgument(f"block format {name!r}: expected one of {', '.join(BLOCK_FORMATS)}")


def is_quantised(block_format: BlockFormat) -> bool:
    return block_format in ("int4", "nf4", "int8")


def matrix_layout(block_format: BlockFormat, num_rows: int, num_cols: int) -> MatrixLayout:
    """Layout of a matrix [num_rows, num_cols]; InvalidArgument when a dimension is not in 1 .. 2**40."""
    if not (1 <= num_rows <= MAX_DIMENSION and 1 <= num_cols <= MAX_DIMENSION):
        raise InvalidArgument(f"matrix [{num_rows}, {num_cols}]: both dimensions must be in 1 .. 2**40")
    if block_format == "bf16":
        return MatrixLayout("BF16", (num_rows, num_cols))
    if block_format == "f32":
        return MatrixLayout("F32", (num_rows, num_cols))
    padded_cols = _round_up(num_cols, NF4_BLOCK_COLS if block_format == "nf4" else TILE_COLS)
    tiles = (_round_up(num_rows, TILE_ROWS) // TILE_ROWS, padded_cols // TILE_COLS)
    if block_format == "int4":
        return MatrixLayout("U8", (*tiles, 128), "F16", (*tiles, 2 * TILE_ROWS))
    if block_format == "nf4":
        return MatrixLayout("U8", (*tiles, 128), "F32", (tiles[0], padded_cols // NF4_BLOCK_COLS, TILE_ROWS))
    return MatrixLayout("I8", (*tiles, 256), "F16", (*tiles, TILE_ROWS))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
