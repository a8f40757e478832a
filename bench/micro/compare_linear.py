"""Interleaved timing of the frozen linear against torch's fp32 linear: one JSON line a shape, format and direction.

    python bench/micro/compare_linear.py [--shapes 256x2048x2048,...] [--formats int4,nf4] [--repeats 7]

A shape is tokens x out features x in features. Every repeat times both sides once, so that a busy machine slows
both; the row holds medians in milliseconds and their ratio (above 1: faster than torch). With --threads 1 the clock is
the CPU time of the thread, which other processes disturb least.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from chainfed_engine import native

DEFAULT_SHAPES = "256x576x576,256x1536x576,256x2048x2048,512x4096x4096,1024x2048x8192"


def quantised_matrix(weight: torch.Tensor, block_format: str) -> native.Matrix:
    rows, cols = weight.shape
    dtype = {"int8": torch.int8, "bf16": torch.bfloat16, "f32": torch.float32}.get(block_format, torch.uint8)
    codes = torch.empty(native.codes_bytes(block_format, rows, cols) // dtype.itemsize, dtype=dtype)
    scale_bytes = native.scales_bytes(block_format, rows, cols)
    scale_dtype = torch.float32 if block_format == "nf4" else torch.float16
    scales = torch.empty(scale_bytes // scale_dtype.itemsize, dtype=scale_dtype) if scale_bytes else None
    native.quantize_blocks(weight, block_format=block_format, codes_out=codes, scales_out=scales)
    return native.Matrix.from_arrays(codes, scales, block_format=block_format, num_rows=rows, num_cols=cols)


def milliseconds(run: Callable[[], object]) -> float:
    clock = time.thread_time if native.num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return (clock() - start) * 1e3


def interleave(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of both after one warm-up each."""
    ours()
    theirs()
    pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(repeats)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def measure(tokens: int, rows: int, cols: int, block_format: str, repeats: int) -> list[dict[str, object]]:
    weight = torch.randn(rows, cols)
    matrix = quantised_matrix(weight, block_format)
    x, grad_out = torch.randn(tokens, cols), torch.randn(tokens, rows)
    out, grad_x = torch.empty(tokens, rows), torch.empty(tokens, cols)
    torch_out, torch_grad = torch.empty(tokens, rows), torch.empty(tokens, cols)
    size = max(
        native.linear_forward_workspace_bytes(block_format, tokens, rows, cols),
        native.linear_grad_input_workspace_bytes(block_format, tokens, rows, cols),
    )
    workspace = torch.empty(size, dtype=torch.uint8)

    def forward(activation: str) -> None:
        native.linear_forward(matrix, x, None, activation=activation, out=out, workspace=workspace)

    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward_int8": (lambda: forward("int8"), lambda: torch.mm(x, weight.t(), out=torch_out)),
        "forward_f32": (lambda: forward("f32"), lambda: torch.mm(x, weight.t(), out=torch_out)),
        "grad_input": (
            lambda: native.linear_grad_input(matrix, grad_out, out=grad_x, workspace=workspace),
            lambda: torch.mm(grad_out, weight, out=torch_grad),
        ),
    }
    results: list[dict[str, object]] = []
    for op, (ours, theirs) in runs.items():
        ours_ms, torch_ms = interleave(ours, theirs, repeats)
        results.append(
            {
                "op": op,
                "block_format": block_format,
                "shape": [tokens, rows, cols],
                "threads": native.num_threads(),
                "simd": native.simd_level(),
                "ours_ms": round(ours_ms, 3),
                "torch_ms": round(torch_ms, 3),
                "ratio": round(torch_ms / ours_ms, 2),
                "ours_gflops": round(2e-6 * tokens * rows * cols / ours_ms, 1),
                "torch_gflops": round(2e-6 * tokens * rows * cols / torch_ms, 1),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--formats", default="int4,nf4")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native.set_num_threads(args.threads)
    torch.manual_seed(np.random.default_rng(0).integers(1 << 30).item())
    for shape in args.shapes.split(","):
        tokens, rows, cols = (int(part) for part in shape.split("x"))
        for block_format in args.formats.split(","):
            for row in measure(tokens, rows, cols, block_format, args.repeats):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
