"""bench/cuda on this machine: the scripts' Python runs from end to end over the emulated CUDA library, with small sizes
and a stand-in for torch.cuda, and the shell script says what a machine lacks. What a device alone can show is left out:
graphs, streams, copies, times.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from chainfed_engine import native

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import EMULATOR, NEEDS_EMULATOR, CudaArray

BENCH = Path(__file__).parents[2] / "bench" / "cuda"
sys.path.insert(0, str(BENCH))
ON_A_DEVICE_ALONE = {
    "a_captured_graph_replays_the_product",
    "work_runs_on_the_callers_stream",
    "leased_files_are_read_on_the_device",
}


def there(value: Any) -> Any:
    """A torch tensor, or each of a tuple, as an array on cuda:0 over the same memory."""
    if isinstance(value, tuple):
        return tuple(there(one) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        return CudaArray(value.view(torch.uint16).numpy(), code=4)
    return CudaArray(value.detach().numpy())


class NativeOnADevice:
    """`native`, whose calls with a stream and whose matrices are on the emulated device."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(native, name)
        if not callable(real) or isinstance(real, type):
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            if "stream" not in named:
                return real(*arguments, **named)
            return real(*(there(one) for one in arguments), **{key: there(one) for key, one in named.items()})

        return call

    class Matrix:
        kept: ClassVar[list[Any]] = []  # what matrices look at

        @classmethod
        def from_arrays(cls, codes: Any, scales: Any, **named: Any) -> native.Matrix:
            arrays = there(codes), there(scales)
            cls.kept.append(arrays)
            return native.Matrix.from_arrays(*arrays, **named)


