"""The border of the CUDA backend through the emulated library: where a call runs, what is refused and in which words,
streams, workspaces, matrices in leases, and the kernels' results as Python gets them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument, UnsupportedHardware
from chainfed_engine.native import reference

sys.path.insert(0, str(Path(__file__).parent))
from arrays import aligned, code_array, normal, quantised, scale_array
from fake_cuda import EMULATOR, NEEDS_EMULATOR, CudaArray, empty, on_device

TOKENS, ROWS, COLS = 5, 24, 70


@pytest.fixture
def emulator() -> Iterator[None]:
    if EMULATOR is None:
        pytest.skip(NEEDS_EMULATOR)
    native.set_cuda_library(str(EMULATOR))
    yield
    native.set_cuda_library(None)


class Weights:
    """A quantised matrix on a fake device, and its float64 values."""

    def __init__(self, block_format: str, device: int = 0, rows: int = ROWS) -> None:
        weight = normal(rows, COLS)
        codes, scales = code_array(block_format, rows, COLS), scale_array(block_format, rows, COLS)
        native.quantize_blocks(weight, block_format=block_format, codes_out=codes, scales_out=scales)
        self.codes, self.scales = on_device(codes, device), on_device(scales, device)
        self.matrix = native.Matrix.from_arrays(
            self.codes, self.scales, block_format=block_format, num_rows=rows, num_cols=COLS
        )
        self.values = reference.dequantize(codes, scales, block_format=block_format, num_rows=rows, num_cols=COLS)


def forward(weights: Weights, x: Any, activation: str = "int8", **changes: Any) -> np.ndarray:
    size = native.linear_forward_workspace_bytes(weights.matrix.block_format, TOKENS, ROWS, COLS, device=0)
    arguments = {
        "out": empty((TOKENS, ROWS), np.float32),
        "workspace": empty((size,), np.uint8),
        "stream": 7,
        **changes,
    }
    native.linear_forward(weights.matrix, x, None, activation=activation, **arguments)
    return np.asarray(arguments["out"].values)


def error(value: np.ndarray, oracle: np.ndarray) -> float:
    return float(np.linalg.norm(value - oracle) / np.linalg.norm(oracle))


@pytest.mark.parametrize("block_format", ["int4", "nf4", "int8"])
def test_a_linear_runs_where_its_arrays_are(emulator: None, block_format: str) -> None:
    weights, x = Weights(block_format), on_device(normal(TOKENS, COLS, 1))
    assert weights.matrix.device == "cuda:0"
    oracle = reference.linear_forward(weights.values, x.values, None)
    assert error(forward(weights, x, "f32"), oracle) < 1e-6
    assert 1e-6 < error(forward(weights, x, "int8"), oracle) < 1e-3
    assert x.asked_stream == -1  # the exporter must not wait
    grad, out = on_device(normal(TOKENS, ROWS, 2)), empty((TOKENS, COLS), np.float32)
    size = native.linear_grad_input_workspace_bytes(block_format, TOKENS, ROWS, COLS, device=0)
    for activation, budget in (("f32", 1e-6), ("int8", 1e-3)):
        native.linear_grad_input(
            weights.matrix, grad, activation=activation, out=out, workspace=empty((size,), np.uint8), stream=7
        )
        assert error(out.values, reference.linear_grad_input(weights.values, grad.values)) < budget


def test_the_head_and_the_boundary_run_on_the_device(emulator: None) -> None:
    weights, hidden = Weights("int4"), on_device(normal(TOKENS, COLS, 1))
    per_token = {name: empty((TOKENS,), np.float32) for name in ("running_max", "running_sum", "target_logit")}
    per_token["running_max"].values[:] = -np.inf
    grads = {name: empty((TOKENS, COLS), np.float32) for name in ("grad", "target_row")}
    targets, loss = on_device(np.arange(TOKENS)), empty((TOKENS,), np.float32)
    size = native.cross_entropy_workspace_bytes("int4", TOKENS, ROWS, COLS, device=0)
    native.cross_entropy_update(
        weights.matrix, 0, hidden, targets, activation="f32", **per_token, **grads, workspace=empty((size,), np.uint8),
        stream=7,
    )  # fmt: skip
    native.cross_entropy_finish(**per_token, token_weight=None, loss_out=loss, **grads, stream=7)
    logits = hidden.values.astype(np.float64) @ weights.values.T
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(TOKENS), np.arange(TOKENS)]
    np.testing.assert_allclose(loss.values, expected, rtol=1e-5)

    records = empty((TOKENS, native.record_bytes("int8", COLS)), np.uint8)
    native.boundary_encode(hidden, adapter=None, cache_format="int8", out=records, stream=7)
    on_cpu = np.zeros_like(records.values)
    native.boundary_encode(hidden.values, adapter=None, cache_format="int8", out=on_cpu)
    np.testing.assert_array_equal(records.values, on_cpu)
    rows, out = on_device(np.array([4, 0, 99, -1, 2])), empty((TOKENS, COLS), np.float32)
    native.boundary_decode(records, rows, cache_format="int8", out=out, stream=7)
    assert out.values[[4, 0, 2]].any(axis=1).all()
    assert not out.values[[1, 3]].any()  # rows outside are passed over


def test_a_pinned_host_array_counts_as_the_cpus() -> None:
    class Pinned(CudaArray):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 3, 0

    array = Pinned(aligned((ROWS, COLS), np.float32))
    array._managed.tensor.device_type = 3
    matrix, values = quantised(normal(ROWS, COLS), "int8")
    native.dequantize_rows(matrix, 0, ROWS, out=array)
    np.testing.assert_allclose(array.values, values, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out": aligned((TOKENS, ROWS), np.float32)}, "out must be on cuda:0 as matrix is, got an array on the CPU"),
        ({"workspace": aligned((1 << 16,), np.uint8)}, "workspace must be on cuda:0 as matrix is"),
        ({"out": empty((TOKENS, ROWS), np.float32, 1)}, "out must be on cuda:0 as matrix is, got an array on cuda:1"),
        ({"out": empty((TOKENS, ROWS - 1), np.float32)}, r"out must be float32 \[5, 24\], C-contiguous on cuda:0, got"),
        ({"workspace": empty((8,), np.uint8)}, "workspace must be uint8"),
    ],
)
def test_arrays_elsewhere_are_refused_by_name(emulator: None, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"linear_forward: {words}"):
        forward(Weights("int4"), on_device(normal(TOKENS, COLS, 1)), **change)


def test_an_input_on_the_cpu_is_refused_by_name(emulator: None) -> None:
    with pytest.raises(InvalidArgument, match="x must be on cuda:0 as matrix is, got an array on the CPU"):
        forward(Weights("int4"), normal(TOKENS, COLS, 1))
    matrix, _ = quantised(normal(ROWS, COLS), "int4")
    with pytest.raises(InvalidArgument, match="x must be on the CPU as matrix is, got an array on cuda:0"):
        native.linear_forward(
            matrix, on_device(normal(TOKENS, COLS)), None, activation="f32", out=aligned((TOKENS, ROWS), np.float32),
            workspace=aligned((1 << 20,), np.uint8),
        )  # fmt: skip


def test_calls_of_the_cpu_alone_refuse_the_device(emulator: None) -> None:
    weights = Weights("int4")
    with pytest.raises(
        InvalidArgument, match="dequantize_rows: matrix must be C-contiguous on the CPU, got an array on"
    ):
        native.dequantize_rows(weights.matrix, 0, ROWS, out=aligned((ROWS, COLS), np.float32))
    with pytest.raises(InvalidArgument, match=r"quantize_blocks: weight must be .* on the CPU, got an array on cuda:0"):
        native.quantize_blocks(
            on_device(normal(ROWS, COLS)), block_format="int4", codes_out=code_array("int4", ROWS, COLS),
            scales_out=scale_array("int4", ROWS, COLS),
        )  # fmt: skip


def test_a_stream_belongs_to_a_device() -> None:
    matrix, _ = quantised(normal(ROWS, COLS), "int4")
    size = native.linear_forward_workspace_bytes("int4", TOKENS, ROWS, COLS)
    with pytest.raises(InvalidArgument, match="stream must be 0 for arrays on the CPU"):
        native.linear_forward(
            matrix, normal(TOKENS, COLS), None, activation="f32", out=aligned((TOKENS, ROWS), np.float32),
            workspace=aligned((size,), np.uint8), stream=7,
        )  # fmt: skip


def test_a_device_that_is_not_there_is_named(emulator: None) -> None:
    weights = Weights("int4", device=2)
    with pytest.raises(InvalidArgument, match="cuda:2 is no device of this machine, which has 2"):
        forward(
            weights, on_device(normal(TOKENS, COLS), 2), out=empty((TOKENS, ROWS), np.float32, 2),
            workspace=empty((1 << 16,), np.uint8, 2),
        )  # fmt: skip
    with pytest.raises(InvalidArgument, match="cuda:5 is no device"):
        native.cuda_device(5)
    with pytest.raises(InvalidArgument, match="device must be None or the number of a CUDA device"):
        native.linear_forward_workspace_bytes("int4", 1, 8, 8, device=-1)


def test_devices_are_described(emulator: None) -> None:
    assert native.cuda_is_built()
    assert native.num_cuda_devices() == 2
    assert native.cuda_architectures() == "80,87,89,90"
    discrete, board = native.cuda_device(0), native.cuda_device(1)
    assert (discrete["is_unified"], board["is_unified"]) == (False, True)
    assert board["architecture"] == 87
    assert board["library_from_tokens"] is None
    native.set_library_from_tokens(0, 64)
    assert native.cuda_device(0)["library_from_tokens"] == 64
    native.set_library_from_tokens(0, None)
    with pytest.raises(InvalidArgument, match="at least 1"):
        native.set_library_from_tokens(0, 0)


def test_without_the_library_the_error_says_how_to_build_it(tmp_path: Path) -> None:
    native.set_cuda_library(str(tmp_path / "missing.so"))
    try:
        assert not native.cuda_is_built()
        with pytest.raises(UnsupportedHardware, match=r"CUDA is not part of this build.*CHAINFED_CUDA=1"):
            native.num_cuda_devices()
        with pytest.raises(UnsupportedHardware, match="CUDA is not part of this build"):
            forward(Weights("int4"), on_device(normal(TOKENS, COLS, 1)))
    finally:
        native.set_cuda_library(None)


def lease_of(tmp_path: Path, **options: Any) -> tuple[native.StoreReader, np.ndarray, np.ndarray]:
    """A reader over one file that holds an int4 matrix, its values, and the file's bytes."""
    weight = normal(ROWS, COLS)
    codes, scales = code_array("int4", ROWS, COLS), scale_array("int4", ROWS, COLS)
    assert scales is not None
    native.quantize_blocks(weight, block_format="int4", codes_out=codes, scales_out=scales)
    at = 4096 + codes.nbytes + (-codes.nbytes) % 64
    content = np.zeros(at + scales.nbytes, np.uint8)
    content[4096 : 4096 + codes.nbytes], content[at:] = codes, scales.view(np.uint8)
    path = tmp_path / "layer"
    content.tofile(path)
    tensor = ("w", "int4", ROWS, COLS, 4096, codes.nbytes, at, scales.nbytes)
    reader = native.StoreReader([(str(path), content.nbytes, [tensor])], num_slots=1, direct=False, **options)
    return reader, reference.dequantize(codes, scales, block_format="int4", num_rows=ROWS, num_cols=COLS), content


