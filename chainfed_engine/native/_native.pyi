"""Contract of the compiled core. An Array is a C-contiguous array that speaks DLPack (torch tensors that do not
require grad, NumPy arrays) or the buffer protocol. Exact dtypes, no cast, no copy; `*_out`/`out` are caller-allocated,
writable and alias no input. The GIL is released around every kernel and read. Errors are `chainfed_engine.errors`
classes; on InvalidArgument no buffer has been touched.

Arrays are on the CPU. Functions with a `stream` also run on a CUDA device: the first array or matrix decides where, all
others must be there too, and the work is queued on `stream` (an address; 0: the default stream), which nothing waits
for. Values on a device are not looked at: indices out of range are passed over. `device`: the number of a CUDA device,
None: the CPU.
"""

from collections.abc import Sequence
from typing import Any

Array = Any

__version__: str

def build_info() -> dict[str, str]: ...  # version, compiler, simd levels built
def simd_levels() -> list[str]: ...  # what this CPU and OS support, weakest first: scalar, avx2, ...
def simd_level() -> str: ...  # in force
def set_simd_level(level: str | None) -> str: ...  # None: best allowed by CHAINFED_SIMD; UnsupportedHardware otherwise
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...

# Gives freed pages back to the system (malloc_trim) where the heap holds more than `above_bytes` of free blocks.
def trim_heap(above_bytes: int = 0) -> None: ...

class Matrix:
    """A frozen matrix [num_rows, num_cols]; keeps its arrays or its lease alive; raises after the lease's release."""

    @staticmethod
    def from_arrays(
        codes: Array, scales: Array | None, *, block_format: str, num_rows: int, num_cols: int
    ) -> Matrix: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_cols(self) -> int: ...
    @property
    def block_format(self) -> str: ...
    @property
    def device(self) -> str: ...  # "cpu", "cuda:0"

class Lease:
    # device: read in place by a device that the reader's slots are pinned for (boards with one memory).
    def matrix(self, name: str, *, device: int | None = None) -> Matrix: ...
    # Copy the file to slot u8 [>= file_bytes] on a device; hold the lease until the stream is past it.
    def copy_to(self, slot: Array, *, stream: int) -> None: ...
    # A tensor of the file inside such a copy: as valid as what the slot holds, whatever becomes of the lease.
    def matrix_in(self, name: str, slot: Array) -> Matrix: ...
    @property
    def file_bytes(self) -> int: ...
    def names(self) -> list[str]: ...
    def release(self) -> None: ...
    def __enter__(self) -> Lease: ...
    def __exit__(self, *exc: object) -> None: ...

class StoreReader:
    """See csrc/include/chainfed/store.h. files: (path, file_bytes, tensors); a tensor is (name, block_format, num_rows,
    num_cols, codes_offset, codes_bytes, scales_offset, scales_bytes), offsets from the start of the file."""

    def __init__(
        self,
        files: Sequence[tuple[str, int, Sequence[tuple[str, str, int, int, int, int, int, int]]]],
        *,
        num_slots: int,
        direct: bool = True,
        pinned_for: int | None = None,  # page-lock the slots for this CUDA device
    ) -> None: ...
    def prefetch(self, file: int) -> None: ...
    def acquire(self, file: int) -> Lease: ...
    def gather_rows(self, file: int, name: str, row_ids: Array, *, out: Array) -> None: ...  # i64 [M] -> f32 [M, K]
    def stats(self) -> dict[str, int]: ...  # bytes_read, stall_ns, read_ns, hits, misses, resident_bytes
    def slot_bytes(self) -> int: ...
    def close(self) -> None: ...

def codes_bytes(block_format: str, num_rows: int, num_cols: int) -> int: ...
def scales_bytes(block_format: str, num_rows: int, num_cols: int) -> int: ...
def quantize_blocks(weight: Array, *, block_format: str, codes_out: Array, scales_out: Array | None) -> None: ...
def dequantize_rows(matrix: Matrix, row_begin: int, row_end: int, *, out: Array) -> None: ...
def gather_rows(matrix: Matrix, row_ids: Array, *, out: Array) -> None: ...
def nf4_table() -> list[float]: ...  # the 16 values of NF4, ascending

