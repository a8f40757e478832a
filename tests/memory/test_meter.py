"""The meter against processes and files whose memory use is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chainfed_engine.memory import meter
from chainfed_engine.memory.meter import Measurement, Meter, measure, resident_file_bytes

MIB = 1 << 20


def run_script(script: str, *arguments: str) -> str:
    """What the script prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_to_disk(path: Path, num_bytes: int) -> Path:
    with path.open("wb") as out:
        out.write(os.urandom(num_bytes))
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_peak_counts_memory_that_was_given_back_and_only_since_the_block_began() -> None:
    out = run_script(
        """
from chainfed_engine.memory.meter import measure
b = bytearray(300 << 20); del b
with measure() as first:
    b = bytearray(100 << 20); del b
with measure() as second:
    pass
print(first.peak_was_reset, first.peak_rss_bytes - first.baseline_rss_bytes, first.seconds > 0)
print(second.peak_was_reset, second.peak_rss_bytes - second.baseline_rss_bytes)
"""
    )
    first, second = (line.split() for line in out.splitlines())
    if first[0] == "False":
        pytest.skip("this kernel does not reset the peak")
    assert 99 * MIB <= int(first[1]) < 110 * MIB
    assert int(second[1]) < 10 * MIB


def test_measure_fills_its_result_when_the_block_raises() -> None:
    with pytest.raises(KeyError), measure() as used:
        assert used == Measurement()
        raise KeyError
    assert used.peak_rss_bytes >= used.baseline_rss_bytes > MIB
    assert used.peak_bytes >= used.baseline_rss_bytes


def test_page_cache_is_counted_by_the_page(tmp_path: Path) -> None:
    path = write_to_disk(tmp_path / "a", 3 * MIB + 100)
    empty = tmp_path / "empty"
    empty.touch()
    assert resident_file_bytes([path, empty, tmp_path / "missing"]) == 0
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4096, MIB)
    one_read = resident_file_bytes([path])
    assert one_read is not None and 4096 <= one_read < MIB
    path.read_bytes()
    assert resident_file_bytes([path]) == 3 * MIB + 100
    assert resident_file_bytes([tmp_path]) == 3 * MIB + 100


def test_meter_keeps_the_largest_page_cache_it_sampled(tmp_path: Path) -> None:
    path = write_to_disk(tmp_path / "a", 2 * MIB)
    watch = Meter(files=[tmp_path])
    path.read_bytes()
    watch.sample()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    used = watch.read()
    assert resident_file_bytes([path]) == 0
    assert used.page_cache_bytes == 2 * MIB
    if used.cgroup_peak_bytes is None:
        assert used.peak_bytes == used.peak_rss_bytes + 2 * MIB


def test_unknown_page_cache_stays_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_to_disk(tmp_path / "a", 4096)
    monkeypatch.setattr(os, "geteuid", lambda: -2)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert resident_file_bytes([path]) is None
    assert Meter(files=[path]).read().page_cache_bytes is None


def test_reads_and_stalls_come_from_the_readers_stats() -> None:
    stats = {"bytes_read": 100, "stall_ns": 7}
    watch = Meter(stats=lambda: stats)
    stats.update(bytes_read=350, stall_ns=10)
    assert (watch.read().bytes_read, watch.read().stall_ns) == (250, 3)
    watch.restart()
    assert (watch.read().bytes_read, watch.read().stall_ns) == (0, 0)


def test_reads_without_a_reader_are_those_of_the_process(tmp_path: Path) -> None:
    path = write_to_disk(tmp_path / "a", 4 * MIB)
    with measure() as used:
        path.read_bytes()
    if meter.disk_bytes_read() == 0:
        pytest.skip("this kernel does not count reads")
    assert 4 * MIB <= used.bytes_read < 6 * MIB
