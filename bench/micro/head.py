"""Head and boundary kernels against what they replace, interleaved so that a busy machine slows both alike.

Head: loss and gradient of the hidden states of T tokens against a frozen vocabulary, `linear` + `cross_entropy` +
`backward` of torch (float32, weights without grad) against `cross_entropy_update` over shards. Boundary: encode and
decode of a residual stream against one memcpy that moves as many bytes (read plus written). Prints the median and the
best of the repetitions, in milliseconds, and the ratio of the medians (above 1: faster than what it replaces).

    python bench/micro/head.py [--tokens 512] [--vocabulary 49152] [--hidden 576] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from chainfed_engine.native import _native as native

SHARD_ROWS = 8192


def aligned(count: int, dtype: type = np.uint8) -> np.ndarray:
    """A zeroed array at 64-byte alignment."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


def quantised_shards(weight: np.ndarray, block_format: str) -> list[tuple[int, native.Matrix]]:
    codes_dtype = {"int8": np.int8, "f32": np.float32}.get(block_format, np.uint8)
    scales_dtype = np.float32 if block_format == "nf4" else np.float16
    shards = []
    for first in range(0, len(weight), SHARD_ROWS):
        rows = np.ascontiguousarray(weight[first : first + SHARD_ROWS])
        shape = (block_format, *rows.shape)
        codes = aligned(native.codes_bytes(*shape) // np.dtype(codes_dtype).itemsize, codes_dtype)
        scale_bytes = native.scales_bytes(*shape)
        scales = aligned(scale_bytes // np.dtype(scales_dtype).itemsize, scales_dtype) if scale_bytes else None
        native.quantize_blocks(rows, block_format=block_format, codes_out=codes, scales_out=scales)
        matrix = native.Matrix.from_arrays(
            codes, scales, block_format=block_format, num_rows=rows.shape[0], num_cols=rows.shape[1]
        )
        shards.append((first, matrix))
    return shards


def torch_step(weight: torch.Tensor, hidden: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    leaf = torch.from_numpy(hidden).requires_grad_()
    logits = torch.nn.functional.linear(leaf, weight)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().numpy(), grad.numpy()


def native_step(
    shards: list[tuple[int, native.Matrix]],
    hidden: np.ndarray,
    targets: np.ndarray,
    workspace: np.ndarray,
    activation: str,
) -> tuple[np.ndarray, np.ndarray]:
    num_tokens = len(hidden)
    state = {
        "running_max": np.full(num_tokens, -np.inf, np.float32),
        "running_sum": np.zeros(num_tokens, np.float32),
        "target_logit": np.zeros(num_tokens, np.float32),
        "grad": np.zeros_like(hidden),
        "target_row": np.zeros_like(hidden),
    }
    for first, matrix in shards:
        native.cross_entropy_update(matrix, first, hidden, targets, activation=activation, workspace=workspace, **state)
    loss = np.empty(num_tokens, np.float32)
    native.cross_entropy_finish(token_weight=None, loss_out=loss, **state)
    return loss, state["grad"]


def interleave(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, taking turns, after one unmeasured turn each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if turn > 0:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def report(title: str, times: dict[str, list[float]], baseline: str) -> None:
    print(title)
    reference = statistics.median(times[baseline])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:28s} median {median:9.2f} ms  best {min(values):9.2f} ms  {reference / median:5.2f}x")


def bench_head(tokens: int, vocabulary: int, hidden_size: int, repeats: int) -> None:
    random = np.random.default_rng(0)
    weight = (random.standard_normal((vocabulary, hidden_size)) / np.sqrt(hidden_size)).astype(np.float32)
    hidden = random.standard_normal((tokens, hidden_size)).astype(np.float32)
    targets = random.integers(0, vocabulary, tokens)
    torch_weight = torch.from_numpy(weight)
    contenders: dict[str, Callable[[], object]] = {"torch f32": partial(torch_step, torch_weight, hidden, targets)}
    exact_loss, exact_grad = torch_step(torch_weight, hidden, targets)
    for block_format, activation in (("int8", "int8"), ("int4", "int8"), ("int8", "f32"), ("f32", "f32")):
        shards = quantised_shards(weight, block_format)
        size = native.cross_entropy_workspace_bytes(block_format, tokens, SHARD_ROWS, hidden_size)
        workspace = aligned(size)
        loss, grad = native_step(shards, hidden, targets, workspace, activation)
        cosine = float((grad * exact_grad).sum() / np.linalg.norm(grad) / np.linalg.norm(exact_grad))
        error = float(np.abs(loss - exact_loss).max())
        name = f"{block_format} head, {activation}"
        print(f"{name}: |loss error| <= {error:.2e}, gradient cosine {cosine:.6f}, workspace {size / 2**20:.2f} MiB")
        contenders[name] = partial(native_step, shards, hidden, targets, workspace, activation)
    report(f"head T={tokens} V={vocabulary} D={hidden_size}", interleave(contenders, repeats), "torch f32")


def bench_boundary(tokens: int, hidden_size: int, repeats: int) -> None:
    random = np.random.default_rng(1)
    hidden = random.standard_normal((tokens, hidden_size)).astype(np.float32)
    hidden[:, :: max(1, hidden_size // 3)] *= 1000  # massive channels, as residual streams have
    rows = np.sort(random.choice(tokens * 5 // 4, tokens, replace=False))  # a batch with a fifth of padding
    out = np.zeros((tokens * 5 // 4, hidden_size), np.float32)
    for cache_format in ("int8", "bf16", "f32"):
        records = np.zeros((tokens, native.record_bytes(cache_format, hidden_size)), np.uint8)
        half = (hidden.nbytes + records.nbytes) // 2  # a copy of n bytes moves 2 n
        source, target = np.ones(half, np.uint8), np.ones(half, np.uint8)
        contenders: dict[str, Callable[[], object]] = {
            "memcpy of the same bytes": partial(np.copyto, target, source),
            "encode": partial(native.boundary_encode, hidden, adapter=None, cache_format=cache_format, out=records),
            "decode": partial(native.boundary_decode, records, rows, cache_format=cache_format, out=out),
        }
        times = interleave(contenders, 4 * repeats)
        report(f"boundary {cache_format} T={tokens} D={hidden_size}", times, "memcpy of the same bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    print(f"simd {native.simd_level()}, {arguments.threads} threads")
    bench_head(arguments.tokens, arguments.vocabulary, arguments.hidden, arguments.repeats)
    bench_boundary(4096, arguments.hidden, arguments.repeats)  # fits the last-level cache
    bench_boundary(65536, arguments.hidden, max(1, arguments.repeats // 2))  # does not


if __name__ == "__main__":
    main()
