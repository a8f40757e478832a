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
# depth: 80 to 110 MiB for 30 layers of SmolLM2. Its steps are long, so mapping more of its blocks does not show.
_DEEP_MMAP_THRESHOLD_BYTES = 1 << 18
# Free memory at the top of the heap beyond this goes back at once; what lies between blocks, after a step.
KEPT_HEAP_BYTES = 8 << 20
# Each arena keeps free blocks of its own; by default there are eight a core.
_MAX_ARENAS = 2

_is_lean = False  # whether this process asked for it
_is_own = False  # ... before torch was imported


def keep_heap_lean() -> bool:
    """Set the allocator so that returned heap goes back to the system. False where the C library is not glibc."""
    global _is_lean, _is_own
    _is_own = _is_own or "torch" not in sys.modules
    _is_lean = _set(
        {
            _M_ARENA_MAX: _MAX_ARENAS,
            _M_MMAP_THRESHOLD: _MMAP_THRESHOLD_BYTES,
            _M_TRIM_THRESHOLD: KEPT_HEAP_BYTES,
        }
    )
    return _is_lean


def is_own_process() -> bool:
    """Whether this process is a program of ours from its start on: what it has taken so far, a run's start-up took."""
    return _is_own


def expect_deep_graphs() -> bool:
    """Map smaller blocks alone as well, from now on, for steps that keep the activations of all layers. False, and
    nothing is changed, in a process that did not ask for a lean heap."""
    return _is_lean and _set({_M_MMAP_THRESHOLD: _DEEP_MMAP_THRESHOLD_BYTES})


def _set(settings: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])