def test_a_leased_file_is_copied_and_read_on_the_device(emulator: None, tmp_path: Path) -> None:
    reader, values, content = lease_of(tmp_path, pinned_for=0)
    slot = empty((reader.slot_bytes(),), np.uint8)
    with reader.acquire(0) as lease:
        assert lease.file_bytes == content.nbytes
        lease.copy_to(slot, stream=3)
        matrix = lease.matrix_in("w", slot)
        with pytest.raises(InvalidArgument, match="slot must be on a CUDA device"):
            lease.copy_to(aligned((1 << 16,), np.uint8), stream=0)
        for wrong in (empty((64,), np.uint8), empty((1 << 16,), np.int8), empty((1 << 8, 1 << 8), np.uint8)):
            with pytest.raises(InvalidArgument, match=r"Lease\.copy_to: slot must be uint8"):
                lease.copy_to(wrong, stream=0)
            with pytest.raises(InvalidArgument, match=r"Lease\.matrix_in: slot must be uint8"):
                lease.matrix_in("w", wrong)
        with pytest.raises(InvalidArgument, match="slot must start at a multiple of 64 bytes"):
            lease.matrix_in("w", CudaArray(slot.values[1:]))
    np.testing.assert_array_equal(slot.values[: content.nbytes], content)
    x = on_device(normal(TOKENS, COLS, 1))

    class Held:
        pass

    held: Any = Held()
    held.matrix = matrix
    assert error(forward(held, x, "f32"), reference.linear_forward(values, x.values, None)) < 1e-6
    reader.close()


