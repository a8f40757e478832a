"""`chainfed doctor`: what this machine and this installation can do, checked by doing it.

At every instruction set the processor has, kernels are launched and held to the float64 reference: int4 weights are
quantised, the linear is computed with f32 and with int8 activations. On a small random model, or the store named, the
engine's shortcuts are held to the long way (doctor_model.py). `examine` returns a plain dict (the --json output),
`render` the same as text, to be pasted into an issue; `verdict` lists every problem found.
"""

import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine import native
from chainfed_engine._version import __version__
from chainfed_engine.cli import doctor_cuda, machine
from chainfed_engine.errors import ChainfedError
from chainfed_engine.native import reference
from chainfed_engine.sizes import format_size

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_TOKENS, _ROWS, _COLS = 33, 203, 179  # odd sizes, so that tails are computed too

# int4 with a scale and an offset a block of 32 Gaussian weights: steps of about range / 15 = 4.1 sigma / 15, and a
# uniform error of step / sqrt(12), is 0.08 sigma.
_MAX_QUANTISATION_ERROR = 0.12
# A sum of 179 products in float32: 179 * 2**-24 = 1.1e-5 of the sum of magnitudes is the worst case.
_MAX_F32_ERROR = 2e-5
_MIN_INT8_COSINE = 0.9999  # promised in csrc/include/chainfed/kernels.h


