"""Run a command under a hard memory limit of the kernel, page cache included (memory cgroup, version 1 or 2).

    python bench/memory/hard_limit.py 512MiB COMMAND ...

Exit code: the command's (137: killed by the limit), 125 when no group can be made, with the reason on stderr. The last
line on stderr is a JSON object: exit_code, peak_bytes (the kernel's), peak_resident_bytes (the largest process's own),
limit_bytes, limit_hits (reclaims at the limit: page cache going is no failure), seconds. Needs to own a memory cgroup:
as root, or in a delegated group (version 2).
Pages that others have cached are not charged to the command: the caches are dropped first where that is allowed.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from chainfed_engine.sizes import parse_size

UNAVAILABLE = 125


def main() -> int:
    if len(sys.argv) < 3:
        print("usage: hard_limit.py LIMIT COMMAND ...", file=sys.stderr)
        return 2
    limit = parse_size(sys.argv[1])
    try:
        group = make_group(limit)
    except OSError as error:
        print(f"hard_limit: no memory cgroup can be made here: {error}", file=sys.stderr)
        return UNAVAILABLE
    drop_page_cache()
    started = time.perf_counter()
    try:
        exit_code = run_inside(group, sys.argv[2:])
        resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        figures = {"exit_code": exit_code, **read_figures(group), "peak_resident_bytes": resident, "limit_bytes": limit}
    finally:
        group.rmdir()
    print(json.dumps({**figures, "seconds": round(time.perf_counter() - started, 1)}), file=sys.stderr)
    return exit_code


def make_group(limit_bytes: int) -> Path:
    """A new empty group with the limit set and no swap. Raises OSError saying what is missing."""
    name = f"chainfed-{os.getpid()}"
    version_1 = Path("/sys/fs/cgroup/memory")
    if (version_1 / "memory.limit_in_bytes").is_file():
        group = version_1 / name
        group.mkdir()
        limits = {"memory.limit_in_bytes": limit_bytes, "memory.memsw.limit_in_bytes": limit_bytes}
    else:
        parent = own_version_2_group()
        group = parent / name
        group.mkdir()
        limits = {"memory.max": limit_bytes, "memory.swap.max": 0}
    try:
        for file, value in limits.items():
            if (group / file).exists():
                (group / file).write_text(str(value))
        if not any((group / file).exists() for file in list(limits)[:1]):
            raise OSError(f"{group}: the memory controller is not enabled for it")
    except OSError:
        group.rmdir()
        raise
    return group


def own_version_2_group() -> Path:
    """The nearest group above this process that hands the memory controller to its children."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        raise OSError("this system mounts no memory cgroup")
    folder = Path("/sys/fs/cgroup") / path.strip("/")
    while not (folder / "cgroup.subtree_control").is_file() or "memory" not in (
        (folder / "cgroup.subtree_control").read_text().split()
    ):
        if folder == Path("/sys/fs/cgroup") or folder == folder.parent:
            raise OSError("no group above this process has the memory controller enabled for its children")
        folder = folder.parent
    return folder


def run_inside(group: Path, command: list[str]) -> int:
    """Exit code of the command, run as a member of the group from its first instruction; 128 + signal if killed."""

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    code = subprocess.run(command, preexec_fn=join, check=False).returncode
    return 128 - code if code < 0 else code


def read_figures(group: Path) -> dict[str, int | None]:
    """`peak_bytes` and `limit_hits` as the kernel counted them; None where it does not tell."""

    def number(file: str, key: str | None = None) -> int | None:
        try:
            text = (group / file).read_text()
        except OSError:
            return None
        if key is None:
            return int(text)
        return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == key), None)

    if (group / "memory.max_usage_in_bytes").exists():
        return {"peak_bytes": number("memory.max_usage_in_bytes"), "limit_hits": number("memory.failcnt")}
    return {"peak_bytes": number("memory.peak"), "limit_hits": number("memory.events", "max")}


def drop_page_cache() -> None:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


if __name__ == "__main__":
    sys.exit(main())
