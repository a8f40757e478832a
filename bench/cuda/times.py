"""Times of the CUDA kernels on this device, beside torch's bf16 product, cross-entropy and copies of the same shapes.

    python bench/cuda/times.py --out results.jsonl --seconds 300

Medians of interleaved runs, in milliseconds, measured with events; a section is left out (and named) when the seconds
run out. Shapes are those of an 8B model. `ratio` is torch's time over ours: above 1 we are faster. The rows of kind
"crossover" say, for each matrix, from how many tokens decoding once and cuBLASLt beat the fused kernel.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from chainfed_engine import native

sys.path.insert(0, str(Path(__file__).parent))
from checks import DEVICE, TILED, Matrix, head, normal, stream

MATRICES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
VOCABULARY, HIDDEN, ADAPTER = 128256, 4096, 64
HEAD_TOKENS, LAYER_TOKENS = (64, 512, 2048), 2048
LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
SQUARE, COPY_BYTES = 8192, 128 << 20
Row = dict[str, Any]
_FLUSH_BYTES = 256 << 20  # more than any second-level cache: weights come from memory, as they do in a model


def milliseconds(*runs: Callable[[], object], repeats: int = 7) -> list[float]:
    """Medians of the given runs, each timed in turn after one warm-up, with a cold cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for index, run in enumerate(runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[index].append(begin.elapsed_time(end))
    return [statistics.median(column) for column in times]


class Product:
    """One product of `tokens` rows with out and workspace allocated once."""

    def __init__(self, matrix: Matrix, tokens: int, direction: str) -> None:
        self.matrix, self.direction = matrix, direction
        length, outputs = (matrix.cols, matrix.rows) if direction == "forward" else (matrix.rows, matrix.cols)
        self.x, self.out = normal(tokens, length), torch.empty(tokens, outputs, device=DEVICE)
        self.x16, self.tokens = self.x.bfloat16(), tokens
        self.workspace = torch.empty(0, dtype=torch.uint8, device=DEVICE)

    def choose(self, *, library: bool) -> None:
        native.set_library_from_tokens(0, 1 if library else None)
        size_of = {
            "forward": native.linear_forward_workspace_bytes,
            "grad": native.linear_grad_input_workspace_bytes,
        }[self.direction]
        size = size_of(self.matrix.block_format, self.tokens, self.matrix.rows, self.matrix.cols, device=0)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def run(self, activation: str = "int8") -> None:
        arguments = {"activation": activation, "out": self.out, "workspace": self.workspace, "stream": stream()}
        if self.direction == "forward":
            native.linear_forward(self.matrix.native, self.x, None, **arguments)
        else:
            native.linear_grad_input(self.matrix.native, self.x, **arguments)


def products(block_formats: tuple[str, ...]) -> Iterator[Row]:
    """Fused, library and torch's bf16 times of every matrix, direction and number of tokens; then the crossovers."""
    has_library = native.cuda_device(0)["has_library"]
    for rows, cols in MATRICES:
        weight = torch.randn(rows, cols, device=DEVICE, dtype=torch.bfloat16)
        for block_format in block_formats:
            matrix = Matrix(block_format, rows, cols, any_codes=True)
            for direction in ("forward", "grad"):
                crossover: int | None = None
                other = weight.T if direction == "forward" else weight
                for tokens in TOKENS:
                    product = Product(matrix, tokens, direction)
                    row = _one_product(product, other, has_library)
                    if has_library and crossover is None and row["library_ms"] < row["fused_ms"]:
                        crossover = tokens
                    yield row
                yield {
                    "kind": "crossover", "matrix": [rows, cols], "block_format": block_format, "direction": direction,
                    "library_from_tokens": crossover,
                }  # fmt: skip


def _one_product(product: Product, other: torch.Tensor, has_library: bool) -> Row:
    matrix, tokens = product.matrix, product.tokens
    product.choose(library=False)
    fused_ms, torch_ms = milliseconds(product.run, lambda: product.x16 @ other)
    row: Row = {
        "kind": "time", "what": f"linear {product.direction}", "block_format": matrix.block_format, "tokens": tokens,
        "matrix": [matrix.rows, matrix.cols], "fused_ms": fused_ms, "torch_bf16_ms": torch_ms,
    }  # fmt: skip
    if has_library:
        product.choose(library=True)
        row["library_ms"] = milliseconds(product.run)[0]
    best = min(fused_ms, row.get("library_ms", fused_ms))
    row["ratio"] = torch_ms / best
    row["teraflops"] = 2e-9 * tokens * matrix.rows * matrix.cols / best
    return row


def heads() -> Iterator[Row]:
    """Loss and gradient of the hidden states against a 128,256-row head, beside torch in bf16; memory of both."""
    matrix = Matrix("int4", VOCABULARY, HIDDEN, any_codes=True)
    weight = torch.randn(VOCABULARY, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    for tokens in HEAD_TOKENS:
        hidden, targets = normal(tokens, HIDDEN), torch.arange(tokens, device=DEVICE) * 7
        share = torch.full((tokens,), 1 / tokens, device=DEVICE)

        def of_torch(hidden: torch.Tensor = hidden, targets: torch.Tensor = targets) -> None:
            rows = hidden.bfloat16().requires_grad_()
            torch.nn.functional.cross_entropy(rows @ weight.T, targets).backward()

        for library in (False, True):
            native.set_library_from_tokens(0, 1 if library else None)
            runs = (lambda h=hidden, t=targets, s=share: head(matrix, h, t, s, "int8"), of_torch)
            ours_ms, torch_ms = milliseconds(*runs, repeats=3)
            yield {
                "kind": "time", "what": "head with gradient", "tokens": tokens, "library": library, "ours_ms": ours_ms,
                "torch_bf16_ms": torch_ms, "ratio": torch_ms / ours_ms,
                "workspace_bytes": native.cross_entropy_workspace_bytes("int4", tokens, VOCABULARY, HIDDEN, device=0),
                "ours_peak_bytes": _peak(runs[0]), "torch_peak_bytes": _peak(runs[1]),
            }  # fmt: skip


def _peak(run: Callable[[], object]) -> int:
    """Most bytes that torch's allocator held above what it held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def records() -> Iterator[Row]:
    """Encoding (with an adapter and without) and decoding LAYER_TOKENS tokens, beside a copy of as many bytes."""
    hidden, rows = normal(LAYER_TOKENS, HIDDEN), torch.arange(LAYER_TOKENS, device=DEVICE)
    adapter = (normal(ADAPTER, HIDDEN) / 64, normal(ADAPTER), normal(HIDDEN, ADAPTER) / 64, normal(HIDDEN))
    out, copy = torch.empty_like(hidden), torch.empty_like(hidden)
    packed = torch.empty(LAYER_TOKENS, native.record_bytes("int8", HIDDEN), dtype=torch.uint8, device=DEVICE)

    def encode(with_adapter: bool) -> None:
        native.boundary_encode(
            hidden, adapter=adapter if with_adapter else None, cache_format="int8", out=packed, stream=stream()
        )

    def decode() -> None:
        native.boundary_decode(packed, rows, cache_format="int8", out=out, stream=stream())

    names = ("encode_ms", "adapter_and_encode_ms", "decode_ms", "copy_ms")
    figures = milliseconds(lambda: encode(False), lambda: encode(True), decode, lambda: copy.copy_(hidden))
    yield {"kind": "time", "what": "boundary records", "tokens": LAYER_TOKENS, **dict(zip(names, figures, strict=True))}


def layer() -> Iterator[Row]:
    """The seven linears of one 8B layer, forward and grad, at LAYER_TOKENS tokens: against torch's bf16 and the limit,
    which is the work over torch's best rate here. The window of a step is Q such layers."""
    shapes, tokens = LAYER, LAYER_TOKENS
    matrices = {shape: Matrix("int4", *shape, any_codes=True) for shape in set(shapes)}
    weights = {shape: torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in set(shapes)}
    pairs = {
        shape: (Product(matrices[shape], tokens, "forward"), Product(matrices[shape], tokens, "grad"))
        for shape in set(shapes)
    }
    square = torch.randn(SQUARE, SQUARE, device=DEVICE, dtype=torch.bfloat16)
    (best_ms,) = milliseconds(lambda: square @ square)
    best_flop_per_ms = 2 * SQUARE**3 / best_ms
    work = sum(2 * 2 * tokens * rows * cols for rows, cols in shapes)
    for library in (False, True):
        for pair in pairs.values():
            for product in pair:
                product.choose(library=library)

        def ours() -> None:
            for shape in shapes:
                for product in pairs[shape]:
                    product.run()

        def of_torch() -> None:
            for shape in shapes:
                pairs[shape][0].x16 @ weights[shape].T
                pairs[shape][1].x16 @ weights[shape]

        ours_ms, torch_ms = milliseconds(ours, of_torch, repeats=5)
        yield {
            "kind": "step", "what": "linears of one 8B layer, forward and grad", "tokens": tokens, "library": library,
            "ours_ms": ours_ms, "torch_bf16_ms": torch_ms, "limit_ms": work / best_flop_per_ms,
            "of_limit": work / best_flop_per_ms / ours_ms,
        }  # fmt: skip


def transfers() -> Iterator[Row]:
    """Copies from pinned and from pageable memory, and how much of a copy hides behind products."""
    pageable = torch.empty(COPY_BYTES, dtype=torch.uint8)
    pinned, side = pageable.pin_memory(), torch.cuda.Stream()
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    square = torch.randn(SQUARE // 2, SQUARE // 2, device=DEVICE, dtype=torch.bfloat16)

    def compute() -> None:
        for _ in range(20):
            square @ square

    def overlapped() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            there.copy_(pinned, non_blocking=True)
        compute()
        main.wait_stream(side)

    copy_ms, plain_ms, compute_ms, both_ms = milliseconds(
        lambda: there.copy_(pinned, non_blocking=True), lambda: there.copy_(pageable), compute, overlapped
    )
    yield {
        "kind": "time", "what": "copy to the device", "bytes": COPY_BYTES, "pinned_ms": copy_ms,
        "pageable_ms": plain_ms,
        "compute_ms": compute_ms, "both_ms": both_ms, "overlap": max(copy_ms, compute_ms) / both_ms,
    }  # fmt: skip


SECTIONS: tuple[tuple[str, Callable[[], Iterator[Row]]], ...] = (
    ("int4 products", lambda: products(("int4",))),
    ("head", heads),
    ("layer", layer),
    ("boundary records", records),
    ("transfers", transfers),
    ("other products", lambda: products(TILED[1:])),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    deadline, failed = time.monotonic() + options.seconds, False
    crossover = native.cuda_device(0)["library_from_tokens"]
    with options.out.open("a") as out:
        for name, section in SECTIONS:
            try:
                for row in section():
                    print(json.dumps(row), file=out, flush=True)
                    if time.monotonic() > deadline:
                        print(json.dumps({"kind": "time", "left_out": f"the rest from {name}"}), file=out, flush=True)
                        return 1 if failed else 0
            except Exception as problem:  # one section's failure must not cost the others' figures
                failed = True
                row = {"kind": "time", "what": name, "problem": f"{type(problem).__name__}: {problem}"}
                print(json.dumps(row), file=out, flush=True)
            finally:
                native.set_library_from_tokens(0, crossover)
                torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
