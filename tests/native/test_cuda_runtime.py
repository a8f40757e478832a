"""What csrc/cuda/runtime.cu and library_product.cu do when the driver, a device or cuBLASLt refuses: the same sources
as in a CUDA build, over a CUDA runtime and a cuBLASLt that do what CHAINFED_FAKE_CUDA says (tests/csrc/fake_cuda).
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine import native
from chainfed_engine.errors import ChainfedError, InvalidArgument, MemoryBudgetExceeded, UnsupportedHardware

sys.path.insert(0, str(Path(__file__).parent))
from arrays import aligned
from fake_cuda import EMULATOR, NEEDS_EMULATOR, empty
from test_cuda_border import COLS, ROWS, TOKENS, Weights, forward, lease_of, normal, on_device


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    if EMULATOR is None:
        pytest.skip(NEEDS_EMULATOR)
    native.set_cuda_library(str(EMULATOR))
    yield monkeypatch
    monkeypatch.delenv("CHAINFED_FAKE_CUDA", raising=False)
    native.set_cuda_library(None)


def in_a_new_process(code: str, **environment: str) -> str:
    """What the code prints, in a process that has opened no device yet; `library` is the fake's ctypes handle."""
    if EMULATOR is None:
        pytest.skip(NEEDS_EMULATOR)
    head = (
        "import ctypes, numpy as np\nfrom chainfed_engine import native\n"
        f"native.set_cuda_library({str(EMULATOR)!r})\nlibrary = ctypes.CDLL({str(EMULATOR)!r})\n"
        "def told(call):\n    try:\n        return call()\n"
        "    except Exception as error:\n        return f'{type(error).__name__}: {error}'\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[2]), **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("driver=12020", "the driver serves CUDA 12.2, this build needs 13.0; update the driver"),
        ("driver=0", "no CUDA driver is loaded; install NVIDIA's driver"),
        ("cudaGetDeviceCount=803", "the driver serves CUDA 13.0, this build needs 13.0"),  # a mixed-up container
    ],
)
def test_a_driver_that_does_not_do_is_told(fake: pytest.MonkeyPatch, setting: str, words: str) -> None:
    fake.setenv("CHAINFED_FAKE_CUDA", setting)
    with pytest.raises(UnsupportedHardware, match=words):
        native.num_cuda_devices()


