"""Which contests there are: `CASES` names them without building anything, `build` makes one ready to run.

The linears keep weights and matrices of the last layer shape, so cases of one shape should follow one another.
"""

from collections.abc import Iterator
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.micro import buffers, peers
from bench.micro.contest import Contest
from bench.micro.real_text import head_and_hidden
from chainfed_engine import native

LINEARS = ("int4_forward", "nf4_forward", "int4_grad_input", "nf4_grad_input")
HEADS = ("linear_cross_entropy", "linear_cross_entropy_real")
BOUNDARY = ("boundary_encode", "boundary_gather")
KERNELS = (*LINEARS, *HEADS, *BOUNDARY)

TOKENS = (256, 512, 2048)
# (K, N): projections of 0.1, 1 and 8 billion parameter models
LAYERS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (8192, 8192))
VOCABULARIES = ((576, 49152), (2048, 128256))  # (D, V)
WIDTHS = (576, 2048, 4096)
BEYOND_CACHE = 16384  # tokens whose rows fit in no cache
QUICK_TOKENS, QUICK_LAYERS = (256,), ((576, 1536), (2048, 2048))


class Case(NamedTuple):
    kernel: str
    m: int
    k: int
    n: int  # 0: follows from the model or the record


def cases(quick: bool) -> Iterator[Case]:
    """Of the full or the quick run. The real head's D and V are those of the model."""
    tokens = QUICK_TOKENS if quick else TOKENS
    for k, n in QUICK_LAYERS if quick else LAYERS:
        for kernel in LINEARS:
            yield from (Case(kernel, m, k, n) for m in tokens)
    for k, n in VOCABULARIES[:1] if quick else VOCABULARIES:
        yield from (Case("linear_cross_entropy", m, k, n) for m in tokens)
    yield from (Case("linear_cross_entropy_real", m, 576, 49152) for m in tokens)
    for k in WIDTHS[:2] if quick else WIDTHS:
        for kernel in BOUNDARY:
            yield from (Case(kernel, m, k, 0) for m in ((512,) if quick else (*TOKENS, BEYOND_CACHE)))


def build(case: Case) -> Contest:
    if case.kernel in LINEARS:
        return _linear(case)
    return _head(case) if case.kernel in HEADS else _boundary(case)


@lru_cache(maxsize=1)
def _weight(k: int, n: int) -> Tensor:
    _matrix.cache_clear()
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5


@lru_cache(maxsize=2)
def _matrix(k: int, n: int, block_format: str) -> native.Matrix:
    return buffers.quantised_matrix(_weight(k, n), block_format)


def _linear(case: Case) -> Contest:
    block_format, direction = case.kernel.split("_", 1)
    forward = direction == "forward"
    weight, matrix = _weight(case.k, case.n), _matrix(case.k, case.n, block_format)
    linear = buffers.Linear(matrix, case.m, forward=forward)
    given = torch.randn(case.m, case.k if forward else case.n, generator=torch.Generator().manual_seed(1))
    rivals: dict[str, peers.Peer]
    if forward:
        rivals = {
            "torch_fp32": partial(peers.torch_forward, weight, given),
            "fbgemm_int8": partial(peers.fbgemm_int8, weight, given),
            "bitsandbytes_nf4": partial(peers.bitsandbytes_nf4, weight, given),
        }
    else:
        rivals = {"torch_fp32": partial(peers.torch_grad_input, weight, given)}
    run = partial(linear.forward if forward else linear.grad_input, given)
    peak = "int8_gops" if forward else "f32_gflops"
    work = 2.0 * case.m * case.k * case.n
    return Contest(*case, run, rivals, work, peak, linear.call_bytes)


def _head(case: Case) -> Contest:
    if case.kernel == "linear_cross_entropy_real":
        weight, hidden, targets = head_and_hidden(case.m)
    else:
        weight, hidden, targets = _random_head(case.m, case.k, case.n)
    head = buffers.Head(weight, case.m)
    rivals = {"torch_fp32": partial(peers.torch_cross_entropy, weight, hidden, targets)}
    work = 4.0 * case.m * case.k * case.n
    return Contest(*case, partial(head.step, hidden, targets), rivals, work, "int8_gops", head.call_bytes)


def _random_head(num_tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(num_tokens, width, generator=generator)
    return _weight(width, vocabulary), hidden, torch.randint(0, vocabulary, (num_tokens,), generator=generator)


def _boundary(case: Case) -> Contest:
    hidden = _residual_stream(case.k)[: case.m]
    record_bytes = native.record_bytes("int8", case.k)
    records = torch.zeros(case.m, record_bytes, dtype=torch.uint8)
    native.boundary_encode(hidden, adapter=None, cache_format="int8", out=records)
    moved = hidden.nbytes + records.nbytes
    rivals = {"memcpy": partial(peers.memcpy, moved), "memcpy_rows": partial(peers.memcpy, 2 * hidden.nbytes)}
    if case.kernel == "boundary_encode":
        run = partial(native.boundary_encode, hidden, adapter=None, cache_format="int8", out=records)
        written = records.nbytes
    else:
        padded = torch.zeros(case.m * 5 // 4, case.k)  # a batch with a fifth of padding
        rows = torch.randperm(len(padded), generator=torch.Generator().manual_seed(3))[: case.m].sort().values
        run = partial(native.boundary_decode, records, rows, cache_format="int8", out=padded)
        written = padded.nbytes
    return Contest(case.kernel, case.m, case.k, record_bytes, run, rivals, float(moved), "copy_gb_s", written)


@cache
def _residual_stream(width: int) -> Tensor:
    """With massive channels, as the residual streams of trained models have."""
    hidden = torch.randn(BEYOND_CACHE, width, generator=torch.Generator().manual_seed(4))
    hidden[:, :: width // 3] *= 1000
    return hidden
