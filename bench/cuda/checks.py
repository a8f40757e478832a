"""The kernels on a real device against float64, one function a promise; each returns what it measured or raises
AssertionError. tests/native/test_cuda_device.py runs the same functions under pytest.

    python bench/cuda/checks.py --out results.jsonl     # a line a check, after a line about the machine
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chainfed_engine import native
from chainfed_engine.native import reference

FORMATS = ("int4", "nf4", "int8", "bf16", "f32")
TILED = FORMATS[:3]
EXACT_BUDGET, FUSED_BUDGET, LIBRARY_BUDGET = 1e-6, 1e-3, 6e-3  # as tests/csrc/cuda_linear_test.cpp
SHAPES = (
    (1, 1, 1),
    (3, 17, 33),
    (16, 256, 64),
    (31, 65, 127),
    (65, 129, 200),
    (257, 40, 64),
    (5, 9, 1100),
    (130, 520, 333),
)
HEAD_SHAPE = (77, 3001, 200)  # tokens, vocabulary rows, hidden size
DEVICE = "cuda"

Tensor = torch.Tensor


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


class Matrix:
    """A random matrix in a block format: `native` on the device, `values` in float64 there.

    `any_codes`: random bytes under one scale instead of quantised weights, and no `values`: enough to be timed.
    """

    def __init__(self, block_format: str, rows: int, cols: int, seed: int = 0, *, any_codes: bool = False) -> None:
        self.block_format, self.rows, self.cols = block_format, rows, cols
        code_type = {"int8": torch.int8, "f32": torch.float32, "bf16": torch.bfloat16}.get(block_format, torch.uint8)
        codes = torch.zeros(native.codes_bytes(block_format, rows, cols) // code_type.itemsize, dtype=code_type)
        scale_type = torch.float32 if block_format == "nf4" else torch.float16
        scale_bytes = native.scales_bytes(block_format, rows, cols)
        scales = torch.zeros(scale_bytes // scale_type.itemsize, dtype=scale_type) if scale_bytes else None
        if any_codes:
            assert scales is not None, "any_codes is for quantised formats"
            codes.view(torch.uint8).random_(0, 256)
            scales.fill_(0.001)
            self.values = torch.empty(0)
        else:
            weight = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)
            native.quantize_blocks(weight, block_format=block_format, codes_out=codes, scales_out=scales)
            self.values = torch.from_numpy(self._decoded(codes, scales)).to(DEVICE)
        self.codes = codes.to(DEVICE)
        self.scales = None if scales is None else scales.to(DEVICE)
        self.native = native.Matrix.from_arrays(
            self.codes, self.scales, block_format=block_format, num_rows=rows, num_cols=cols
        )

    def _decoded(self, codes: Tensor, scales: Tensor | None) -> np.ndarray:
        plain = codes.view(torch.uint16) if self.block_format == "bf16" else codes
        sizes = {"num_rows": self.rows, "num_cols": self.cols}
        stored = None if scales is None else scales.numpy()
        return reference.dequantize(plain.numpy(), stored, block_format=self.block_format, **sizes)

    def forward(self, x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
        size = native.linear_forward_workspace_bytes(self.block_format, len(x), self.rows, self.cols, device=0)
        out = torch.full((len(x), self.rows), torch.nan, device=DEVICE)
        workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        native.linear_forward(
            self.native, x, bias, activation=activation, out=out, workspace=workspace, stream=stream()
        )
        return out

    def grad_input(self, grad: Tensor, activation: str) -> Tensor:
        size = native.linear_grad_input_workspace_bytes(self.block_format, len(grad), self.rows, self.cols, device=0)
        out = torch.full((len(grad), self.cols), torch.nan, device=DEVICE)
        workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        native.linear_grad_input(
            self.native, grad, activation=activation, out=out, workspace=workspace, stream=stream()
        )
        return out


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(value: Tensor, oracle: Tensor) -> float:
    return float((value.double() - oracle).norm() / oracle.norm())


def _products(activation: str, budget: Callable[[str], float]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for block_format in FORMATS:
        for tokens, rows, cols in SHAPES:
            matrix, x, grad = Matrix(block_format, rows, cols), normal(tokens, cols), normal(tokens, rows, seed=2)
            bias = normal(rows, seed=3)
            errors = (
                error(matrix.forward(x, activation, bias), x.double() @ matrix.values.T + bias.double()),
                error(matrix.grad_input(grad, activation), grad.double() @ matrix.values),
            )
            assert max(errors) < budget(block_format), f"{block_format} {tokens}x{rows}x{cols}: {errors}"
            worst[block_format] = max(worst.get(block_format, 0.0), *errors)
    return worst


def exact_products_match_float64() -> dict[str, float]:
    return _products("f32", lambda _: EXACT_BUDGET)


def fused_products_match_float64() -> dict[str, float]:
    native.set_library_from_tokens(0, None)
    return _products("int8", lambda block_format: FUSED_BUDGET if block_format in TILED else LIBRARY_BUDGET)


def library_products_match_float64() -> dict[str, float]:
    if not native.cuda_device(0)["has_library"]:
        return {"skipped": 1.0}
    before = native.cuda_device(0)["library_from_tokens"]
    native.set_library_from_tokens(0, 1)
    try:
        return _products("int8", lambda _: LIBRARY_BUDGET)
    finally:
        native.set_library_from_tokens(0, before)


def head(
    matrix: Matrix, hidden: Tensor, targets: Tensor, weight: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Losses [T] and gradient [T, D] of the whole head as one shard."""
    count, width = hidden.shape
    grad = None if weight is None else torch.zeros_like(hidden)
    target_row = None if weight is None else torch.zeros_like(hidden)
    state = {"running_max": torch.full((count,), -torch.inf, device=DEVICE)}
    state |= {name: torch.zeros(count, device=DEVICE) for name in ("running_sum", "target_logit")}
    losses = torch.empty(count, device=DEVICE)
    size = native.cross_entropy_workspace_bytes(matrix.block_format, count, matrix.rows, width, device=0)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    native.cross_entropy_update(
        matrix.native, 0, hidden, targets, activation=activation, **state, grad=grad, target_row=target_row,
        workspace=workspace, stream=stream(),
    )  # fmt: skip
    native.cross_entropy_finish(
        **state, token_weight=weight, loss_out=losses, grad=grad, target_row=target_row, stream=stream()
    )
    return losses, grad