class Clock:
    """torch.cuda.Event by the processor's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Clock") -> float:
        return max(1e3 * (end.seconds - self.seconds), 1e-6)


class Queue:
    """torch.cuda.Stream."""

    cuda_stream = 7

    def wait_stream(self, other: "Queue") -> None: ...


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    if EMULATOR is None:
        pytest.skip(NEEDS_EMULATOR)
    native.set_cuda_library(str(EMULATOR))
    modules = {name: importlib.import_module(name) for name in ("checks", "times", "step", "summary")}
    for name, value in {
        "Event": Clock, "synchronize": lambda: None, "empty_cache": lambda: None, "memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 5, "max_memory_reserved": lambda: 5,
        "Stream": Queue, "current_stream": Queue, "stream": lambda one: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("checks", "times"):
        monkeypatch.setattr(modules[name], "native", NativeOnADevice())
        monkeypatch.setattr(modules[name], "DEVICE", "cpu")
    yield modules
    native.set_library_from_tokens(0, None)
    native.set_cuda_library(None)
    NativeOnADevice.Matrix.kept.clear()


def run(main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    return main()


def test_checks_times_step_and_summary_run_from_end_to_end(
    scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks, times, step = scripts["checks"], scripts["times"], scripts["step"]
    out = tmp_path / "results.jsonl"
    possible = [check for check in checks.CHECKS if check.__name__ not in ON_A_DEVICE_ALONE]
    assert len(possible) == len(checks.CHECKS) - len(ON_A_DEVICE_ALONE)
    for module, changes in {
        checks: {"CHECKS": possible, "SHAPES": ((3, 17, 33), (65, 40, 72)), "HEAD_SHAPE": (5, 70, 40)},
        times: {
            "MATRICES": ((64, 96),), "TOKENS": (1, 17), "VOCABULARY": 80, "HIDDEN": 64, "ADAPTER": 4, "SQUARE": 16,
            "HEAD_TOKENS": (3,), "LAYER_TOKENS": 5, "LAYER": ((64, 32), (32, 64)), "COPY_BYTES": 1024,
            "_FLUSH_BYTES": 64,
        },
        step: {
            "WIDTH": 64, "INNER": 96, "VOCABULARY": 300, "ADAPTER": 4, "SQUARE": 16, "DEVICE": "cpu",
            "CONFIG": {**step.CONFIG, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 300,
                       "num_attention_heads": 4, "num_key_value_heads": 2},
        },
    }.items():  # fmt: skip
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value)
    assert run(checks.main, monkeypatch, "--out", str(out), "--build-seconds", "5") == 0
    assert run(times.main, monkeypatch, "--out", str(out), "--seconds", "200") == 0
    done = run(step.main, monkeypatch, "--out", str(out), "--tokens", "8", "--batch", "2")
    assert done == 0, out.read_text().splitlines()[-1]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"machine", "check", "time", "crossover", "step"}
    assert not [row for row in rows if "problem" in row or "left_out" in row]
    assert sum(row["kind"] == "check" and row["ok"] for row in rows) == len(possible)
    assert {row["block_format"] for row in rows if row["kind"] == "crossover"} == {"int4", "nf4", "int8"}
    capsys.readouterr()
    assert run(scripts["summary"].main, monkeypatch, str(out)) == 0
    said = capsys.readouterr().out
    assert f"{len(possible)} of {len(possible)} checks hold" in said
    assert "head, of bf16" in said and "crossover to cuBLASLt: used from" in said


def test_a_part_that_runs_out_of_time_says_what_it_left(
    scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(scripts["times"], "SECTIONS", (("one", lambda: iter([{"kind": "time"}])),))
    assert run(scripts["times"].main, monkeypatch, "--out", str(out), "--seconds", "0") == 0
    assert json.loads(out.read_text().splitlines()[-1])["left_out"] == "the rest from one"


def test_the_summary_measures_goals_and_names_what_failed() -> None:
    summary = importlib.import_module("summary")
    product = {"kind": "time", "what": "linear forward", "block_format": "int4"}
    rows = [
        {"kind": "machine", "device": {"architecture": 90, "library_from_tokens": 512}},
        {"kind": "check", "name": "first", "ok": True},
        {"kind": "check", "name": "second", "ok": False, "problem": "AssertionError: far off"},
        {**product, "tokens": 64, "ratio": 2.5},
        {**product, "tokens": 64, "ratio": 1.25},
        {**product, "tokens": 2048, "ratio": 0.95},
        {
            "kind": "crossover",
            "matrix": [8, 4],
            "block_format": "int4",
            "direction": "grad",
            "library_from_tokens": 256,
        },
    ]
    lines, right = summary.summary(rows)
    text = "\n".join(lines)
    assert not right
    assert "1 of 2 checks hold" in text and "check failed: second: AssertionError: far off" in text
    assert "forward, 64 tokens, of bf16  1.25 MISSES >= 2.0 (calculated for H100: 1.1 to 1.9)" in text
    assert "forward, 2048 and more       0.95 meets >= 0.9" in text
    assert "forward, 1024, of bf16       not measured" in text
    assert "used from 512 tokens" in text and "256  int4 8x4 grad" in text and "the row for sm_90" in text
    assert summary.summary([])[1] is False  # nothing ran


def shell(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        ["sh", str(BENCH / "run.sh"), *arguments], capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip
    return done.returncode, done.stderr.strip()


def test_a_machine_without_a_device_is_told_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    status, said = shell()
    assert status == 2
    assert said.count("\n") == 0
    assert said.startswith(f"bench/cuda/run.sh: no CUDA device: torch {torch.__version__} sees none")


def test_a_machine_without_python_or_packages_is_told_in_one_line(tmp_path: Path) -> None:
    assert shell(PYTHON="/nowhere/python3") == (
        2,
        "bench/cuda/run.sh: no /nowhere/python3; name one with PYTHON=/path/to/python3",
    )
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    assert shell(PYTHON=str(bare)) == (2, f"bench/cuda/run.sh: {bare} has no numpy")


def test_the_checks_need_no_package_but_torch_and_numpy(tmp_path: Path) -> None:
    """On a bare machine: everything that a wheel of ours would bring along is missing."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('transformers', 'safetensors', 'rich', 'jinja2', 'pandas', 'pytest',\n"
        "                                      'tokenizers', 'datasets', 'peft', 'gguf', 'pybind11'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import checks, times, summary, step\n"
        "sys.argv = ['step', '--out', sys.argv[1]]\n"
        "print(step.main())\n"
    )
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=280, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{BENCH}{os.pathsep}{BENCH.parents[1]}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
    assert json.loads(out.read_text())["left_out"] == "transformers is not installed"
