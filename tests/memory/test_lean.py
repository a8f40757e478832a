"""The allocator's settings, seen from outside: what a process still holds after it has freed everything."""

import subprocess
import sys

import pytest

MIB = 1 << 20

# Blocks of 200 KiB, freed from the last to the first. argv: mode, how many, whether the last stays: then what
# is free cannot leave by the heap shrinking from its top.
FREED_BLOCKS = """
import ctypes, sys
from chainfed_engine import native
from chainfed_engine.memory.lean import keep_heap_lean
from chainfed_engine.memory.meter import rss_bytes
mode, count, pinned = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "pinned"
if mode == "lean":
    assert keep_heap_lean()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))  # makes an unset glibc raise its thresholds, to 30 and 60 MiB
before = rss_bytes()
blocks = []
for _ in range(count):
    block = libc.malloc(200 << 10)
    ctypes.memset(block, 1, 200 << 10)
    blocks.append(block)
if pinned:
    blocks.pop()  # the last: a smaller one might come to lie in a hole further down
for block in reversed(blocks):
    libc.free(block)
held = rss_bytes() - before
native.trim_heap()
print(held, rss_bytes() - before)
"""

# 200 blocks of 300 KiB, every second one freed: how much of them leaves at once.
EVERY_SECOND = """
import ctypes, sys
from chainfed_engine.memory import lean
from chainfed_engine.memory.meter import rss_bytes
assert not lean.set_heap(deep_graphs=True)  # nobody has asked for a lean heap
assert lean.keep_heap_lean()
if sys.argv[1] == "deep":
    assert lean.set_heap(deep_graphs=True)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(300 << 10) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 300 << 10)
before = rss_bytes()
for block in blocks[::2]:
    libc.free(block)
print(before - rss_bytes())
"""

# 30 blocks of 2 MiB between kept ones, freed: what stays with the process at once, after trimming from 100 MiB on, and
# from 8 MiB on; then the same again, since pages that went back must not count as free ones.
KEPT = """
import ctypes, sys
from chainfed_engine import native
from chainfed_engine.memory import lean
from chainfed_engine.memory.meter import rss_bytes
assert lean.keep_heap_lean()
if sys.argv[1] == "kept":
    assert lean.set_heap(100 << 20)
assert lean.kept_heap_bytes() == (100 << 20 if sys.argv[1] == "kept" else 8 << 20)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
native.trim_heap()
pins = []
def round():
    before = rss_bytes()
    blocks = []
    for _ in range(30):
        block = libc.malloc(2 << 20)
        ctypes.memset(block, 1, 2 << 20)
        blocks.append(block)
        pins.append(libc.malloc(1 << 10))
    for block in blocks:
        libc.free(block)
    print(rss_bytes() - before)
    native.trim_heap(above_bytes=100 << 20)
    print(rss_bytes() - before)
    native.trim_heap(above_bytes=8 << 20)
    print(rss_bytes() - before)
round()
round()
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


def run_script(script: str, *arguments: str) -> list[int]:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_a_lean_heap_keeps_at_most_its_threshold_free_at_the_top() -> None:
    held_by_default, _ = run_script(FREED_BLOCKS, "default", "250", "free")
    held_when_lean, _ = run_script(FREED_BLOCKS, "lean", "250", "free")
    if held_by_default < 40 * MIB:
        pytest.skip("this C library returns memory by itself")
    assert held_when_lean < 32 * MIB + MIB  # the script's own objects


@pytest.mark.parametrize("mode", ["default", "lean"])
def test_trim_returns_what_the_heap_keeps(mode: str) -> None:
    held, left = run_script(FREED_BLOCKS, mode, "400", "pinned")
    assert held > 70 * MIB
    assert left < 8 * MIB


def test_between_kept_blocks_smaller_ones_leave_as_well_where_graphs_are_deep() -> None:
    freed = 100 * (300 << 10)
    assert run_script(EVERY_SECOND, "lean")[0] < freed // 4
    assert run_script(EVERY_SECOND, "deep")[0] > freed - freed // 4


def test_a_heap_that_may_keep_blocks_does_until_more_is_resident_than_it_may() -> None:
    for freed, above_more, above_less in zip(*[iter(run_script(KEPT, "kept"))] * 3, strict=True):
        assert freed > 55 * MIB and above_more > 55 * MIB
        assert above_less < 8 * MIB
    assert max(run_script(KEPT, "lean")) < 8 * MIB


def test_threads_share_few_arenas() -> None:
    assert run_script(THREADS, "lean")[0] <= 2
