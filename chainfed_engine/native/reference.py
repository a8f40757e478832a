"""Float64 NumPy oracles of the kernels: decode tiles by the layout text of csrc/include/chainfed/block_format.h, then
multiply. Slow on purpose and independent of the compiled core; tests and `chainfed doctor` compare against it.

Arrays: codes and scales as stored (any shape with the right number of elements), weights [num_rows, num_cols] float64.
"""

import numpy as np
from numpy.typing import NDArray

TILE_ROWS = 8
TILE_COLS = 32
NF4_BLOCK_COLS = 64

Float64 = NDArray[np.float64]

# Quantiles of a normal distribution scaled to [-1, 1] with an exact zero (QLoRA, appendix E); tests compare this with
# the core's table.
NF4_TABLE: Float64 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _rows_from_tiles(tiles: NDArray[np.generic]) -> NDArray[np.generic]:
    """[row tiles, column tiles, 8, 32] to [rows, columns]."""
    row_tiles, col_tiles = tiles.shape[:2]
    return tiles.transpose(0, 2, 1, 3).reshape(row_tiles * TILE_ROWS, col_tiles * TILE_COLS)


def _nibble_tiles(codes: NDArray[np.generic], row_tiles: int, col_tiles: int) -> NDArray[np.generic]:
    """Bytes [j, row, i] hold column 4j + i in the low nibble and 16 + 4j + i in the high one."""
    data = np.asarray(codes, dtype=np.uint8).reshape(row_tiles, col_tiles, 4, TILE_ROWS, 4)
    data = data.transpose(0, 1, 3, 2, 4).reshape(row_tiles, col_tiles, TILE_ROWS, 16)
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _decode_int4(codes: NDArray[np.generic], scales: NDArray[np.generic], row_tiles: int, cols: int) -> Float64:
    col_tiles = _round_up(cols, TILE_COLS) // TILE_COLS
    q = _nibble_tiles(codes, row_tiles, col_tiles).astype(np.float64)
    pairs = np.asarray(scales, dtype=np.float64).reshape(row_tiles, col_tiles, 2, TILE_ROWS, 1)
    return np.asarray(_rows_from_tiles(pairs[:, :, 0] * q + pairs[:, :, 1]), dtype=np.float64)


def _decode_nf4(codes: NDArray[np.generic], scales: NDArray[np.generic], row_tiles: int, cols: int) -> Float64:
    col_tiles = _round_up(cols, NF4_BLOCK_COLS) // TILE_COLS
    q = _nibble_tiles(codes, row_tiles, col_tiles)
    absmax = np.asarray(scales, dtype=np.float64).reshape(row_tiles, col_tiles // 2, TILE_ROWS, 1).repeat(2, axis=1)
    return np.asarray(_rows_from_tiles(absmax * NF4_TABLE[q.astype(np.intp)]), dtype=np.float64)


def _decode_int8(codes: NDArray[np.generic], scales: NDArray[np.generic], row_tiles: int, cols: int) -> Float64:
    col_tiles = _round_up(cols, TILE_COLS) // TILE_COLS
    q = np.asarray(codes).reshape(-1).view(np.int8).reshape(row_tiles, col_tiles, 8, TILE_ROWS, 4)
    q = q.transpose(0, 1, 3, 2, 4).reshape(row_tiles, col_tiles, TILE_ROWS, TILE_COLS)
    d = np.asarray(scales, dtype=np.float64).reshape(row_tiles, col_tiles, TILE_ROWS, 1)
    return np.asarray(_rows_from_tiles(d * q), dtype=np.float64)


def dequantize(
    codes: NDArray[np.generic], scales: NDArray[np.generic] | None, *, block_format: str, num_rows: int, num_cols: int
) -> Float64:
    """The matrix [num_rows, num_cols] in float64. bf16 codes are given as their uint16 bits."""
    if block_format == "f32":
        return np.asarray(codes, dtype=np.float64).reshape(num_rows, num_cols)
    if block_format == "bf16":
        bits = np.asarray(codes).reshape(-1).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(num_rows, num_cols)
    if scales is None:
        raise ValueError(f"{block_format} needs scales")
    decode = {"int4": _decode_int4, "nf4": _decode_nf4, "int8": _decode_int8}[block_format]
    row_tiles = _round_up(num_rows, TILE_ROWS) // TILE_ROWS
    return decode(codes, scales, row_tiles, num_cols)[:num_rows, :num_cols]


def linear_forward(weight: Float64, x: NDArray[np.generic], bias: NDArray[np.generic] | None) -> Float64:
    """x [M, K] times weight [N, K] transposed, plus bias [N]: [M, N]."""
    out = np.asarray(x, dtype=np.float64) @ weight.T
    return np.asarray(out if bias is None else out + np.asarray(bias, dtype=np.float64), dtype=np.float64)


def linear_grad_input(weight: Float64, grad_out: NDArray[np.generic]) -> Float64:
    """grad_out [M, N] times weight [N, K]: [M, K]."""
    return np.asarray(np.asarray(grad_out, dtype=np.float64) @ weight, dtype=np.float64)


def nf4_codes(weight: NDArray[np.floating]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """NF4 by definition: absmax of each 64 inputs, nearest table entry of w / absmax. weight [N, K], K % 64 == 0.

    Returns codes [N, K] and absmax [N, K / 64]. A block of zeros gets the code of the table's zero.
    """
    blocks = np.asarray(weight, dtype=np.float32).reshape(weight.shape[0], -1, NF4_BLOCK_COLS)
    absmax = np.abs(blocks).max(axis=-1)
    inverse = np.where(absmax > 0, np.float32(1) / np.where(absmax > 0, absmax, np.float32(1)), np.float32(0))
    scaled = np.clip(blocks * inverse[..., None].astype(np.float32), -1, 1)
    distance = np.abs(scaled[..., None].astype(np.float64) - NF4_TABLE)
    codes = distance.argmin(axis=-1).astype(np.uint8).reshape(weight.shape)
    return codes, absmax
