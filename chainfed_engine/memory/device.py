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
# The core's own scratch (csrc/cuda): partial sums of the fused product, or decoded weights and cuBLASLt's 8 MiB; with a
# causal LM the head's.
_PARTIAL_BYTES, _DECODED_BYTES, _LIBRARY_BYTES, HEAD_WORKSPACE_BYTES = 32 * MIB, 128 * MIB, 9 * MIB, 64 * MIB
_STAGING_SLOTS = 2  # pinned on the host while they are copied
_HOST_PARTS = ("interpreter with torch", "embedding", "data", "libraries at work", "heap")
# How an allocation of CUDA or cuBLAS is worded that torch's allocator did not make: by torch, and by the core.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "out of memory; set a smaller",
    "cuBLASLt: out of memory",
)


@dataclass(frozen=True)
class DeviceFacts:
    """`name` as in the configuration ("cuda:0"); `is_unified`: one memory with the CPU; `library_from_tokens`: from how
    many tokens weights are decoded into a scratch, None never (`native.cuda_device`)."""

    name: str
    is_unified: bool
    library_from_tokens: int | None = None


def parts_on_device(request: Request, choices: Choices, parts: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """The CPU's parts as a device has them, and the bytes that the host needs beside (0 on a board: they are counted).

    `parts`: by name, as `plan.predict` adds them up for the CPU.
    """
    assert request.device is not None
    shape, tokens = request.shape, request.part_tokens(choices)
    widest = max(shape.hidden_size, shape.intermediate_size)
    library_from = request.device.library_from_tokens
    scratch = 2 * tokens * widest + _LIBRARY_BYTES
    decodes = library_from is not None and tokens >= library_from
    scratch += min(_DECODED_BYTES, 2 * widest * shape.hidden_size) if decodes else _PARTIAL_BYTES
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
    """Most bytes that torch's allocator held on the device since the process began, or since `reset_peak_device`:
    weights, activations, workspaces. The driver's context (`CONTEXT_BYTES` in a plan) is not in it.
    """
    import torch

    return int(torch.cuda.max_memory_reserved(index))


def reset_peak_device(index: int) -> None:
    """Let `peak_device_bytes` start again from what is held now."""
    import torch

    torch.cuda.reset_peak_memory_stats(index)


def hold_to_budget(index: int, budget: int) -> None:
    """Make torch's allocator give back what it keeps for later, and then fail, before the device holds more than
    `budget` bytes with the context. For devices with memory of their own: on a board the host's share moves."""
    import torch

    total = torch.cuda.get_device_properties(index).total_memory
    share = max(budget - CONTEXT_BYTES, 1) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), index)


@contextmanager
def device_memory_errors(device: str, predicted_peak_bytes: int, smallest_budget_bytes: int) -> Iterator[None]:
    """Turns an allocation on `device` that failed, torch's or the core's, into MemoryBudgetExceeded that names the
    budget that would do."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryBudgetExceeded, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in text for words in _OUT_OF_MEMORY):
            raise
        first_line = text.split("\n", 1)[0]
        raise MemoryBudgetExceeded(
            f"{device}: out of memory where the plan says {format_size(predicted_peak_bytes)} ({first_line}); set "
            f"[memory] budget below what is free there: the smallest that would do is {smallest_budget_bytes} bytes "
            f"({format_size(smallest_budget_bytes)})"
        ) from error
