"""Contract of the compiled core. An Array is a C-contiguous CPU array that speaks DLPack (torch tensors that do not
require grad, NumPy arrays) or the buffer protocol. Exact dtypes, no cast, no copy; `*_out`/`out` are caller-allocated,
writable and alias no input. The GIL is released around every kernel and read. Errors are `chainfed_engine.errors`
classes; on InvalidArgument no buffer has been touched.
"""

from collections.abc import Sequence
from typing import Any

Array = Any

__version__: str

def build_info() -> dict[str, str]: ...  # version, compiler, simd levels built
def simd_levels() -> list[str]: ...  # what this CPU and OS support, weakest first: ["scalar", "avx2", "avx512vnni"]
def simd_level() -> str: ...  # in force
def set_simd_level(level: str | None) -> str: ...  # None: best allowed by CHAINFED_SIMD; UnsupportedHardware otherwise
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def trim_heap() -> None: ...  # give freed pages back to the OS (malloc_trim)

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

class Lease:
    def matrix(self, name: str) -> Matrix: ...
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

# activation: "int8" (integer dots for int4, nf4, int8; plain f32 for bf16/f32 weights) or "f32" (decoded weights)
def linear_forward(
    matrix: Matrix, x: Array, bias: Array | None, *, activation: str, out: Array, workspace: Array
) -> None: ...
def linear_grad_input(matrix: Matrix, grad_out: Array, *, out: Array, workspace: Array) -> None: ...
def linear_forward_workspace_bytes(block_format: str, num_tokens: int, num_rows: int, num_cols: int) -> int: ...
def linear_grad_input_workspace_bytes(block_format: str, num_tokens: int, num_rows: int, num_cols: int) -> int: ...
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
) -> None: ...
def cross_entropy_workspace_bytes(block_format: str, num_tokens: int, num_rows: int, hidden_size: int) -> int: ...
def record_bytes(cache_format: str, hidden_size: int) -> int: ...
def boundary_encode(
    hidden: Array,  # f32 [T, D]
    *,
    # down_weight [R, D], down_bias [R], up_weight [D, R], up_bias [D]
    adapter: tuple[Array, Array, Array, Array] | None,
    cache_format: str,
    out: Array,  # u8 [T, record_bytes]
) -> None: ...
def boundary_decode(records: Array, out_rows: Array, *, cache_format: str, out: Array) -> None: ...  # out f32 [*, D]