def test_a_machine_without_a_device_has_none(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("CHAINFED_FAKE_CUDA", "devices=0")
    assert native.num_cuda_devices() == 0
    said = in_a_new_process("print(told(lambda: native.cuda_device(0)))", CHAINFED_FAKE_CUDA="devices=0")
    assert said == "InvalidArgument: cuda_device: cuda:0 is no device of this machine, which has 0; " + (
        "change the argument that is named"
    )


def test_a_place_on_a_driver_that_is_too_old_is_refused_before_torch_is_asked() -> None:
    code = "from chainfed_engine.model.place import find_place\nprint(told(lambda: find_place('cuda')))"
    said = in_a_new_process(code, CHAINFED_FAKE_CUDA="driver=12020")
    assert said.startswith("UnsupportedHardware: cuda_device: CUDA: the number of devices: ")
    assert "the driver serves CUDA 12.2, this build needs 13.0" in said


@pytest.mark.parametrize(
    ("architecture", "built", "words"),
    [
        (75, "80,87,89,90", "sm_75; the kernels need sm_80 (Ampere) or newer"),
        (87, "90", "sm_87, this build has code for 90; rebuild with CHAINFED_CUDA_ARCHITECTURES=87"),
        (86, "87,89", "sm_86, this build has code for 87,89; rebuild with CHAINFED_CUDA_ARCHITECTURES=86"),
    ],
)
def test_an_architecture_that_is_not_built_names_it_and_the_flag(architecture: int, built: str, words: str) -> None:
    code = "print(told(lambda: native.cuda_device(0)))"
    said = in_a_new_process(code, CHAINFED_FAKE_CUDA=f"architecture={architecture}", CHAINFED_FAKE_CUDA_BUILT=built)
    assert said == f"UnsupportedHardware: cuda_device: cuda:0 is of architecture {words}"


def test_an_architecture_newer_than_the_build_runs_its_portable_code() -> None:
    code = "print(native.cuda_device(0)['architecture'])"
    assert in_a_new_process(code, CHAINFED_FAKE_CUDA="architecture=120", CHAINFED_FAKE_CUDA_BUILT="87") == "120"


@pytest.mark.parametrize(
    ("status", "expected", "words"),
    [
        (1, InvalidArgument, "a copy to the device"),
        (2, MemoryBudgetExceeded, r"out of memory; set a smaller \[memory\] budget"),
        (209, UnsupportedHardware, "rebuild with CHAINFED_CUDA_ARCHITECTURES"),
        (222, UnsupportedHardware, "rebuild with CHAINFED_CUDA_ARCHITECTURES"),
        (700, ChainfedError, "an earlier kernel may be the cause"),
    ],
)
def test_every_status_becomes_its_error(
    fake: pytest.MonkeyPatch, tmp_path: Path, status: int, expected: type[Exception], words: str
) -> None:
    reader, _, _ = lease_of(tmp_path, pinned_for=0)
    slot = empty((reader.slot_bytes(),), np.uint8)
    with reader.acquire(0) as lease:
        fake.setenv("CHAINFED_FAKE_CUDA", f"cudaMemcpyAsync={status}")
        with pytest.raises(expected, match=words) as raised:
            lease.copy_to(slot, stream=3)
        assert type(raised.value) is expected
        fake.delenv("CHAINFED_FAKE_CUDA")
        lease.copy_to(slot, stream=3)  # the error does not come back
    reader.close()


def test_a_stream_of_another_device_is_the_callers_mistake(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, _, _ = lease_of(tmp_path, pinned_for=0)
    slot = empty((reader.slot_bytes(),), np.uint8)
    with reader.acquire(0) as lease, pytest.raises(InvalidArgument, match="one of the arrays' device"):
        lease.copy_to(slot, stream=666)
    reader.close()


def test_memory_that_cannot_be_pinned_is_a_budget_too_large(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake.setenv("CHAINFED_FAKE_CUDA", "cudaHostRegister=2")
    reader, _, _ = lease_of(tmp_path, pinned_for=0)
    with pytest.raises(
        MemoryBudgetExceeded, match=r"pinning host memory: out of memory; set a smaller \[memory\] budget"
    ):
        reader.acquire(0)
    fake.delenv("CHAINFED_FAKE_CUDA")
    reader.acquire(0).release()  # and the slot is not lost
    reader.close()


def test_slots_are_unpinned_where_they_were_pinned(fake: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = ctypes.CDLL(str(EMULATOR))
    before = library.fake_cuda_num_pinned()
    reader, _, _ = lease_of(tmp_path, pinned_for=1)
    reader.acquire(0).release()
    assert library.fake_cuda_num_pinned() == before + 1
    reader.close()
    assert library.fake_cuda_num_pinned() == before


def test_work_on_the_second_device_makes_no_context_on_the_first() -> None:
    code = (
        "before = library.fake_cuda_current_context()\nnative.cuda_device(1)\n"
        "native.linear_forward_workspace_bytes('int4', 5, 24, 70, device=1)\n"
        "print(library.fake_cuda_has_context(0), library.fake_cuda_has_context(1),"
        " library.fake_cuda_current_context() == before)"
    )
    assert in_a_new_process(code) == "0 1 True"


def library_forward(fake: pytest.MonkeyPatch, block_format: str, setting: str) -> Any:
    weights, x = Weights(block_format), on_device(normal(TOKENS, COLS, 1))
    native.set_library_from_tokens(0, 1)
    try:
        size = native.linear_forward_workspace_bytes(block_format, TOKENS, ROWS, COLS, device=0)
        fake.setenv("CHAINFED_FAKE_CUDA", setting)
        return forward(weights, x, "int8", workspace=empty((size,), np.uint8))
    finally:
        native.set_library_from_tokens(0, None)


@pytest.mark.parametrize(
    ("block_format", "setting", "expected", "words"),  # a format each: choices are kept
    [
        ("int4", "cublasLtMatmul=3", MemoryBudgetExceeded, r"out of memory for a product; set a smaller \[memory\]"),
        ("int4", "cublasLtMatmul=13", ChainfedError, "a product failed with status 13"),
    ],
)
def test_what_cublaslt_refuses_is_told(
    fake: pytest.MonkeyPatch, block_format: str, setting: str, expected: type[Exception], words: str
) -> None:
    with pytest.raises(expected, match=words):
        library_forward(fake, block_format, setting)


@pytest.mark.parametrize("setting", ["algorithms=0", "cublasLtMatmulAlgoGetHeuristic=15"])
def test_no_algorithm_for_a_product_is_told_and_asked_for_again(fake: pytest.MonkeyPatch, setting: str) -> None:
    rows, tokens = 16, 3 + len(setting)  # of no other test: choices are kept
    weights = Weights("int4", rows=rows)
    native.set_library_from_tokens(0, 1)
    try:
        size = native.linear_forward_workspace_bytes("int4", tokens, rows, COLS, device=0)
        x, out = on_device(normal(tokens, COLS, 1)), empty((tokens, rows), np.float32)
        arguments = {"activation": "int8", "out": out, "workspace": empty((size,), np.uint8)}
        fake.setenv("CHAINFED_FAKE_CUDA", setting)
        with pytest.raises(UnsupportedHardware, match=r"knows no algorithm .* CHAINFED_CUDA_LIBRARY_FROM"):
            native.linear_forward(weights.matrix, x, None, **arguments)
        fake.delenv("CHAINFED_FAKE_CUDA")
        native.linear_forward(weights.matrix, x, None, **arguments)
        assert np.abs(out.values).max() > 0
    finally:
        native.set_library_from_tokens(0, None)


def test_a_cublaslt_that_cannot_start_is_as_if_it_were_missing() -> None:
    code = "print(native.cuda_device(0)['has_library'], native.cuda_device(0)['library_from_tokens'])"
    assert in_a_new_process(code, CHAINFED_FAKE_CUDA="cublasLtCreate=1") == "False None"
    assert in_a_new_process(code) == "True 512"


def test_the_crossover_can_be_set_from_outside() -> None:
    code = "print(told(lambda: native.cuda_device(0)['library_from_tokens']))"
    assert in_a_new_process(code, CHAINFED_CUDA_LIBRARY_FROM="300") == "300"
    assert "CHAINFED_CUDA_LIBRARY_FROM must be a number of tokens" in in_a_new_process(
        code, CHAINFED_CUDA_LIBRARY_FROM="some"
    )


def test_pageable_memory_is_not_a_devices(fake: pytest.MonkeyPatch) -> None:
    """An array on the CPU never reaches a device call, whatever its size."""
    weights = Weights("int4")
    with pytest.raises(InvalidArgument, match="x must be on cuda:0 as matrix is"):
        forward(weights, aligned((TOKENS, COLS), np.float32))
