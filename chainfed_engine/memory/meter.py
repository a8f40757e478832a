"""What a stretch of a run really used: resident memory, page cache of our own files, disk reads, seconds.

Enters: the files whose page cache counts as ours, and optionally the store reader's `stats`. Leaves: a `Measurement`.
Every figure is the kernel's (/proc, mincore, the memory cgroup's files); nothing is estimated. Linux only.
"""

import ctypes
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chainfed_engine.errors import StorageError
from chainfed_engine.memory.cgroup import MemoryGroup
from chainfed_engine.memory.device import peak_device_bytes, reset_peak_device

_KIB = 1024
_PROC = Path("/proc/self")


@dataclass
class Measurement:
    """One stretch of a run; all zeros until it has ended."""

    baseline_rss_bytes: int = 0  # resident set when it began
    peak_rss_bytes: int = 0  # largest resident set since it began; since the process began if not `peak_was_reset`
    peak_was_reset: bool = False  # whether the kernel let us restart its peak counter
    page_cache_bytes: int | None = 0  # most bytes of our files seen in the page cache; None: the kernel does not tell
    cgroup_peak_bytes: int | None = None  # the kernel's own peak; None unless this process is alone in a memory cgroup
    peak_device_bytes: int | None = None  # torch's allocator on the CUDA device that was named (memory/device.py)
    shares_memory: bool = False  # whether that device and the CPU share one memory
    bytes_read: int = 0  # by the store reader where its stats are given, else by this process from any disk
    stall_ns: int = 0  # time the store reader's callers waited for the disk
    seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The figure that a budget is held against: the cgroup's peak, else peak resident set plus page cache. With a
        CUDA device: what that device held, and on a board whose memory is one, both.

        Pages of our files that are also mapped count twice in the sum: it errs upwards.
        """
        if self.peak_device_bytes is not None and not self.shares_memory:
            return self.peak_device_bytes
        host = self.cgroup_peak_bytes
        host = self.peak_rss_bytes + (self.page_cache_bytes or 0) if host is None else host
        return host + (self.peak_device_bytes or 0)


def rss_bytes() -> int:
    """Resident set of this process now."""
    return _status_bytes("VmRSS") or 0


def peak_rss_bytes() -> int:
    """Largest resident set since the process began or since `reset_peak_rss`."""
    peak = _status_bytes("VmHWM")
    # Some container kernels leave the line out; this counter is the same quantity, but cannot be reset.
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def reset_peak_rss() -> bool:
    """Let `peak_rss_bytes` start again from the present; False where the kernel refuses."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    peak = _status_bytes("VmHWM")
    return peak is not None and peak <= rss_bytes() + (8 << 20)


def resident_file_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes of these files (of all files under a folder) that are in the page cache; a missing path counts 0.

    None when the kernel does not tell: it answers only for files that we own or may write. Raises StorageError.
    """
    total = 0
    for path in paths:
        for file in (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,):
            resident = _resident_bytes_of(file)
            if resident is None:
                return None
            total += resident
    return total


def disk_bytes_read() -> int:
    """Bytes that this process fetched from disks so far, direct reads and page faults included; 0 where not counted."""
    try:
        text = (_PROC / "io").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes:")), 0)


class Meter:
    """Measures from its construction (or `restart`) on; `read` gives the figures so far.

    files: files or folders whose page cache counts. stats: `StoreReader.stats`, for bytes read and stall time.
    device: the number of the CUDA device that computes; shares_memory: whether its memory is the CPU's.
    `sample` looks at the page cache; call it where it may be fullest (the end of a step), since it has no kernel peak.
    """

    def __init__(
        self,
        files: Iterable[Path | str] = (),
        stats: Callable[[], Mapping[str, int]] | None = None,
        *,
        device: int | None = None,
        shares_memory: bool = False,
    ) -> None:
        self._files = [Path(file) for file in files]
        self._stats = stats
        self._device, self._shares_memory = device, shares_memory
        self._group = MemoryGroup.of_this_process()
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch: peaks and counters start from here."""
        self._peak_was_reset = reset_peak_rss()
        self._group_counts = self._group is not None and self._group.reset_peak()
        self._baseline_rss_bytes = rss_bytes()
        if self._device is not None:
            reset_peak_device(self._device)
        self._page_cache_bytes: int | None = 0
        self._bytes_read, self._stall_ns = self._counters()
        self._start = time.perf_counter()

    def sample(self) -> None:
        """Note how much of our files is in the page cache now."""
        resident = resident_file_bytes(self._files)
        known = self._page_cache_bytes
        self._page_cache_bytes = None if resident is None or known is None else max(resident, known)

    def read(self) -> Measurement:
        """The figures of the stretch so far."""
        seconds = time.perf_counter() - self._start
        self.sample()
        bytes_read, stall_ns = self._counters()
        return Measurement(
            baseline_rss_bytes=self._baseline_rss_bytes,
            peak_rss_bytes=max(peak_rss_bytes(), self._baseline_rss_bytes),
            peak_was_reset=self._peak_was_reset,
            page_cache_bytes=self._page_cache_bytes,
            cgroup_peak_bytes=self._group.peak_bytes() if self._group is not None and self._group_counts else None,
            peak_device_bytes=None if self._device is None else peak_device_bytes(self._device),
            shares_memory=self._shares_memory,
            bytes_read=bytes_read - self._bytes_read,
            stall_ns=stall_ns - self._stall_ns,
            seconds=seconds,
        )

    def _counters(self) -> tuple[int, int]:
        if self._stats is None:
            return disk_bytes_read(), 0
        stats = self._stats()
        return stats["bytes_read"], stats["stall_ns"]


@contextmanager
def measure(
    files: Iterable[Path | str] = (),
    stats: Callable[[], Mapping[str, int]] | None = None,
    *,
    device: int | None = None,
    shares_memory: bool = False,
) -> Iterator[Measurement]:
    """`with measure() as used: ...` fills `used` at the end of the block, also when it raises."""
    used = Measurement()
    meter = Meter(files, stats, device=device, shares_memory=shares_memory)
    try:
        yield used
    finally:
        vars(used).update(vars(meter.read()))


def _status_bytes(name: str) -> int | None:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * _KIB
    return None


def _resident_bytes_of(path: Path) -> int | None:
    """A mapping that is never touched brings in no page; mincore then tells which pages are already there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"cannot open {path} to count its cached pages: {error.strerror}") from error
    try:
        info = os.fstat(descriptor)
        if info.st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return None
        if info.st_size == 0:
            return 0
        with mmap.mmap(descriptor, info.st_size, prot=mmap.PROT_READ) as mapping:
            return _resident_bytes_of_mapping(mapping, info.st_size, path)
    finally:
        os.close(descriptor)


def _resident_bytes_of_mapping(mapping: mmap.mmap, num_bytes: int, path: Path) -> int:
    pages = np.zeros(-(-num_bytes // mmap.PAGESIZE), np.uint8)
    view = np.frombuffer(mapping, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mincore(
        ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(num_bytes), ctypes.c_void_p(pages.ctypes.data)
    )
    del view  # the mapping cannot be closed while an array looks at it
    if result != 0:
        raise StorageError(f"mincore of {path} failed: {os.strerror(ctypes.get_errno())}")
    resident = pages & 1
    last_page_bytes = num_bytes - (len(pages) - 1) * mmap.PAGESIZE
    return int(resident[:-1].sum()) * mmap.PAGESIZE + int(resident[-1]) * last_page_bytes
