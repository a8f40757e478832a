"""What a row of results says about where it was measured, and the peaks that shares refer to."""

import ctypes
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from chainfed_engine import native
from chainfed_engine.memory import meter

ROOT = Path(__file__).parents[2]
PEAK = ROOT / "build" / "peak"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_pages() -> None:
    """Freed memory stays with the process, so that peers that allocate their output do not pay for fresh pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


@cache
def facts() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "machine": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "threads": native.num_threads(),
        "clock": "cpu" if native.num_threads() == 1 else "wall",
        "simd": native.simd_level(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{named.get('model name', platform.machine())} family {named.get('cpu family', '?')}"


@cache
def peaks() -> dict[str, float]:
    """f32_gflops, int8_gops and copy_gb_s of this machine at the level and threads in force; see peak.cpp."""
    if not PEAK.exists():
        raise FileNotFoundError(f"{PEAK} is missing: build it with `make bench-kernels` or cmake -DCHAINFED_BENCH=ON")
    command = [str(PEAK), native.simd_level(), str(native.num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    measured: dict[str, float] = json.loads(run.stdout)
    return measured


def peak_growth_bytes(run: object) -> int | None:
    """Most resident bytes above those before the call, of one call on a trimmed heap; None where /proc refuses."""
    native.trim_heap()
    if not meter.reset_peak_rss():
        return None
    before = meter.rss_bytes()
    run()  # type: ignore[operator]
    return max(0, meter.peak_rss_bytes() - before)
