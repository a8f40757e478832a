from pathlib import Path

import pytest

from chainfed_engine.cli import machine
from chainfed_engine.errors import StorageError


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_tightest_limit_of_a_unified_cgroup_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/job\n",
            "sys/fs/cgroup/user/job/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": "1073741824\n",
            "sys/fs/cgroup/memory.max": "2147483648\n",
        },
    )
    assert machine.cgroup_limit_bytes(tmp_path) == 1 << 30


def test_a_memory_controller_of_the_first_version_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/group\n",
            "sys/fs/cgroup/memory/group/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory.max": "1\n",
        },
    )
    assert machine.cgroup_limit_bytes(tmp_path) == 512 << 20


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert machine.cgroup_limit_bytes(tmp_path) is None
    write(tmp_path, {"proc/self/cgroup": "garbage\n0::/../..\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert machine.cgroup_limit_bytes(tmp_path) is None


def test_this_machine_tells_its_memory_and_processor() -> None:
    memory = machine.memory_bytes()
    assert memory["total_bytes"] is not None and memory["available_bytes"] is not None
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert machine.cpu_name() is None or machine.cpu_name()


def test_disk_speed_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    speed = machine.disk_speed(tmp_path)
    assert speed["write_bytes_per_s"] > 0 and speed["read_bytes_per_s"] > 0 and speed["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none: cannot write a probe file"):
        machine.disk_speed(tmp_path / "none")
