"""The allocator's settings, seen from outside: what a process still holds after it has freed everything."""

import subprocess
import sys

import pytest

MIB = 1 << 20

# 400 blocks of 200 KiB below one that stays: what is free under it cannot leave a heap that shrinks from the top only.
FREED_BLOCKS = """
import ctypes, sys
from chainfed_engine.memory.lean import keep_heap_lean, trim
from chainfed_engine.memory.meter import rss_bytes
if sys.argv[1] == "lean":
    assert keep_heap_lean()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))  # makes an unset glibc raise its threshold
before = rss_bytes()
blocks = []
for _ in range(400):
    block = libc.malloc(200 << 10)
    ctypes.memset(block, 1, 200 << 10)
    blocks.append(block)
libc.malloc(100 << 10)
for block in blocks:
    libc.free(block)
held = rss_bytes() - before
print(held, trim(), rss_bytes() - before)
"""

THREADS = """
import ctypes, re, sys, threading
from chainfed_engine.memory.lean import keep_heap_lean
if sys.argv[1] == "lean":
    assert keep_heap_lean()
libc = ctypes.CDLL(None)
barrier = threading.Barrier(16)
def work():
    barrier.wait()
    for _ in range(200):
        libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
# An arena beside the first reserves 64 MiB of address space, aligned to that.
starts = {int(line.split("-")[0], 16) for line in open("/proc/self/maps")}
print(sum(start % (64 << 20) == 0 for start in starts))
"""


def run_script(script: str, mode: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_lean_heap_returns_large_blocks_when_they_are_freed() -> None:
    held_by_default, _, _ = run_script(FREED_BLOCKS, "default")
    held_when_lean, _, _ = run_script(FREED_BLOCKS, "lean")
    if held_by_default < 20 * MIB:
        pytest.skip("this C library returns memory by itself")
    assert held_when_lean < 4 * MIB


def test_trim_returns_what_the_heap_keeps() -> None:
    held, trimmed, left = run_script(FREED_BLOCKS, "default")
    assert left < 8 * MIB
    assert trimmed >= held - left - MIB


def test_threads_share_few_arenas() -> None:
    assert run_script(THREADS, "lean")[0] <= 2
