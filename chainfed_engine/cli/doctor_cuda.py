"""The CUDA part of `chainfed doctor`: whether it is built, what devices it sees, and a kernel launched on each.

`examine` returns `built`, `architectures`, `devices` (as `native.cuda_device` describes them, with `linear_error`: of
an int4 product against float64, None if it was not launched) and `notes`; problems are what would make
`device = "cuda"` fail on a device that is there. A machine without a device is no problem.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from chainfed_engine import native
from chainfed_engine.errors import ChainfedError
from chainfed_engine.native import reference
from chainfed_engine.sizes import format_size

_MAX_LINEAR_ERROR = 1e-3  # factors of 11 bits (tests/csrc/cuda_linear_test.cpp)
Launch = Callable[[int], float | None]


def examine(launch: "Launch | None" = None) -> tuple[dict[str, Any], list[str]]:
    """The facts and the problems. `launch(device)`: the error of a product there, None where torch cannot go there."""
    report: dict[str, Any] = {"built": native.cuda_is_built(), "architectures": None, "devices": [], "notes": []}
    if not report["built"]:
        report["notes"].append("not built (CHAINFED_CUDA=1 where nvcc is)")
        return report, []
    report["architectures"] = native.cuda_architectures()
    try:
        count = native.num_cuda_devices()
    except ChainfedError as error:
        report["notes"].append(str(error))
        return report, []
    problems = []
    for index in range(count):
        try:
            device: dict[str, Any] = {"index": index, **native.cuda_device(index)}
            device["linear_error"] = (launch or _linear_error)(index)
            if device["linear_error"] is None:
                problems.append(f"cuda:{index}: torch has no CUDA for it; install the torch of this driver")
            elif not device["linear_error"] <= _MAX_LINEAR_ERROR:
                problems.append(f"cuda:{index}: int4 linear off by {device['linear_error']:.3g} of float64")
            report["devices"].append(device)
        except ChainfedError as error:
            problems.append(f"cuda:{index}: {error}")
    return report, problems


def render(report: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [f"cuda      {note}" for note in report["notes"]]
    if not lines and not report["devices"]:
        lines.append(f"cuda      built for {report['architectures']}, no device")
    for device in report["devices"]:
        memory = "shared with the CPU" if device["is_unified"] else "its own"
        error = device["linear_error"]
        lines.append(
            f"cuda      cuda:{device['index']} {device['name']}, sm_{device['architecture']}, "
            f"{format_size(device['free_bytes'])} free of {format_size(device['total_bytes'])} ({memory}), cuBLASLt "
            f"{'found' if device['has_library'] else 'missing'}, int4 linear "
            f"{'not launched' if error is None else f'error {error:.1e}'}"
        )
    return lines


def _linear_error(index: int) -> float | None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() <= index:
        return None
    rows, cols, tokens, device = 203, 179, 33, torch.device("cuda", index)
    generator = torch.Generator().manual_seed(7)
    weight, x = (torch.randn(count, cols, generator=generator) for count in (rows, tokens))
    codes = torch.empty(native.codes_bytes("int4", rows, cols), dtype=torch.uint8)
    scales = torch.empty(native.scales_bytes("int4", rows, cols) // 2, dtype=torch.float16)
    native.quantize_blocks(weight, block_format="int4", codes_out=codes, scales_out=scales)
    values = reference.dequantize(codes.numpy(), scales.numpy(), block_format="int4", num_rows=rows, num_cols=cols)
    there = codes.to(device), scales.to(device)
    matrix = native.Matrix.from_arrays(*there, block_format="int4", num_rows=rows, num_cols=cols)
    size = native.linear_forward_workspace_bytes("int4", tokens, rows, cols, index)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    out = torch.empty(tokens, rows, device=device)
    stream = int(torch.cuda.current_stream(device).cuda_stream)
    native.linear_forward(matrix, x.to(device), None, activation="int8", out=out, workspace=workspace, stream=stream)
    truth = reference.linear_forward(values, x.numpy(), None)
    return float(np.linalg.norm(out.cpu().numpy() - truth) / np.linalg.norm(truth))
