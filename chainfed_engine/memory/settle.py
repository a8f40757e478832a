"""Bring the process into the state in which it computes, so that what it takes by itself can be measured, not guessed.

Linking torch touches code that no step runs; the first products make BLAS allocate its buffers and read their own code.
"""

import ctypes
import gc
import platform

import numpy as np
import torch
from torch.nn import functional

from chainfed_engine import native
from chainfed_engine.memory.lean import is_own_process
from chainfed_engine.memory.meter import peak_rss_bytes, rss_bytes

_MADV_DONTNEED = 4


def startup_peak_bytes() -> int:
    """Most that was resident before a model is opened: linking torch (its CUDA build above all) and reading the data
    may take more than the run will. In a process that others began (a notebook, a test) what is resident now: what it
    held before is not ours."""
    return peak_rss_bytes() if is_own_process() else rss_bytes()


def settled_rss_bytes() -> int:
    """Resident set of this process once start-up's pages are given back and what computes has run once."""
    gc.collect()
    release_code()
    if is_own_process() and platform.machine() == "x86_64":
        # oneDNN, which torch asks for a GELU there, keeps code and small blocks for every shape that it has seen, up to
        # 1024 of them: 90 KiB each, sprinkled over the heap, where they part what is free. torch's own is as fast.
        torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
    _compute()
    native.trim_heap()
    return rss_bytes()


def release_code() -> None:
    """Give back the pages of machine code that are mapped: what is run again comes back from the page cache. Code is
    mapped read-only and never written to, so that nothing can be lost."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps") as maps:
        fields = [line.split(maxsplit=5) for line in maps]
    for span, flags, _, _, inode, *_ in fields:
        if flags == "r-xp" and inode != "0":
            start, end = (int(word, 16) for word in span.split("-"))
            madvise(start, end - start, _MADV_DONTNEED)  # a refusal leaves the pages where they are


def _compute() -> None:
    """A small piece of each library's part in a run: products large enough for BLAS to use all its threads."""
    weight = torch.zeros(768, 768, requires_grad=True)
    rows = torch.zeros(2, 4, 128, 192)
    hidden = functional.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
    hidden = functional.layer_norm(hidden.transpose(1, 2).reshape(256, 768), (768,)) @ weight.T
    loss = functional.cross_entropy(functional.gelu(functional.silu(hidden)), torch.zeros(256, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    square = np.eye(256)
    np.linalg.eigh(square @ square)
    np.linalg.qr(square, mode="r")
