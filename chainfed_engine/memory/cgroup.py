"""The kernel's own peak of a memory cgroup (version 1 or 2), which counts page cache and kernel memory too.

It speaks for this process only when the process is alone in its group; then it is the truest peak there is.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryGroup:
    """The memory cgroup of this process: `folder` holds the kernel's files, `peak_file` names the one with the peak."""

    folder: Path
    peak_file: str

    @classmethod
    def of_this_process(cls, proc: Path = Path("/proc/self")) -> "MemoryGroup | None":
        """The group this process is in; None without a memory cgroup that keeps a peak. proc: for tests."""
        try:
            memberships = (proc / "cgroup").read_text().splitlines()
            mounts = (proc / "mountinfo").read_text().splitlines()
        except OSError:
            return None
        for line in memberships:
            _, controllers, path = line.split(":", 2)
            version_2 = controllers == ""
            if not version_2 and "memory" not in controllers.split(","):
                continue
            folder = _mounted_folder(mounts, "cgroup2" if version_2 else "cgroup", path)
            peak_file = "memory.peak" if version_2 else "memory.max_usage_in_bytes"
            if folder is not None and (folder / peak_file).is_file():
                return cls(folder, peak_file)
        return None

    def is_ours_alone(self) -> bool:
        """Whether no other process is in the group."""
        try:
            return (self.folder / "cgroup.procs").read_text().split() == [str(os.getpid())]
        except OSError:
            return False

    def reset_peak(self) -> bool:
        """Restart the peak from the present. True when `peak_bytes` will speak for this process alone.

        Where the kernel does not allow a restart (version 2) the peak covers the group's whole life: an upper bound.
        """
        if not self.is_ours_alone():
            return False
        if self.peak_file == "memory.max_usage_in_bytes":
            try:
                (self.folder / self.peak_file).write_text("0")
            except OSError:
                return True
        return True

    def peak_bytes(self) -> int | None:
        """The group's peak; None when another process has joined."""
        if not self.is_ours_alone():
            return None
        try:
            return int((self.folder / self.peak_file).read_text())
        except (OSError, ValueError):
            return None


def _mounted_folder(mounts: list[str], file_system: str, path: str) -> Path | None:
    """Where the group `path` of the hierarchy is mounted. A container may see only a subtree as its root."""
    for line in mounts:
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ")[:3] if len(right.split(" ")) >= 3 else ("", "", "")
        if kind != file_system or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount_point = left.split(" ")[3:5]
        inside = path[len(root) :] if root != "/" and (path + "/").startswith(root + "/") else path
        folder = Path(mount_point) / inside.lstrip("/")
        return folder if folder.is_dir() else Path(mount_point)
    return None
