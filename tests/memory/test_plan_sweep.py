"""Prediction against measurement: real runs, each in a process of its own. The whole sweep is `make memory-sweep`."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SWEEP = Path(__file__).parents[2] / "bench" / "memory" / "sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", SWEEP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("CHAINFED_MEMORY_SWEEP" not in os.environ, reason="minutes: set CHAINFED_MEMORY_SWEEP")
@pytest.mark.parametrize("case", ["llama-576-streamed", "bert-1024"])
def test_the_prediction_is_never_below_the_measurement_and_at_most_15_percent_above(
    sweep: ModuleType, case: str, tmp_path: Path
) -> None:
    figures = sweep.in_process(case, tmp_path)
    assert 1.0 <= figures["ratio"] <= 1.15, figures


def test_the_sweep_refuses_a_case_it_does_not_know() -> None:
    done = subprocess.run([sys.executable, str(SWEEP), "--one", "no-such", "."], capture_output=True, check=False)
    assert done.returncode != 0
