"""What doctor says of CUDA, on machines that a test makes up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chainfed_engine import native
from chainfed_engine.cli import doctor_cuda
from chainfed_engine.errors import UnsupportedHardware

DEVICE = {
    "name": "Orin",
    "architecture": 87,
    "num_processors": 16,
    "is_unified": True,
    "total_bytes": 8 << 30,
    "free_bytes": 6 << 30,
    "has_library": False,
    "library_from_tokens": None,
    "driver_version": 12060,
    "runtime_version": 12060,
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(native, "cuda_is_built", lambda: True)
    monkeypatch.setattr(native, "cuda_architectures", lambda: "87")
    monkeypatch.setattr(native, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(native, "cuda_device", lambda index: dict(DEVICE))
    yield monkeypatch


def test_a_build_without_cuda_is_a_note(tmp_path: Path) -> None:
    native.set_cuda_library(str(tmp_path / "missing.so"))
    try:
        report, problems = doctor_cuda.examine()
    finally:
        native.set_cuda_library(None)
    assert problems == []
    assert doctor_cuda.render(report) == ["cuda      not built (CHAINFED_CUDA=1 where nvcc is)"]


def test_a_driver_that_is_too_old_is_told_and_is_no_problem(built: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise UnsupportedHardware("num_cuda_devices: CUDA: ...; the driver serves CUDA 12.2, this build needs 13.0")

    built.setattr(native, "num_cuda_devices", refuse)
    report, problems = doctor_cuda.examine()
    assert problems == []
    assert "the driver serves CUDA 12.2, this build needs 13.0" in doctor_cuda.render(report)[0]


def test_no_device_is_said(built: pytest.MonkeyPatch) -> None:
    built.setattr(native, "num_cuda_devices", lambda: 0)
    report, problems = doctor_cuda.examine()
    assert (problems, doctor_cuda.render(report)) == ([], ["cuda      built for 87, no device"])


@pytest.mark.parametrize(
    ("error", "problem"),
    [(1e-4, None), (0.5, "cuda:0: int4 linear off by 0.5 of float64"), (None, "cuda:0: torch has no CUDA for it")],
)
def test_a_launch_that_is_wrong_or_impossible_is_a_problem(
    built: pytest.MonkeyPatch, error: float | None, problem: str | None
) -> None:
    report, problems = doctor_cuda.examine(lambda index: error)
    assert len(problems) == (0 if problem is None else 1)
    assert problem is None or problems[0].startswith(problem)
    (line,) = doctor_cuda.render(report)
    assert "cuda:0 Orin, sm_87, 6.0 GiB free of 8.0 GiB (shared with the CPU), cuBLASLt missing" in line


def test_an_architecture_that_is_not_built_is_a_problem(built: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> dict[str, Any]:
        raise UnsupportedHardware(
            "cuda_device: cuda:0 is of architecture sm_87, this build has code for 90; rebuild with "
            "CHAINFED_CUDA_ARCHITECTURES=87"
        )

    built.setattr(native, "cuda_device", refuse)
    _, problems = doctor_cuda.examine()
    assert "CHAINFED_CUDA_ARCHITECTURES=87" in problems[0]