def test_a_board_reads_the_ring_itself(emulator: None, tmp_path: Path) -> None:
    reader, values, _ = lease_of(tmp_path, pinned_for=1)
    x, out = on_device(normal(TOKENS, COLS, 1), 1), empty((TOKENS, ROWS), np.float32, 1)
    size = native.linear_forward_workspace_bytes("int4", TOKENS, ROWS, COLS, device=1)
    workspace = empty((size,), np.uint8, 1)
    with reader.acquire(0) as lease:
        matrix = lease.matrix("w", device=1)
        assert matrix.device == "cuda:1"
        native.linear_forward(matrix, x, None, activation="f32", out=out, workspace=workspace)
        on_cpu = np.empty((ROWS, COLS), np.float32)  # and so does the CPU
        native.dequantize_rows(lease.matrix("w"), 0, ROWS, out=on_cpu)
    assert error(out.values, reference.linear_forward(values, x.values, None)) < 1e-6
    np.testing.assert_allclose(on_cpu, values, rtol=1e-6, atol=1e-7)
    with pytest.raises(InvalidArgument, match="released"):
        native.linear_forward(matrix, x, None, activation="f32", out=out, workspace=workspace)
    reader.close()


def test_slots_that_are_not_pinned_have_no_device_address(emulator: None, tmp_path: Path) -> None:
    reader, _, _ = lease_of(tmp_path)
    with (
        reader.acquire(0) as lease,
        pytest.raises(
            InvalidArgument, match=r"Lease\.matrix: CUDA: the device's address of memory that must be pinned"
        ),
    ):
        lease.matrix("w", device=1)
    reader.close()


def test_the_real_library_without_a_driver_says_what_to_install() -> None:
    native.set_cuda_library(None)
    if not native.cuda_is_built():
        pytest.skip("the CUDA backend is not built (CHAINFED_CUDA=1)")
    try:
        count = native.num_cuda_devices()
    except UnsupportedHardware as error:
        assert "driver" in str(error)
        return
    if count:
        pytest.skip("this machine has a CUDA device")