def examine(disk: str | None = None, store: str | None = None) -> dict[str, Any]:
    """All facts and checks. `disk`: the folder whose disk is measured (default: the temporary folder); `store`: the
    model that is checked (default: a small random one)."""
    kernels = [_check_level(level) for level in native.simd_levels()]
    native.set_simd_level(None)
    report: dict[str, Any] = {
        "versions": _versions(),
        "cpu": {
            "name": machine.cpu_name(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": native.num_threads(),
            "simd_built": native.build_info().get("simd", "").split(),
            "simd_supported": native.simd_levels(),
            "simd_in_force": native.simd_level(),
        },
        "kernels": kernels,
        "memory": {
            **machine.memory_bytes(),
            "copy_bytes_per_s": machine.copy_bytes_per_s(),
            "cgroup_limit_bytes": machine.cgroup_limit_bytes(),
            "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        },
        "disk": machine.disk_speed(Path(disk if disk is not None else tempfile.gettempdir())),
    }
    report["cuda"], cuda_problems = doctor_cuda.examine()
    model = report["model"] = _check_model(store)
    problems = [f"kernels at {row['level']}: {row['problem']}" for row in kernels if row["problem"]] + cuda_problems
    problems += [f"{name} is not installed" for name in _PACKAGES if report["versions"][name] is None]
    problems += [f"{row['name']}: {row['problem']}" for row in model["checks"] if row["problem"]]
    report["verdict"] = {"ok": not problems, "problems": problems}
    return report


def render(report: dict[str, Any]) -> str:
    """The report as lines for people, the verdict last."""
    cpu, memory, disk = report["cpu"], report["memory"], report["disk"]
    limit = memory["cgroup_limit_bytes"]
    lines = [
        "versions  " + "  ".join(f"{name} {version or '(missing)'}" for name, version in report["versions"].items()),
        f"cpu       {cpu['name'] or cpu['machine']}, {cpu['cores']} cores, {cpu['threads']} threads",
        f"simd      {cpu['simd_in_force']} in force; supported: {', '.join(cpu['simd_supported'])}; "
        f"built: {', '.join(cpu['simd_built'])}",
    ]
    for row in report["kernels"]:
        figures = "did not run"
        if row["linear_us"] is not None:
            accuracy = f"f32 error {row['f32_relative_error']:.1e}, int8 cosine {row['int8_cosine']:.6f}"
            figures = f"{accuracy}, {row['linear_us']:.0f} us"
        lines.append(f"kernel    {row['level']}: {'wrong' if row['problem'] else 'right'}, {figures}")
    lines += doctor_cuda.render(report["cuda"])
    lines += [
        f"memory    {_size(memory['total_bytes'])} total, {_size(memory['available_bytes'])} available, cgroup limit "
        f"{format_size(limit) if limit is not None else 'none'}, "
        f"copies {format_size(memory['copy_bytes_per_s'])}/s, pages of {memory['page_bytes']} bytes",
        f"disk      {disk['folder']}: write {format_size(disk['write_bytes_per_s'])}/s, read "
        f"{format_size(disk['read_bytes_per_s'])}/s, {_direct(disk['direct_read_bytes_per_s'])}, "
        f"{format_size(disk['free_bytes'])} free",
    ]
    lines += _model_lines(report["model"])
    problems = report["verdict"]["problems"]
    return "\n".join([*lines, *(f"problem   {problem}" for problem in problems), "verdict   " + _verdict(problems)])


def _check_model(store: str | None) -> dict[str, Any]:
    """A store that cannot be opened is an error of the caller's where he named it, else a problem of this machine."""
    from chainfed_engine.cli.doctor_model import check_model

    try:
        return check_model(Path(store) if store is not None else None)
    except ChainfedError as error:
        if store is not None:
            raise
        return {"store": None, "checks": [{"name": "a small model", "problem": str(error), "seconds": 0.0}]}


def _model_lines(model: dict[str, Any]) -> list[str]:
    what = "a small random model" if model["store"] is None else model["store"]
    lines = []
    if "architecture" in model:
        lines.append(
            f"model     {what}: {model['architecture']}, {model['num_layers']} layers in {model['block_format']}, "
            f"{format_size(model['store_bytes'])}, read at {format_size(model['direct_read_bytes_per_s'] or 0)}/s"
        )
    checks = model["checks"]
    return lines + [
        f"check     {row['name']}: {'no' if row['problem'] else 'yes'}, {row['seconds']} s" for row in checks
    ]


def _direct(speed: int | None) -> str:
    return "direct reads are refused" if speed is None else f"direct read {format_size(speed)}/s"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "chainfed-engine": __version__,
        "core": f"{native.build_info()['version']} ({native.build_info().get('compiler', 'unknown compiler')})",
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["system"] = f"{sys.platform} {platform.release()}"
    return versions


def _check_level(level: str) -> dict[str, Any]:
    """Launch the kernels at `level`; `problem` says what is wrong, None if nothing is."""
    row: dict[str, Any] = dict.fromkeys(("problem", "f32_relative_error", "int8_cosine", "linear_us"))
    try:
        native.set_simd_level(level)
        return {"level": level, **_measure()}
    except ChainfedError as error:
        return {"level": level, **row, "problem": str(error)}


def _measure() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((_ROWS, _COLS), dtype=np.float32)
    x = rng.standard_normal((_TOKENS, _COLS), dtype=np.float32)
    codes = _aligned_bytes(native.codes_bytes("int4", _ROWS, _COLS))
    scales = _aligned_bytes(native.scales_bytes("int4", _ROWS, _COLS)).view(np.float16)
    native.quantize_blocks(weight, block_format="int4", codes_out=codes, scales_out=scales)
    matrix = native.Matrix.from_arrays(codes, scales, block_format="int4", num_rows=_ROWS, num_cols=_COLS)
    decoded = reference.dequantize(codes, scales, block_format="int4", num_rows=_ROWS, num_cols=_COLS)
    truth = reference.linear_forward(decoded, x, None)
    magnitude = reference.linear_forward(np.abs(decoded), np.abs(x), None)
    workspace = _aligned_bytes(native.linear_forward_workspace_bytes("int4", _TOKENS, _ROWS, _COLS))
    out = {name: np.empty((_TOKENS, _ROWS), dtype=np.float32) for name in ("f32", "int8")}
    started = 0.0
    for name in ("f32", "int8"):
        started = time.perf_counter()
        native.linear_forward(matrix, x, None, activation=name, out=out[name], workspace=workspace)
    linear_us = 1e6 * (time.perf_counter() - started)
    quantisation_error = float(np.sqrt(np.mean((decoded - weight) ** 2)))
    f32_error = float(np.max(np.abs(out["f32"] - truth) / magnitude))
    cosine = _cosine(out["int8"].astype(np.float64), truth)
    problem = None
    if not quantisation_error <= _MAX_QUANTISATION_ERROR:
        problem = f"int4 error {quantisation_error:.3g}, expected at most {_MAX_QUANTISATION_ERROR}"
    elif not f32_error <= _MAX_F32_ERROR:
        problem = f"f32 linear off by {f32_error:.3g} of float64, expected at most {_MAX_F32_ERROR}"
    elif not cosine >= _MIN_INT8_COSINE:
        problem = f"int8 linear has cosine {cosine:.6f} with float64, expected at least {_MIN_INT8_COSINE}"
    return {"problem": problem, "f32_relative_error": f32_error, "int8_cosine": cosine, "linear_us": linear_us}


def _cosine(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float:
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def _aligned_bytes(num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Bytes aligned to 64, as the core asks of codes and workspaces."""
    raw = np.empty(num_bytes + 63, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes]


def _size(num_bytes: int | None) -> str:
    return format_size(num_bytes) if num_bytes is not None else "unknown"


def _verdict(problems: list[str]) -> str:
    if not problems:
        return "this machine is ready"
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, see above"
