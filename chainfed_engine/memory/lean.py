"""Keep freed memory from staying with the process: the C allocator's settings.

`keep_heap_lean` belongs at the very start of a program, before torch is imported. It acts on the whole process, so a
library must not call it for its user. What still stays, `native.trim_heap` returns when a stage is over.
"""

import ctypes
import sys

# mallopt parameters (glibc's malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Blocks from this size on are mapped alone and leave with their free(): what is resident is what is in use. Kept in the
# heap, the holes between activations of ever other lengths grow from round to round, to three times what is in use.
# Below it blocks stay in the heap: mapping and clearing fresh pages for every small one costs time (docs/LOG.md).
_MMAP_THRESHOLD_BYTES = 1 << 20
# Where a step keeps the activations of all layers, the holes that small kept blocks leave in larger free ones grow with
# depth: 80 to 110 MiB for 30 layers of SmolLM2.
_DEEP_MMAP_THRESHOLD_BYTES = 1 << 18
# Where the budget leaves room, blocks up to glibc's largest threshold stay: fresh pages for each were a quarter to two
# fifths of a step (docs/LOG.md).
_KEPT_MMAP_THRESHOLD_BYTES = 32 << 20
# Free memory at the top of the heap beyond this goes back at once; what lies between blocks, after a step.
_LEAN_HEAP_BYTES = 8 << 20
# Each arena keeps free blocks of its own; by default there are eight a core.
_MAX_ARENAS = 2

_is_lean = False  # whether this process asked for it
_is_own = False  # ... before torch was imported
_kept_bytes = _LEAN_HEAP_BYTES


def keep_heap_lean() -> bool:
    """Set the allocator so that returned heap goes back to the system. False where the C library is not glibc."""
    global _is_lean, _is_own
    _is_own = _is_own or "torch" not in sys.modules
    _is_lean = _set(
        {
            _M_ARENA_MAX: _MAX_ARENAS,
            _M_MMAP_THRESHOLD: _MMAP_THRESHOLD_BYTES,
            _M_TRIM_THRESHOLD: _LEAN_HEAP_BYTES,
        }
    )
    return _is_lean


def is_own_process() -> bool:
    """Whether this process is a program of ours from its start on: what it has taken so far, a run's start-up took."""
    return _is_own


def set_heap(kept_bytes: int = 0, *, deep_graphs: bool = False) -> bool:
    """From now on keep free blocks until they are `kept_bytes` (0: as few as a lean heap keeps); with `deep_graphs`,
    for steps that keep the activations of many layers, a lean heap maps smaller blocks alone as well. False, and the
    allocator is as it was, in a process that did not ask for a lean heap."""
    global _kept_bytes
    _kept_bytes = max(kept_bytes, _LEAN_HEAP_BYTES)
    threshold = _DEEP_MMAP_THRESHOLD_BYTES if deep_graphs else _MMAP_THRESHOLD_BYTES
    threshold = _KEPT_MMAP_THRESHOLD_BYTES if kept_bytes else threshold
    return _is_lean and _set({_M_MMAP_THRESHOLD: threshold, _M_TRIM_THRESHOLD: _kept_bytes})


def kept_heap_bytes() -> int:
    """Free heap that may stay between the parts of a step: what `native.trim_heap` is told there."""
    return _kept_bytes


def _set(settings: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])
