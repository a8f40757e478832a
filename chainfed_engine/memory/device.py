"""Memory of a CUDA device: what a plan counts there, what was used, and what an allocation that failed means.

A device with memory of its own is held to the budget alone; the host's share is told beside it. A board whose CPU and
GPU share one memory is held to it with everything. Sizes that depend on a driver or a library are bounds, not measured
on every device: `CONTEXT_BYTES` is what CUDA, cuBLAS and torch's kernels take once they are loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.memory.parts import MIB, Choices, Request
from chainfed_engine.sizes import format_size

CONTEXT_BYTES = 512 * MIB
# The core's own scratch: decoded weights and cuBLAS' (32 MiB) or partial sums (32 MiB); with a causal LM the head's.
LINEAR_WORKSPACE_BYTES, HEAD_WORKSPACE_BYTES = 40 * MIB, 64 * MIB
_STAGING_SLOTS = 2  # pinned on the host while they are copied
_HOST_PARTS = ("interpreter with torch", "embedding", "data", "libraries at work", "heap")


@dataclass(frozen=True)
class DeviceFacts:
    """`name` as in the configuration ("cuda:0"); `is_unified`: one memory with the CPU."""

    name: str
    is_unified: bool


def parts_on_device(request: Request, choices: Choices, parts: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """The CPU's parts as a device has them, and the bytes that the host needs beside (0 on a board: they are counted).

    `parts`: by name, as `plan.predict` adds them up for the CPU.
    """
    assert request.device is not None
    shape, tokens = request.shape, choices.micro_batch * request.tokens
    widest = max(shape.hidden_size, shape.intermediate_size)
    scratch = 2 * tokens * widest + LINEAR_WORKSPACE_BYTES
    scratch += HEAD_WORKSPACE_BYTES if request.task == "causal-lm" else 0
    own = {"CUDA context and libraries": CONTEXT_BYTES, "kernels' workspaces": scratch}
    if request.device.is_unified:
        return {**parts, **own}, 0
    there = {name: size for name, size in parts.items() if name not in _HOST_PARTS}
    activations = max((size for name, size in parts.items() if name.startswith("largest phase")), default=0)
    own["holes between blocks"] = activations // 8
    slots = min(_STAGING_SLOTS, request.sizes.num_layers + request.sizes.num_head_shards)
    host = sum(size for name, size in parts.items() if name in _HOST_PARTS) + slots * request.sizes.slot_bytes
    return {**own, **there}, host


def peak_device_bytes(index: int) -> int:
    """Most bytes that torch's allocator held on the device since the process began: weights, activations, workspaces.

    The driver's context is not in it.
    """
    import torch

    return int(torch.cuda.max_memory_reserved(index))


@contextmanager
def device_memory_errors(device: str, predicted_peak_bytes: int, smallest_budget_bytes: int) -> Iterator[None]:
    """Turns torch's out-of-memory error into MemoryBudgetExceeded that names the budget that would do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).split("\n", 1)[0]
        raise MemoryBudgetExceeded(
            f"{device}: out of memory where the plan says {format_size(predicted_peak_bytes)} ({first_line}); set "
            f"[memory] budget below what is free there: the smallest that would do is {smallest_budget_bytes} bytes "
            f"({format_size(smallest_budget_bytes)})"
        ) from error
