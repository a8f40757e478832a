"""Ends a process at a chosen change to the file system: the n-th operation of `files.py`, before it or half done."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

from chainfed_engine.federation import files

KILLED = 77


def count_points(run: Callable[[], object]) -> list[tuple[str, str]]:
    """Every operation of a run in order: what, and the name of its file."""
    seen: list[tuple[str, str]] = []

    def note(operation: str, path: Path, data: bytes) -> None:
        seen.append((operation, path.name))

    files.fault_point = note
    try:
        run()
    finally:
        files.fault_point = None
    return seen


def killed_at(point: int, run: Callable[[], object], *, torn: bool = False) -> bool:
    """Run in a forked process that ends, without any clean-up, at operation `point` (0-based); whether it got there.

    `torn`: half of an append, or of a new file that is about to be synced, reaches the disk before the end.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(point, run, torn))
    process.start()
    process.join(120)
    assert process.exitcode in (0, KILLED), f"exit code {process.exitcode}"
    return process.exitcode == KILLED


def _child(point: int, run: Callable[[], object], torn: bool) -> None:
    reached = 0

    def fault(operation: str, path: Path, data: bytes) -> None:
        nonlocal reached
        if reached == point:
            if torn and operation == "append":
                with open(path, "ab") as stream:
                    stream.write(data[: len(data) // 2])
            elif torn and operation == "sync" and path.name.endswith(".partial"):
                os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)
        reached += 1

    files.fault_point = fault
    run()
    os._exit(0)