def losses_and_gradients_match_float64() -> dict[str, float]:
    worst: dict[str, float] = {}
    tokens, rows, width = HEAD_SHAPE
    for block_format in TILED:
        matrix = Matrix(block_format, rows, width)
        for activation, budget in (("f32", 1e-5), ("int8", 3e-3)):
            hidden, weight = normal(tokens, width), normal(tokens, seed=4)
            targets = torch.arange(tokens, device=DEVICE) * 31 % rows
            losses, grad = head(matrix, hidden, targets, weight, activation)
            exact = hidden.double().requires_grad_()
            expected = torch.nn.functional.cross_entropy(exact @ matrix.values.T, targets, reduction="none")
            (expected * weight.double()).sum().backward()
            assert grad is not None and exact.grad is not None
            errors = error(losses, expected.detach()), error(grad, exact.grad)
            assert max(errors) < budget, f"{block_format} {activation}: {errors}"
            worst[f"{block_format}-{activation}"] = max(errors)
    return worst


def records_are_byte_for_byte_the_cpus() -> dict[str, float]:
    for width in (1, 65, 130, 768, 4096):
        hidden = torch.randn(37, width, generator=torch.Generator().manual_seed(5))
        hidden[3] *= 1e4
        hidden[5, width // 2] = torch.inf
        for cache_format in ("int8", "bf16", "f32"):
            size = native.record_bytes(cache_format, width)
            records = torch.zeros(37, size, dtype=torch.uint8)
            native.boundary_encode(hidden, adapter=None, cache_format=cache_format, out=records)
            there = torch.zeros(37, size, dtype=torch.uint8, device=DEVICE)
            native.boundary_encode(
                hidden.to(DEVICE), adapter=None, cache_format=cache_format, out=there, stream=stream()
            )
            assert torch.equal(there.cpu(), records), f"{cache_format} of width {width}"
            rows, out = torch.randperm(40)[:37], torch.zeros(40, width)
            native.boundary_decode(records, rows, cache_format=cache_format, out=out)
            out_there = torch.zeros(40, width, device=DEVICE)
            native.boundary_decode(there, rows.to(DEVICE), cache_format=cache_format, out=out_there, stream=stream())
            assert torch.equal(out_there.cpu().view(torch.int32), out.view(torch.int32)), (
                f"{cache_format} of width {width}"
            )
    return {}


def the_fused_adapter_matches_float64() -> dict[str, float]:
    worst = 0.0
    for width, inner in ((65, 3), (768, 16), (4096, 64)):
        hidden, down, up = normal(21, width), normal(inner, width, seed=2) / width**0.5, normal(width, inner, seed=3)
        adapter = (down, normal(inner, seed=4), up, normal(width, seed=5))
        out = torch.zeros(21, 4 * width, dtype=torch.uint8, device=DEVICE)
        native.boundary_encode(hidden, adapter=adapter, cache_format="f32", out=out, stream=stream())
        down64, bias64, up64, up_bias64 = (part.double() for part in adapter)
        middle = torch.nn.functional.gelu(hidden.double() @ down64.T + bias64)
        worst = max(worst, error(out.view(torch.float32), hidden.double() + middle @ up64.T + up_bias64))
    assert worst < 1e-6, worst
    return {"worst": worst}


def a_captured_graph_replays_the_product() -> dict[str, float]:
    matrix, x = Matrix("int4", 300, 512), normal(33, 512)
    expected = matrix.forward(x, "int8")
    size = native.linear_forward_workspace_bytes("int4", 33, 300, 512, device=0)
    workspace, out = torch.empty(size, dtype=torch.uint8, device=DEVICE), torch.zeros(33, 300, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native.linear_forward(matrix.native, x, None, activation="int8", out=out, workspace=workspace, stream=stream())
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    return {}


def work_runs_on_the_callers_stream() -> dict[str, float]:
    """A long kernel in front on the same stream: the call returns before it ends, and its result waits for it."""
    matrix, side = Matrix("int4", 512, 512), torch.cuda.Stream()
    x, filler = normal(64, 512), normal(6000, 6000)
    expected = matrix.forward(x, "int8")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        for _ in range(20):
            filler @ filler
        late.copy_(x)
        started = time.perf_counter()
        out = matrix.forward(late, "int8")
        returned = time.perf_counter() - started
        pending = not side.query()
    side.synchronize()
    assert torch.equal(out, expected)
    assert pending, "the call waited for the device"
    return {"returned_us": 1e6 * returned}


def leased_files_are_read_on_the_device() -> dict[str, float]:
    info = native.cuda_device(0)
    rows, cols = 64, 256
    values = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer")
        values.tofile(path)
        tensor = ("w", "f32", rows, cols, 0, values.nbytes, 0, 0)
        reader = native.StoreReader([(str(path), values.nbytes, [tensor])], num_slots=1, pinned_for=0)
        x, out = normal(5, cols), torch.zeros(5, rows, device=DEVICE)
        size = native.linear_forward_workspace_bytes("f32", 5, rows, cols, device=0)
        workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        with reader.acquire(0) as lease:
            if info["is_unified"]:
                matrix = lease.matrix("w", device=0)
            else:
                slot = torch.zeros(reader.slot_bytes(), dtype=torch.uint8, device=DEVICE)
                lease.copy_to(slot, stream=stream())
                matrix = lease.matrix_in("w", slot)
            native.linear_forward(matrix, x, None, activation="f32", out=out, workspace=workspace, stream=stream())
            torch.cuda.synchronize()
        reader.close()
    worst = error(out, x.double() @ torch.from_numpy(values).double().to(DEVICE).T)
    assert worst < EXACT_BUDGET, worst
    return {"worst": worst}


CHECKS: tuple[Callable[[], dict[str, float]], ...] = (
    exact_products_match_float64,
    fused_products_match_float64,
    library_products_match_float64,
    losses_and_gradients_match_float64,
    records_are_byte_for_byte_the_cpus,
    the_fused_adapter_matches_float64,
    a_captured_graph_replays_the_product,
    work_runs_on_the_callers_stream,
    leased_files_are_read_on_the_device,
)


def machine() -> dict[str, Any]:
    return {
        "kind": "machine", "device": native.cuda_device(0), "architectures": native.cuda_architectures(),
        "torch": torch.__version__, "torch_cuda": torch.version.cuda, "core": native.build_info(),
        "python": platform.python_version(), "cpu": platform.machine(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--build-seconds", type=int)
    options = parser.parse_args()
    failed = 0
    with options.out.open("w") as out:
        print(json.dumps({**machine(), "build_seconds": options.build_seconds}), file=out, flush=True)
        for check in CHECKS:
            print("    ", check.__name__, file=sys.stderr, flush=True)  # a check that hangs is known by its name
            started = time.perf_counter()
            row: dict[str, Any] = {"kind": "check", "name": check.__name__}
            try:
                row |= {"ok": True, "errors": check()}
            except Exception as problem:
                row |= {"ok": False, "problem": f"{type(problem).__name__}: {problem}"}
                failed += 1
            print(json.dumps({**row, "seconds": round(time.perf_counter() - started, 2)}), file=out, flush=True)
            print("ok  " if row["ok"] else "FAIL", check.__name__, row.get("problem", ""), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
