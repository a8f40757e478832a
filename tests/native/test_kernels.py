"""Quantise, decode and multiply against the float64 oracles, through the facade."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from chainfed_engine import native
from chainfed_engine.errors import CorruptFile, InvalidArgument, UnsupportedHardware
from chainfed_engine.native import reference

sys.path.insert(0, str(Path(__file__).parent))
from arrays import FORMATS, aligned, code_array, normal, quantised, scale_array

# Blocked f32 sums of at most 8192 products; see tests/csrc/gemm_test.cpp for both budgets.
EXACT_BUDGET = 1e-6
INT8_COSINE = 0.9999
SHAPES = [(1, 1, 1), (3, 17, 33), (31, 65, 127), (257, 40, 64), (5, 9, 1100)]


@pytest.fixture(params=native.simd_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_simd_level(request.param)
    yield request.param
    native.set_simd_level(None)


def relative_error(value: np.ndarray, oracle: np.ndarray) -> float:
    return float(np.linalg.norm(value - oracle) / np.linalg.norm(oracle))


def forward(matrix: native.Matrix, x: np.ndarray, bias: np.ndarray | None, activation: str) -> np.ndarray:
    out = np.full((len(x), matrix.num_rows), np.nan, np.float32)
    size = native.linear_forward_workspace_bytes(matrix.block_format, len(x), matrix.num_rows, matrix.num_cols)
    native.linear_forward(matrix, x, bias, activation=activation, out=out, workspace=aligned((size,), np.uint8))
    return out


@pytest.mark.parametrize("block_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_the_reference(level: str, block_format: str, shape: tuple[int, int, int]) -> None:
    tokens, rows, cols = shape
    matrix, weight = quantised(normal(rows, cols), block_format)
    x, grad_out, bias = normal(tokens, cols, 1), normal(tokens, rows, 2), normal(1, rows, 3)[0]
    oracle = reference.linear_forward(weight, x, bias)
    assert relative_error(forward(matrix, x, bias, "f32"), oracle) < EXACT_BUDGET
    out = np.full((tokens, cols), np.nan, np.float32)
    size = native.linear_grad_input_workspace_bytes(block_format, tokens, rows, cols)
    native.linear_grad_input(matrix, grad_out, out=out, workspace=aligned((size,), np.uint8))
    assert relative_error(out, reference.linear_grad_input(weight, grad_out)) < EXACT_BUDGET
    decoded = np.empty((rows, cols), np.float32)
    native.dequantize_rows(matrix, 0, rows, out=decoded)
    assert np.array_equal(decoded, weight.astype(np.float32)) or relative_error(decoded, weight) < 1e-7


@pytest.mark.parametrize("block_format", FORMATS)
def test_int8_activations_keep_the_cosine(level: str, block_format: str) -> None:
    matrix, weight = quantised(normal(96, 1024), block_format)
    x = normal(20, 1024, 1)
    oracle = reference.linear_forward(weight, x, None)
    out = forward(matrix, x, None, "int8").astype(np.float64)
    assert (out * oracle).sum() / np.sqrt((out**2).sum() * (oracle**2).sum()) >= INT8_COSINE


@pytest.mark.parametrize("block_format", FORMATS)
def test_gathered_rows_are_decoded_rows(block_format: str) -> None:
    matrix, weight = quantised(normal(37, 70), block_format)
    ids = np.array([36, 0, 5, 5, 8], np.int64)
    out = np.empty((5, 70), np.float32)
    native.gather_rows(matrix, ids, out=out)
    np.testing.assert_allclose(out, weight[ids], rtol=1e-6, atol=1e-7)
    for bad in (-1, 37):
        with pytest.raises(InvalidArgument, match=r"gather_rows: row_ids must be in 0\.\.36"):
            native.gather_rows(matrix, np.array([bad], np.int64), out=out[:1])


def test_quantisation_error_is_that_of_the_format(level: str) -> None:
    weight = normal(64, 512)
    # Root mean square error of normal weights; int4 with searched scale and offset, nf4 in blocks of 64.
    for block_format, limit in {"int4": 0.072, "nf4": 0.095, "int8": 0.006, "bf16": 0.002, "f32": 0.0}.items():
        assert relative_error(quantised(weight, block_format)[1], weight) <= limit


def test_the_nf4_table_stands_once() -> None:
    np.testing.assert_array_equal(np.float32(native.nf4_table()), reference.NF4_TABLE.astype(np.float32))


def test_nf4_codes_and_absmax_follow_the_definition() -> None:
    weight = normal(16, 192)
    codes, absmax = reference.nf4_codes(weight)
    _, values = quantised(weight, "nf4")
    expected = reference.NF4_TABLE[codes] * absmax.astype(np.float64).repeat(64, axis=1)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_nf4_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    matrix, _ = quantised(weight.numpy(), "nf4")
    ours = torch.empty(32, 256)
    native.dequantize_rows(matrix, 0, 32, out=ours)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("row_bytes", [("repack_q4_1", 20), ("repack_q8_0", 34)])
def test_repacked_gguf_blocks_decode_as_gguf_says(row_bytes: tuple[str, int]) -> None:
    name, block_bytes = row_bytes
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (11, 3, block_bytes), dtype=np.uint8)
    blocks[..., 1] &= 0x3F  # finite scales
    scale = blocks[..., 0:2].copy().view(np.float16).astype(np.float64)
    if name == "repack_q4_1":
        blocks[..., 3] &= 0x3F
        offset = blocks[..., 2:4].copy().view(np.float16).astype(np.float64)
        codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
        block_format, expected = "int4", scale * codes + offset
    else:
        block_format, expected = "int8", scale * blocks[..., 2:].view(np.int8)
    codes_out, scales_out = code_array(block_format, 11, 96), scale_array(block_format, 11, 96)
    stored = {"num_rows": 11, "num_cols": 96, "codes_out": codes_out, "scales_out": scales_out}
    getattr(native, name)(blocks.reshape(11, -1), **stored)
    got = reference.dequantize(codes_out, scales_out, block_format=block_format, num_rows=11, num_cols=96)
    np.testing.assert_array_equal(got, expected.reshape(11, 96))
    blocks[7, 2, 1] = 0x7C
    with pytest.raises(CorruptFile, match="row 7, block 2"):
        getattr(native, name)(blocks.reshape(11, -1), **stored)


def test_weights_that_are_not_finite_are_named() -> None:
    weight = normal(9, 40)
    weight[8, 39] = np.nan
    with pytest.raises(InvalidArgument, match="row 8, column 39"):
        quantised(weight, "int4")


def test_an_unknown_level_or_one_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="SIMD level must be"):
        native.set_simd_level("neon")
    for missing in {"scalar", "avx2", "avx512vnni"} - set(native.simd_levels()):
        with pytest.raises(UnsupportedHardware, match=missing):
            native.set_simd_level(missing)
    assert native.set_simd_level(None) == native.simd_level()


def test_thread_count_is_settable() -> None:
    before = native.num_threads()
    native.set_num_threads(3)
    assert native.num_threads() == 3
    with pytest.raises(InvalidArgument, match="count must be"):
        native.set_num_threads(0)
    native.set_num_threads(before)
