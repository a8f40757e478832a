"""The kernel's peak of a memory cgroup: found through /proc, believed only when the process is alone."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from chainfed_engine.memory.cgroup import MemoryGroup

MIB = 1 << 20


def fake_proc(folder: Path, memberships: str, mounts: str) -> Path:
    folder.mkdir()
    (folder / "cgroup").write_text(memberships)
    (folder / "mountinfo").write_text(mounts)
    return folder


@pytest.fixture
def group_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mount" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").write_text(f"{os.getpid()}\n")
    return folder


def test_version_2_group_is_found_and_read(tmp_path: Path, group_folder: Path) -> None:
    (group_folder / "memory.peak").write_text("12345\n")
    mounts = f"31 23 0:28 / {tmp_path}/mount rw - cgroup2 cgroup rw,nsdelegate\n"
    group = MemoryGroup.of_this_process(fake_proc(tmp_path / "proc", "0::/a/b\n", mounts))
    assert group == MemoryGroup(group_folder, "memory.peak")
    assert group.reset_peak()
    assert group.peak_bytes() == 12345


def test_version_1_group_under_a_containers_root_is_found(tmp_path: Path, group_folder: Path) -> None:
    (group_folder / "memory.max_usage_in_bytes").write_text("777\n")
    mounts = (
        f"30 23 0:27 / {tmp_path}/other rw - cgroup cgroup rw,cpu\n"
        f"31 23 0:28 /host/c1 {tmp_path}/mount rw shared:9 - cgroup cgroup rw,memory\n"
    )
    memberships = "5:cpu:/x\n4:memory:/host/c1/a/b\n0::/\n"
    group = MemoryGroup.of_this_process(fake_proc(tmp_path / "proc", memberships, mounts))
    assert group == MemoryGroup(group_folder, "memory.max_usage_in_bytes")
    assert group.peak_bytes() == 777
    assert group.reset_peak()
    assert group.peak_bytes() == 0


def test_shared_group_says_nothing(tmp_path: Path, group_folder: Path) -> None:
    (group_folder / "memory.peak").write_text("12345\n")
    (group_folder / "cgroup.procs").write_text(f"1\n{os.getpid()}\n")
    group = MemoryGroup(group_folder, "memory.peak")
    assert not group.reset_peak()
    assert group.peak_bytes() is None


@pytest.mark.parametrize(
    ("memberships", "mounts"),
    [("", ""), ("0::/a\n", ""), ("0::/a\n", "31 23 0:28 / /nonexistent rw - cgroup2 cgroup rw\n")],
)
def test_no_group_is_none(tmp_path: Path, memberships: str, mounts: str) -> None:
    assert MemoryGroup.of_this_process(fake_proc(tmp_path / "proc", memberships, mounts)) is None
    assert MemoryGroup.of_this_process(tmp_path / "no-proc") is None


def test_real_group_of_one_process_gives_the_kernels_peak() -> None:
    root = Path("/sys/fs/cgroup/memory")
    if not os.access(root, os.W_OK) or not (root / "memory.max_usage_in_bytes").is_file():
        pytest.skip("no writable memory cgroup (version 1, as root)")
    group = root / f"chainfed-test-{uuid.uuid4().hex}"
    group.mkdir()
    script = f"""
import os
open({str(group / "cgroup.procs")!r}, "w").write(str(os.getpid()))
from chainfed_engine.memory.meter import measure
with measure() as used:
    b = bytearray(64 << 20); del b
print(used.cgroup_peak_bytes, used.peak_bytes)
"""
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    finally:
        group.rmdir()
    cgroup_peak_bytes, peak_bytes = (int(word) for word in done.stdout.split())
    assert cgroup_peak_bytes == peak_bytes
    assert 64 * MIB <= peak_bytes < 200 * MIB
