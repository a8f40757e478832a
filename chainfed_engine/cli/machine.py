"""Facts of this machine, read from Linux' own files: processor, memory, limits of memory cgroups, disk speed.

Nothing here needs more rights than a user has; what the kernel does not tell is None.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine.errors import StorageError

_PROBE_BYTES = 32 << 20  # large enough that one request's latency does not decide, small enough for any disk
_CHUNK_BYTES = 1 << 20
_COPY_BYTES = 64 << 20
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63


def cpu_name() -> str | None:
    """The processor's name as /proc/cpuinfo has it (x86 `model name`, Arm boards `Model`)."""
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return None


def memory_bytes() -> dict[str, int | None]:
    """`total_bytes`, `available_bytes` (free, and what the kernel would give back)."""
    values: dict[str, int] = {}
    for line in _lines(Path("/proc/meminfo")):
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            values[name] = int(fields[0]) * 1024
    return {"total_bytes": values.get("MemTotal"), "available_bytes": values.get("MemAvailable")}


def cgroup_limit_bytes(root: Path = Path("/")) -> int | None:
    """The tightest memory limit on this process by its cgroup or one above it (v1 and v2); None: no limit.

    The page cache of files that the process reads counts against it.
    """
    limits = []
    for path in _limit_files(root):
        for line in _lines(path):
            if line.strip().isdigit() and int(line) < _NO_LIMIT:
                limits.append(int(line))
    return min(limits, default=None)


def disk_speed(folder: Path) -> dict[str, Any]:
    """Write (synced) and read (past the page cache where the file system allows) a probe file in `folder`."""
    data = os.urandom(_CHUNK_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="chainfed-probe-") as file:
            started = time.perf_counter()
            for _ in range(_PROBE_BYTES // _CHUNK_BYTES):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - started
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            with open(file.name, "rb", buffering=0) as reader:
                while reader.read(_CHUNK_BYTES):
                    pass
            read = time.perf_counter() - started
            direct = _direct_read_speed(file.name)
            free = os.statvfs(folder)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write a probe file of {_PROBE_BYTES} bytes: {error.strerror or error}"
        ) from error
    return {
        "folder": str(folder),
        "write_bytes_per_s": round(_PROBE_BYTES / written),
        "read_bytes_per_s": round(_PROBE_BYTES / read),
        "direct_read_bytes_per_s": direct,
        "free_bytes": free.f_bavail * free.f_frsize,
    }


def _direct_read_speed(path: str) -> int | None:
    """Bytes a second past the page cache, as the layer store reads; None where the file system refuses it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    buffer = mmap.mmap(-1, _CHUNK_BYTES)  # page-aligned, as direct reads demand
    try:
        started = time.perf_counter()
        offset = 0
        while num_bytes := os.preadv(descriptor, [buffer], offset):
            offset += num_bytes
        return round(offset / (time.perf_counter() - started))
    except OSError:
        return None
    finally:
        buffer.close()
        os.close(descriptor)


def copy_bytes_per_s() -> int:
    """Speed of copying memory on one thread, the best of five copies of 64 MiB; each byte is read and written."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return round(_COPY_BYTES / min(seconds))


def _limit_files(root: Path) -> Iterator[Path]:
    """Files with a memory limit, from the process's own cgroup up to the top of the hierarchy."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.strip().split(":", 2), "", ""][:3]
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth], name)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
