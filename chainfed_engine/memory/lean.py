"""Keep freed memory from staying with the process: the C allocator's settings.

`keep_heap_lean` belongs at the very start of a program, before torch is imported. It acts on the whole process, so a
library must not call it for its user. What still stays, `native.trim_heap` returns when a stage is over.
"""

import ctypes

# mallopt parameters (glibc's malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Blocks from this size on are mapped alone and leave with their free(): what is resident is what is in use. Kept in the
# heap, the holes between activations of ever other lengths grow from round to round, to three times what is in use.
# Below it blocks stay in the heap: mapping and clearing fresh pages for every small one costs time (docs/LOG.md).
_MMAP_THRESHOLD_BYTES = 1 << 20
# Free memory at the top of the heap beyond this goes back at once; what lies between blocks, after a step.
KEPT_HEAP_BYTES = 8 << 20
# Each arena keeps free blocks of its own; by default there are eight a core.
_MAX_ARENAS = 2


def keep_heap_lean() -> bool:
    """Set the allocator so that returned heap goes back to the system. False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _M_ARENA_MAX: _MAX_ARENAS,
        _M_MMAP_THRESHOLD: _MMAP_THRESHOLD_BYTES,
        _M_TRIM_THRESHOLD: KEPT_HEAP_BYTES,
    }
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])
