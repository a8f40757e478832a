"""The checks of bench/cuda/checks.py on a real device, held to the CPU kernels' error budgets against float64."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_engine import native
from chainfed_engine.errors import UnsupportedHardware

_PATH = Path(__file__).parents[2] / "bench" / "cuda" / "checks.py"
_SPEC = importlib.util.spec_from_file_location("cuda_checks", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
checks: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(checks)


def why_not() -> str | None:
    """The reason why no device can be used here, None where one can."""
    if not native.cuda_is_built():
        return "the CUDA backend is not built (CHAINFED_CUDA=1)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        native.cuda_device(0)
    except UnsupportedHardware as error:
        return str(error)
    return None


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_on_the_device(check: Any) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    check()
