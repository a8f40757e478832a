"""The plan of a device's memory, and what running out of it says."""

from dataclasses import replace

import pytest
import torch

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.memory.device import CONTEXT_BYTES, DeviceFacts, device_memory_errors
from chainfed_engine.memory.plan import Choices, Request, StoreSizes, make_plan, predict
from chainfed_engine.types import ModelShape

MIB = 1 << 20
SHAPE = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
SIZES = StoreSizes(32 * 136 * MIB, 16 * 34 * MIB, 530 * MIB, 136 * MIB, 32, 16)
CONFIG = ChainConfig(window=2, batch_size=4, sequence_length=512, stand_in=False, adapter_size=64)
CHOICES = Choices(num_slots=4, micro_batch=4, recompute=True, cache_format="int8", fill_bytes=16 * MIB)


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


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), device_memory_errors("cuda", 1, 1):
        raise RuntimeError("something else")