# GGUF blocks taken over without loss: u8 [N, K / 32 * 20] to int4, u8 [N, K / 32 * 34] to int8. A scale that is not
# finite raises CorruptFile (then codes_out and scales_out are half written).
def repack_q4_1(blocks: Array, *, num_rows: int, num_cols: int, codes_out: Array, scales_out: Array) -> None: ...
def repack_q8_0(blocks: Array, *, num_rows: int, num_cols: int, codes_out: Array, scales_out: Array) -> None: ...

# activation: "f32" is exact, the weights decoded. "int8" is fast: on the CPU integer dots for int4, nf4, int8 (plain
# f32 for bf16/f32 weights, and for grad_input); on CUDA factors of 11 bits on tensor cores, or bf16 in the library's
# product.
def linear_forward(
    matrix: Matrix, x: Array, bias: Array | None, *, activation: str, out: Array, workspace: Array, stream: int = 0
) -> None: ...
def linear_grad_input(
    matrix: Matrix, grad_out: Array, *, activation: str = "f32", out: Array, workspace: Array, stream: int = 0
) -> None: ...
def linear_forward_workspace_bytes(
    block_format: str, num_tokens: int, num_rows: int, num_cols: int, device: int | None = None
) -> int: ...
def linear_grad_input_workspace_bytes(
    block_format: str, num_tokens: int, num_rows: int, num_cols: int, device: int | None = None
) -> int: ...
def cross_entropy_update(
    shard: Matrix,
    first_row: int,
    hidden: Array,
    targets: Array,
    *,
    activation: str,
    running_max: Array,
    running_sum: Array,
    target_logit: Array,
    grad: Array | None,
    target_row: Array | None,
    workspace: Array,
    stream: int = 0,
) -> None: ...
def cross_entropy_finish(
    *,
    running_max: Array,
    running_sum: Array,
    target_logit: Array,
    token_weight: Array | None,
    loss_out: Array,
    grad: Array | None,
    target_row: Array | None,
    stream: int = 0,
) -> None: ...
def cross_entropy_workspace_bytes(
    block_format: str, num_tokens: int, num_rows: int, hidden_size: int, device: int | None = None
) -> int: ...
def record_bytes(cache_format: str, hidden_size: int) -> int: ...
def boundary_encode(
    hidden: Array,  # f32 [T, D]
    *,
    # down_weight [R, D], down_bias [R], up_weight [D, R], up_bias [D]
    adapter: tuple[Array, Array, Array, Array] | None,
    cache_format: str,
    out: Array,  # u8 [T, record_bytes]
    stream: int = 0,
) -> None: ...
def boundary_decode(  # out f32 [*, D]
    records: Array, out_rows: Array, *, cache_format: str, out: Array, stream: int = 0
) -> None: ...

# CUDA: a library of its own beside this module, opened by the first call that needs it. All but the first raise
# UnsupportedHardware without it, or without a driver that serves it.
def cuda_is_built() -> bool: ...
def cuda_architectures() -> str: ...  # built for: "80,87,89,90"
def num_cuda_devices() -> int: ...

# name, architecture (87), num_processors, is_unified (one memory with the CPU), total_bytes, free_bytes, has_library
# (cuBLASLt was found), library_from_tokens (or None: never), driver_version, runtime_version (12060: 12.6)
def cuda_device(device: int) -> dict[str, Any]: ...

# From how many tokens on a product decodes the weights once and calls cuBLASLt; None: never.
def set_library_from_tokens(device: int, tokens: int | None) -> None: ...
def set_cuda_library(path: str | None) -> None: ...  # another library, for tests; None: the one beside this module
