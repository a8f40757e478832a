"""Aligned arrays and quantised matrices for the native tests."""

import numpy as np
import torch
from numpy.typing import NDArray

from chainfed_engine import native
from chainfed_engine.native import reference

FORMATS = ("int4", "nf4", "int8", "bf16", "f32")


def aligned(shape: tuple[int, ...], dtype: np.typing.DTypeLike, alignment: int = 64, shift: int = 0) -> NDArray:
    """Zeros that start `shift` bytes after a multiple of `alignment`."""
    item = np.dtype(dtype)
    size = int(np.prod(shape)) * item.itemsize
    memory = np.zeros(size + 2 * alignment, np.uint8)
    start = -memory.ctypes.data % alignment + shift
    return memory[start : start + size].view(item).reshape(shape)


def like(array: NDArray) -> NDArray:
    """An aligned copy."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def code_array(block_format: str, rows: int, cols: int) -> NDArray:
    """Room for codes; bf16 matrices need a torch tensor instead, since NumPy has no bfloat16."""
    dtype = np.dtype({"int8": np.int8, "f32": np.float32}.get(block_format, np.uint8))
    return aligned((native.codes_bytes(block_format, rows, cols) // dtype.itemsize,), dtype)


def scale_array(block_format: str, rows: int, cols: int) -> NDArray | None:
    size = native.scales_bytes(block_format, rows, cols)
    dtype = np.dtype(np.float32 if block_format == "nf4" else np.float16)
    return aligned((size // dtype.itemsize,), dtype) if size else None


def quantised(weight: NDArray, block_format: str) -> tuple[native.Matrix, NDArray[np.float64]]:
    """The matrix and its values in float64, decoded by the reference."""
    rows, cols = weight.shape
    codes, scales = code_array(block_format, rows, cols), scale_array(block_format, rows, cols)
    if block_format == "bf16":
        tensor = torch.empty(rows, cols, dtype=torch.bfloat16)
        native.quantize_blocks(weight, block_format="bf16", codes_out=tensor, scales_out=None)
        matrix = native.Matrix.from_arrays(tensor, None, block_format="bf16", num_rows=rows, num_cols=cols)
        codes = tensor.view(torch.uint16).numpy()
    else:
        native.quantize_blocks(weight, block_format=block_format, codes_out=codes, scales_out=scales)
        matrix = native.Matrix.from_arrays(codes, scales, block_format=block_format, num_rows=rows, num_cols=cols)
    values = reference.dequantize(codes, scales, block_format=block_format, num_rows=rows, num_cols=cols)
    return matrix, values


def normal(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
