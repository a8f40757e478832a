"""The plan of a device's memory, and what running out of it says."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chainfed_engine import native
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.memory.device import CONTEXT_BYTES, DeviceFacts, device_memory_errors, hold_to_budget
from chainfed_engine.memory.meter import Meter
from chainfed_engine.memory.plan import Choices, Request, StoreSizes, make_plan, predict
from chainfed_engine.types import ModelShape

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))
from fake_cuda import EMULATOR, NEEDS_EMULATOR

MIB = 1 << 20
SHAPE = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
SIZES = StoreSizes(32 * 136 * MIB, 16 * 34 * MIB, 530 * MIB, 136 * MIB, 32, 16)
CONFIG = ChainConfig(window=2, batch_size=4, sequence_length=512, stand_in=False, adapter_size=64)
CHOICES = Choices(window=2, num_slots=4, micro_batch=4, recompute=True, cache_format="int8", fill_bytes=16 * MIB)


def request(device: DeviceFacts | None, **changes: object) -> Request:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return Request(SHAPE, SIZES, config, "causal-lm", 400 * MIB, device=device)


def test_the_cpus_plan_is_what_it_was() -> None:
    plan = predict(request(None), CHOICES)
    assert "CUDA context and libraries" not in plan.parts
    assert "predicted_host_bytes" not in plan.facts


def test_a_device_of_its_own_memory_holds_no_interpreter_and_the_host_two_staging_slots() -> None:
    plan = predict(request(DeviceFacts("cuda:0", is_unified=False)), CHOICES)
    assert sum(plan.parts.values()) == plan.predicted_peak_bytes
    assert "interpreter with torch" not in plan.parts
    assert plan.parts["CUDA context and libraries"] == CONTEXT_BYTES
    assert plan.parts["layer slots"] == 4 * SIZES.slot_bytes
    assert plan.facts["device"] == "cuda:0"
    host = plan.facts["predicted_host_bytes"]
    assert 400 * MIB + 2 * SIZES.slot_bytes <= host < 400 * MIB + 2 * SIZES.slot_bytes + 100 * MIB


def test_a_board_with_one_memory_counts_everything_once() -> None:
    cpu = predict(request(None), CHOICES)
    board = predict(request(DeviceFacts("cuda:0", is_unified=True)), CHOICES)
    extra = set(board.parts) - set(cpu.parts)
    assert extra == {"CUDA context and libraries", "kernels' workspaces"}
    assert board.predicted_peak_bytes == cpu.predicted_peak_bytes + sum(board.parts[name] for name in extra)
    assert board.facts["predicted_host_bytes"] == 0


def test_a_board_pins_a_slot_of_the_largest_size_for_every_file_that_stays() -> None:
    whole = replace(CHOICES, num_slots=None)
    board = predict(request(DeviceFacts("cuda:0", is_unified=True)), whole)
    assert board.parts["layer slots"] == (32 + 16) * SIZES.slot_bytes
    discrete = predict(request(DeviceFacts("cuda:0", is_unified=False)), whole)
    assert discrete.parts["layers"] + discrete.parts["head"] == SIZES.layer_bytes + SIZES.head_bytes


def test_the_budget_is_held_against_the_devices_peak() -> None:
    device = DeviceFacts("cuda:0", is_unified=False)
    plan = make_plan(request(device, budget=4 << 30))
    assert plan.predicted_peak_bytes <= 4 << 30
    smallest = plan.smallest_budget_bytes
    assert make_plan(request(device, budget=smallest)).predicted_peak_bytes == smallest
    with pytest.raises(MemoryBudgetExceeded, match=f"the smallest that would do is {smallest} bytes"):
        make_plan(request(device, budget=smallest - 1))


def test_running_out_names_the_budget_that_would_do() -> None:
    with (
        pytest.raises(
            MemoryBudgetExceeded, match=r"cuda: out of memory where the plan says 3.0 GiB \(CUDA out.*1.0 GiB"
        ),
        device_memory_errors("cuda", 3 << 30, 1 << 30),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page of advice")


@pytest.mark.parametrize(
    "error",
    [
        MemoryBudgetExceeded(
            "StoreReader: CUDA: pinning host memory: out of memory; set a smaller [memory] budget, so that fewer slots"
        ),
        MemoryBudgetExceeded("linear_forward: cuBLASLt: out of memory for a product; set a smaller [memory] budget"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_the_core_or_the_driver_could_not_have_names_the_budget_too(error: Exception) -> None:
    words = r"cuda:1: out of memory where the plan says 3.0 GiB .* the smallest that would do is 1073741824 bytes"
    with pytest.raises(MemoryBudgetExceeded, match=words), device_memory_errors("cuda:1", 3 << 30, 1 << 30):
        raise error


def test_a_plan_that_does_not_fit_is_not_running_out() -> None:
    with pytest.raises(MemoryBudgetExceeded, match=r"^budget 1 MiB"), device_memory_errors("cuda", 1, 1):
        raise MemoryBudgetExceeded("budget 1 MiB: the smallest that would do is 5 bytes; raise [memory] budget")


def test_decoded_weights_are_planned_where_they_will_be_decoded() -> None:
    tokens = CONFIG.batch_size * CONFIG.sequence_length

    def scratch(library_from: int | None) -> int:
        plan = predict(request(DeviceFacts("cuda:0", is_unified=False, library_from_tokens=library_from)), CHOICES)
        return plan.parts["kernels' workspaces"]

    assert scratch(tokens + 1) == scratch(None)
    # The largest matrix of the shape as bf16, in place of 32 MiB of partial sums.
    assert scratch(tokens) - scratch(None) == 2 * 4096 * 14336 - 32 * MIB


def test_the_planned_scratch_holds_what_the_core_asks_for() -> None:
    if EMULATOR is None:
        pytest.skip(NEEDS_EMULATOR)
    native.set_cuda_library(str(EMULATOR))
    try:
        for index, library_from in ((0, None), (0, 768), (1, None)):
            native.set_library_from_tokens(index, library_from)
            facts = DeviceFacts(f"cuda:{index}", is_unified=index == 1, library_from_tokens=library_from)
            for batch_size, length in ((1, 8), (4, 64), (4, 256), (4, 512), (16, 512)):
                one = request(facts, batch_size=batch_size, sequence_length=length)
                choices = replace(CHOICES, micro_batch=batch_size)
                planned = predict(one, choices).parts["kernels' workspaces"]
                tokens = batch_size * length
                linear = max(
                    size("int4", tokens, rows, cols, device=index)
                    for rows, cols in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
                    for size in (native.linear_forward_workspace_bytes, native.linear_grad_input_workspace_bytes)
                )
                head = native.cross_entropy_workspace_bytes("int4", tokens, 128256, 4096, device=index)
                assert max(linear, head) <= planned, (index, library_from, tokens)
    finally:
        native.set_library_from_tokens(0, None)
        native.set_cuda_library(None)


class FakeAllocator:
    """torch.cuda's figures of two devices: 80 GiB each, `held` reserved at most since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
        self.held = held
        self.shares: dict[int, float] = {}
        properties = SimpleNamespace(total_memory=80 << 30)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: self.held)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda index: setattr(self, "held", 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, index: self.shares.update({index: share})
        )


def test_torch_is_held_to_the_budget_less_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = FakeAllocator(monkeypatch, 0)
    hold_to_budget(1, 4 << 30)
    hold_to_budget(0, 1 << 50)
    assert torchs.shares[1] * (80 << 30) == pytest.approx((4 << 30) - CONTEXT_BYTES)
    assert torchs.shares[0] == 1.0


def test_the_meter_counts_the_device_or_both(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = FakeAllocator(monkeypatch, 9 * MIB)
    discrete, board = Meter(device=0), Meter(device=1, shares_memory=True)
    assert torchs.held == 0  # the stretch starts from here
    torchs.held = 7 * MIB
    used = discrete.read()
    assert (used.peak_device_bytes, used.peak_bytes) == (7 * MIB, 7 * MIB)
    used = board.read()
    host = used.cgroup_peak_bytes if used.cgroup_peak_bytes is not None else used.peak_rss_bytes
    assert used.peak_bytes == host + 7 * MIB + (0 if used.cgroup_peak_bytes is not None else used.page_cache_bytes or 0)
    assert Meter().read().peak_device_bytes is None


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), device_memory_errors("cuda", 1, 1):
        raise RuntimeError("something else")
